"""How values are written for another process: JSON and safetensors in one piece, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedms.fl.types import State


def pack(record: Mapping[str, Any], **states: State) -> bytes:
    """Named states as one safetensors file whose metadata is ``record`` as JSON."""
    tensors = {f"{key}/{name}": t for key, state in states.items() for name, t in state.items()}
    return save(_writable(tensors), {"json": json.dumps(record)})


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, State]]:
    """What :func:`pack` was given; states that were empty are missing.

    Raises:
        ValueError: it is something else, or cut short.
    """
    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        record = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["json"])
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{len(content)} bytes that are no message: {error}") from error
    states: dict[str, State] = {}
    for name, tensor in tensors.items():
        key, _, rest = name.partition("/")
        states.setdefault(key, {})[rest] = tensor
    return record, states


def _writable(state: State) -> State:
    # two names may hold the very same tensor, e.g. an untrained part of two experts
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
