"""Gates of a compiled call that a checkpoint outside of its graph recomputes.

A compiled graph runs none of our Python, so `fedms.peft.checkpointing` would note nothing for its
calls, and the recomputation, one more call of the graph, would read the gates of that moment. So
where a graph is traced with gates, they go through an op, `fedms::watch`, which copies them and,
when it runs, looks at the stack as an eager call does: each checkpoint whose forward runs the graph
will recompute with the gates that are in force then. It takes 5 us a gated layer; where layers
share gates, a training graph holds one. CUDA graphs are recorded around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedms.peft.binding import Binding, Gateable, bound, in_force
from fedms.peft.checkpointing import GRAPH, Note, enclosing
from fedms.peft.routing import AdapterRouting, Gates


def watched(routing: AdapterRouting, x: Tensor) -> tuple[AdapterRouting, Tensor]:
    """The routing of a call that is being traced and its input, one of them through the op.

    When the graph runs, the op raises RuntimeError where gates cannot follow: in a checkpoint that
    does not recompute as torch's do, and in a backward pass whose forward had no such gates.
    """
    gates = routing.gates
    if isinstance(gates, Tensor):
        return replace(routing, gates=_watch(gates)), x
    if gates is not None:
        return replace(routing, gates=lambda h: _watch_result(gates(h))), x
    if routing.sample_idxs is not None:  # without the samples, whose reading would be guarded
        return AdapterRouting(routing.adapters, sample_idxs=_watch(routing.sample_idxs)), x
    return routing, _watch(x)


def _watch_result(gates: Gates) -> Gates:
    return (_watch(gates[0]), gates[1]) if isinstance(gates, tuple) else _watch(gates)


def _watch(values: Tensor) -> Tensor:
    return torch.ops.fedms.watch(values)


def _copy(values: Tensor) -> Tensor:
    """The op: a copy of values, made after the checkpoints around the call were told of gates."""
    forwards, recomputed = enclosing()
    if recomputed is not GRAPH:  # which recomputes with its own inputs
        bindings = {layer: b for layer, b in in_force().items() if b is not None and b.routing}
        task = torch._C._current_graph_task_id()
        if task != -1 and any(binding.task != task for binding in bindings.values()):
            raise RuntimeError(
                "a compiled block is called within a backward pass with gates that its forward did "
                "not have: clear the gates before the backward pass"
            )
        for depth, checkpoint in enumerate(forwards):
            _tell(checkpoint, {layer: b for layer, b in bindings.items() if b.depth <= depth})
    return values.clone()


_LIBRARY = torch.library.Library("fedms", "FRAGMENT")
_LIBRARY.define("watch(Tensor values) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
_LIBRARY.impl("watch", _copy, "CompositeExplicitAutograd")
torch.library.register_fake("fedms::watch", torch.empty_like, lib=_LIBRARY)
torch.library.register_autograd("fedms::watch", lambda _, gradient: gradient, lib=_LIBRARY)


def _tell(checkpoint: Any, bindings: Mapping[Gateable, Binding]) -> None:
    """Let a checkpoint recompute with these bindings."""
    name = "recompute_fn" if hasattr(checkpoint, "recompute_fn") else "run_function"
    function = getattr(checkpoint, name, None)
    if function is None:
        raise RuntimeError(
            f"gates are in force in a compiled block that a {type(checkpoint).__name__} may "
            f"recompute, and it does not do that as torch.utils.checkpoint does, so they could "
            f"differ: compile around the checkpoint, or do not compile the block"
        )
    if not isinstance(function, _Recomputation):
        function = _Recomputation(function)
        setattr(checkpoint, name, function)
    for layer, binding in bindings.items():
        if binding.routing is not None:
            function.notes[layer] = Note.of(binding.routing, binding.held)


class _Recomputation:
    """A checkpoint's function, with the gates that were in force in its forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.notes: dict[Gateable, Note] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        had = {layer: note.unchanged(layer) for layer, note in self.notes.items()}
        routings = dict.fromkeys(in_force()) | had
        with bound({layer: Binding(r, restored=True) for layer, r in routings.items()}):
            return self.function(*args, **kwargs)
