"""What a client that shares no memory with the server says: JSON and safetensors, strictly read.

A reader believes nothing: what is too long is not read at all, and a field that is missing, of
another type or not finite is refused by its name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedms.fl.types import ClientFailure, State
from fedms.fl.wire import encoded_size, pack, unpack

T = TypeVar("T")

HELLO, TRAIN, EVALUATE = "query.hello", "train", "evaluate"
VALIDATE, IMPORTANCE = "evaluate.validate", "query.importance"
"""What a client is asked, in Flower's words."""
MOST_TEXT = 2**20
"""Bytes of an answer beside its tensors."""


@dataclass(frozen=True)
class Introduction:
    """Who a site is; ``unseen``: it is scored and takes part in no round."""

    client_id: str
    unseen: bool


@dataclass(frozen=True)
class Trained:
    """A :class:`fedms.fl.server.Sent` beside its tensors."""

    client_id: str
    round: int
    num_examples: int
    kept: bool
    train_loss: float


def say(value: Any, shared: State | None = None) -> bytes:
    """A dataclass or a list of numbers, and tensors."""
    record = TypeAdapter(type(value)).dump_python(value, mode="json")
    return pack({"said": record}, shared=shared or {})


def say_why_not(error: Exception) -> bytes:
    """That there is nothing else to say."""
    reason = str(error) if isinstance(error, ClientFailure) else f"{type(error).__name__}: {error}"
    return pack({"failed": reason})


def hear(content: bytes, form: type[T], tensors: State | None = None) -> tuple[T, State]:
    """What :func:`say` was given.

    Args:
        form: its type.
        tensors: what may come with it, for the size.

    Raises:
        ClientFailure: the client says why it has nothing to say, or this is no answer.
    """
    most = MOST_TEXT + 2 * encoded_size(tensors or {})
    if len(content) > most:
        raise ClientFailure(f"it sent {len(content)} bytes, at most {most} are read")
    try:
        record, states = unpack(content)
        if "failed" in record:
            raise ClientFailure(str(record["failed"])[:2000])
        said = json.dumps(record["said"], allow_nan=False)
        value = TypeAdapter(form).validate_json(said, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "answer"
        raise ClientFailure(f"its {where} is wrong: {first['msg']}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise ClientFailure(f"it sent what is no answer: {error}") from None
    return value, states.get("shared", {})
