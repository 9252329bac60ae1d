"""Activation checkpointing recomputes a block with the gates that its forward had.

A recomputation runs inside `backward`, when the `gated` block of the forward may be closed and the
next batch's gates set. So a gated call notes its routing with every checkpoint whose forward it is
part of, and a call in a recomputation reads what was noted there. The note hangs on the object that
the checkpoint itself keeps from forward to backward, so it lives as long as that piece of the
graph and no longer. The object is found on the Python stack:

    reentrant      the context of the autograd.Function whose `forward(ctx, ...)` or
                   `backward(ctx, ...)` runs: torch's CheckpointFunction and the like
    not reentrant  the `_CheckpointFrame` that torch.utils.checkpoint's `checkpoint` makes and its
                   `unpack_hook` recomputes

Checkpoints nest, and a recomputation runs the forward of those inside it again.
"""

from __future__ import annotations

import sys
from inspect import getgeneratorlocals
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import checkpoint as _torch

from fedms.peft.routing import AdapterRouting

_NAMES = frozenset(("checkpoint", "unpack_hook", "forward", "backward"))
# checkpoint -> id of a layer -> the routing that its calls in the forward had
_NOTES: WeakKeyDictionary[Any, dict[int, AdapterRouting]] = WeakKeyDictionary()


def depth() -> int:
    """How many checkpoints' forwards run the caller, up to the recomputation around it, if any."""
    return len(_enclosing()[0])


def note(layer: object, routing: AdapterRouting, outer: int) -> None:
    """Note a call's routing with the running checkpoints, apart from the `outer` outermost ones."""
    forwards, _ = _enclosing()
    for checkpoint in forwards[outer:]:
        _NOTES.setdefault(checkpoint, {})[id(layer)] = routing


def noted(layer: object) -> tuple[AdapterRouting | None, bool]:
    """What the forward had (None: no gates), and whether a recomputation runs the caller at all."""
    forwards, recomputed = _enclosing()
    if recomputed is None:
        return None, False
    routing = _NOTES.get(recomputed, {}).get(id(layer))
    if routing is not None:
        for checkpoint in forwards:
            _NOTES.setdefault(checkpoint, {})[id(layer)] = routing
    return routing, True


def _enclosing() -> tuple[list[Any], Any]:
    """The checkpoints whose forwards run the caller, the outermost first, within the innermost
    recomputation that runs it; and the checkpoint that this recomputes, or None.
    """
    forwards: list[Any] = []
    recomputed = None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and recomputed is None:
        name = frame.f_code.co_name
        if name in _NAMES:
            own = frame.f_code.co_filename == _torch.__file__
            if name == "checkpoint" and own and "gen" in frame.f_locals:
                forwards.append(getgeneratorlocals(frame.f_locals["gen"])["new_frame"])
            elif name == "unpack_hook" and own:
                recomputed = frame.f_locals["frame"]
            elif frame.f_code.co_varnames[:1] == ("ctx",):
                context = frame.f_locals["ctx"]
                if name == "forward" and isinstance(context, torch._C._FunctionBase):
                    forwards.append(context)
                elif name == "backward" and isinstance(context, torch._C._FunctionBase):
                    recomputed = context
        frame = frame.f_back
    return forwards[::-1], recomputed
