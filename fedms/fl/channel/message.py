"""What a message is: a header that is checked field by field, and tensors. Never pickle.

A reader believes nothing: sizes are checked before anything is made of them.
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedms.fl import wire
from fedms.fl.types import ClientFailure, State

_HEADER_PER_TENSOR, _HEADER_REST = 1024, 65536
"""Bytes that names, shapes and offsets may take at most, a tensor and in all."""

H = TypeVar("H", bound="Header")


class MessageError(ClientFailure):
    """Bytes that are no message, or not the one that was expected; says which and why."""


class Header(BaseModel):
    """What a message says of itself."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def pack(header: Header, tensors: State) -> bytes:
    """The bytes of a message."""
    return wire.pack(header.model_dump(), values=tensors)


def unpack(message: bytes, header: type[H], most: int) -> tuple[H, State]:
    """Header and tensors of a message.

    Args:
        header: what its header must be.
        most: bytes that it may have, see :func:`most_bytes`. Tensors take no more memory than that.

    Raises:
        MessageError: it is too long, cut short, or malformed anywhere.
    """
    if len(message) > most:
        raise MessageError(f"its message has {len(message)} bytes, at most {most} are read")
    try:
        record, states = wire.unpack(message)
        found = header.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise MessageError(f"its message's header is wrong: {where}: {first['msg']}") from None
    except ValueError as error:
        raise MessageError(f"its message cannot be read: {error}") from None
    if states.keys() - {"values"}:
        raise MessageError(f"its message has the parts {sorted(states)}, expected values alone")
    return found, states.get("values", {})


def most_bytes(expected: State) -> int:
    """No honest message about these tensors is longer, however they are encoded."""
    values = sum(tensor.numel() * 2 * tensor.element_size() for tensor in expected.values())
    return values + _HEADER_PER_TENSOR * len(expected) + _HEADER_REST
