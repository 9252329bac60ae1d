"""What a client that shares no memory with the server says beside its updates, strictly read.

A reader believes nothing: what is too long is not read at all, and a field that is missing, of
another type or not finite is refused by its name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedms.fl.types import ClientFailure
from fedms.fl.wire import pack, unpack

T = TypeVar("T")

HELLO, TRAIN, EVALUATE = "query.hello", "train", "evaluate"
VALIDATE, IMPORTANCE = "evaluate.validate", "query.importance"
"""What a client is asked, in Flower's words."""
MOST_TEXT = 2**20
"""Bytes of an answer."""


@dataclass(frozen=True)
class Introduction:
    """Who a site is; ``unseen``: it is scored and takes part in no round."""

    client_id: str
    unseen: bool


def say(value: Any) -> bytes:
    """A dataclass or a list of numbers."""
    return pack({"said": TypeAdapter(type(value)).dump_python(value, mode="json")})


def say_why_not(error: Exception) -> bytes:
    """That there is nothing else to say."""
    reason = str(error) if isinstance(error, ClientFailure) else f"{type(error).__name__}: {error}"
    return pack({"failed": reason})


def why_not(content: bytes) -> str | None:
    """What :func:`say_why_not` was given; None where a client says something else."""
    if len(content) > MOST_TEXT:
        return None
    try:
        record, _ = unpack(content)
        return str(record["failed"])[:2000] if "failed" in record else None
    except (ValueError, TypeError):
        return None


def hear(content: bytes, form: type[T]) -> T:
    """What :func:`say` was given, of the type ``form``.

    Raises:
        ClientFailure: the client says why it has nothing to say, or this is no answer.
    """
    if len(content) > MOST_TEXT:
        raise ClientFailure(f"it sent {len(content)} bytes, at most {MOST_TEXT} are read")
    try:
        record, _ = unpack(content)
        if "failed" in record:
            raise ClientFailure(str(record["failed"])[:2000])
        said = json.dumps(record["said"], allow_nan=False)
        return TypeAdapter(form).validate_json(said, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "answer"
        raise ClientFailure(f"its {where} is wrong: {first['msg']}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ClientFailure(f"it sent what is no answer: {error}") from None
