"""Activation checkpointing recomputes a block with the gates that its forward had.

A recomputation runs inside `backward`, when the `gated` block of the forward may be closed and the
next batch's gates set. transformers calls a module's `_gradient_checkpointing_func`; a
`BoundCheckpoint` in its place notes what the block's layers read and puts it back around the
recomputation. Where a block is checkpointed without transformers, FusedLinear raises when the gates
have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fedms.peft.layer import FusedLinear
from fedms.peft.routing import AdapterRouting

_ATTRIBUTE = "_gradient_checkpointing_func"


class BoundCheckpoint:
    """A checkpoint function after whose forward the block's layers keep their gates."""

    def __init__(self, checkpoint: Callable[..., Any], layers: list[FusedLinear]) -> None:
        self.checkpoint = checkpoint
        self.layers = layers

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routings = [layer._fedms_routing for layer in self.layers]

        def bound(*inputs: Any, **named: Any) -> Any:
            with _reading(self.layers, routings):
                return function(*inputs, **named)

        return self.checkpoint(bound, *args, **kwargs)


def bind_checkpoints(model: nn.Module) -> None:
    """Wrap the checkpoint function of every block that has one and holds fused layers."""
    for module in model.modules():
        checkpoint = module.__dict__.get(_ATTRIBUTE)
        if checkpoint is None or isinstance(checkpoint, BoundCheckpoint):
            continue
        layers = [layer for layer in module.modules() if isinstance(layer, FusedLinear)]
        if layers:
            setattr(module, _ATTRIBUTE, BoundCheckpoint(checkpoint, layers))


def release_checkpoints(model: nn.Module) -> None:
    """Undo `bind_checkpoints`."""
    for module in model.modules():
        checkpoint = module.__dict__.get(_ATTRIBUTE)
        if isinstance(checkpoint, BoundCheckpoint):
            setattr(module, _ATTRIBUTE, checkpoint.checkpoint)


@contextmanager
def _reading(
    layers: Sequence[FusedLinear], routings: Sequence[AdapterRouting | None]
) -> Iterator[None]:
    before = [(layer._fedms_routing, layer._fedms_seen) for layer in layers]
    for layer, routing in zip(layers, routings, strict=True):
        layer._fedms_routing = layer._fedms_seen = routing
    try:
        yield
    finally:
        for layer, (routing, seen) in zip(layers, before, strict=True):
            layer._fedms_routing, layer._fedms_seen = routing, seen
