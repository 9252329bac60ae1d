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
    composable     the same, but a module's hooks make it and are gone: its hook on saved tensors is
                   the innermost

Checkpoints nest, and a recomputation runs the forward of those inside it again. A compiled graph is
an autograd.Function too: its forward is none of a checkpoint, its backward may recompute.
"""

from __future__ import annotations

import sys
from inspect import getgeneratorlocals
from types import FrameType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import checkpoint as _torch

from fedms.peft.routing import AdapterRouting


class _Graph:
    """A compiled graph, whose backward may recompute."""


GRAPH = _Graph()
_OWN = ("torch._functorch.", "torch._library.")  # of compiled graphs and of ops
_NAMES = frozenset(("checkpoint", "unpack_hook", "forward", "backward"))


class Note(NamedTuple):
    """The routing of a call in a forward, and what must be as it was then: how often its tensors
    had been changed in place, and the adapters of it that the layer had.
    """

    routing: AdapterRouting
    versions: tuple[int, ...]
    held: tuple[str, ...]

    @classmethod
    def of(cls, routing: AdapterRouting, held: tuple[str, ...]) -> Note:
        return cls(routing, _versions(routing), held)

    def unchanged(self, layer: Any) -> AdapterRouting:
        """The routing. Raises RuntimeError where it is not what it was: nobody kept a copy."""
        gone = deleted(layer, self.held)
        if gone:
            raise RuntimeError(
                f"adapters {gone} were deleted between a forward and its recomputation by "
                "activation checkpointing, which needs them: run backward first"
            )
        if _versions(self.routing) != self.versions:
            raise RuntimeError(
                "gates were changed in place between a forward and its recomputation by activation "
                "checkpointing, which needs them as they were: give set_gates a new tensor"
            )
        return self.routing


def _versions(routing: AdapterRouting) -> tuple[int, ...]:
    tensors = [t for t in (routing.gates, routing.expert_idxs) if isinstance(t, Tensor)]
    return tuple(t._version for t in tensors if not t.is_inference())


# checkpoint -> id of a layer -> what its calls in the forward had
_NOTES: WeakKeyDictionary[Any, dict[int, Note]] = WeakKeyDictionary()


def deleted(layer: Any, held: tuple[str, ...]) -> list[str]:
    """Those of the adapters that the layer had which it has no more."""
    there = layer._modules["lora_A"]._modules  # without nn.Module.__getattr__, which is slow
    return [name for name in held if name not in there]


def depth() -> int:
    """How many checkpoints' forwards run the caller, up to the recomputation around it, if any."""
    return len(enclosing()[0])


def note(layer: Any, routing: AdapterRouting, held: tuple[str, ...], outer: int) -> None:
    """Note a call's routing with the running checkpoints, apart from the `outer` outermost ones.

    held: those of the routing's adapters that the layer has.
    """
    forwards, _ = enclosing()
    for checkpoint in forwards[outer:]:
        _NOTES.setdefault(checkpoint, {})[id(layer)] = Note.of(routing, held)


def noted(layer: Any) -> tuple[AdapterRouting | None, bool]:
    """What the forward had (None: no gates), and whether a recomputation runs the caller at all.

    Raises RuntimeError where its gates were changed in place or an adapter was deleted since.
    """
    forwards, recomputed = enclosing()
    if recomputed is None:
        return None, False
    note = _NOTES.get(recomputed, {}).get(id(layer))
    if note is None:
        return None, True
    for checkpoint in forwards:
        _NOTES.setdefault(checkpoint, {})[id(layer)] = note
    return note.unchanged(layer), True


def enclosing() -> tuple[list[Any], Any]:
    """The checkpoints whose forwards run the caller's caller, the outermost first, within the
    innermost recomputation that runs it; and the checkpoint that this recomputes, GRAPH or None.
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
                context, module = frame.f_locals["ctx"], frame.f_globals["__name__"]
                if not isinstance(context, torch._C._FunctionBase):
                    pass
                elif name == "backward":
                    recomputed = GRAPH if module.startswith(_OWN) else context
                elif name == "forward" and not module.startswith(_OWN):
                    forwards.append(context)
        frame = frame.f_back
    forwards.reverse()
    innermost = _of_hooks()
    if innermost is not None and innermost not in forwards:
        forwards.append(innermost)
    return forwards, recomputed


def _of_hooks() -> Any:
    """The checkpoint whose hooks on saved tensors are the innermost, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    if hooks is None:
        return None
    code = hooks[0].__code__ if isinstance(hooks[0], FunctionType) else None
    if code is None or code.co_filename != _torch.__file__ or code.co_freevars != ("frame",):
        return None
    return hooks[0].__closure__[0].cell_contents
