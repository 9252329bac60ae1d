"""Which routing a call of a fused layer has: that of the block, or of the model, it is made in.

`set_gates` is state of the model: each layer holds a `Binding` until it is cleared, copies and
checkpoints of the whole model take it along, every thread sees it. A `gated` block belongs to the
thread that opened it, as torch's own contexts do, and to the model it was opened on: while it is
open each layer holds it under the thread's number, and nothing is left at its end; copies do not
take it. Both are attributes of the layer because that is what torch.compile can guard; a
table by layer would compile one graph a layer.

In a recomputation neither counts: `fedms.peft.checkpointing` knows what the forward had.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from fedms.peft.checkpointing import deleted, depth, note, noted
from fedms.peft.generation import generating_call, generating_models, watch, watching
from fedms.peft.routing import AdapterRouting


class _Thread(threading.local):
    """The running thread's number as an attribute: torch.compile cannot trace get_ident."""

    def __init__(self) -> None:
        self.number = threading.get_ident()


_THREAD = _Thread()
_LOCK = threading.Lock()  # over reading and writing a layer's open blocks


class Binding:
    """What `set_gates` or a `gated` block gives a layer; immutable, shared by copies of the model.

    Attributes:
        routing: None: no gates, peft's active adapters.
        held: those of the routing's adapters that the layer had then.
        task: the backward pass that it was made in, -1 outside of any.
        depth: how many checkpoints were running when it was made: their recomputations make it
            again themselves.
        restored: made for a recomputation, from what was in force when its forward ran a compiled
            graph (fedms.peft.compiled).
    """

    def __init__(
        self,
        routing: AdapterRouting | None,
        *,
        held: tuple[str, ...] = (),
        restored: bool = False,
    ) -> None:
        self.routing = routing
        self.held = held
        self.restored = restored
        self.task = torch._C._current_graph_task_id()
        self.depth = depth()

    def __deepcopy__(self, memo: dict[int, object]) -> Binding:
        return self


class Gateable:
    """A layer whose calls have a routing."""

    _fedms_set: Binding | None = None
    _fedms_open: dict[int, Binding] | None = None  # by thread

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # nn.Module's
        with _LOCK:
            _hold(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the open blocks and counts, which are not for a copy: it is another model."""
        state: Any = super().__getstate__()  # nn.Module's, which leaves out the compiled call
        for key in ("_fedms_open", "_fedms_counts", "_fedms_traces"):
            state.pop(key, None)
        return state


_HELD: WeakSet[Gateable] = WeakSet()  # layers with a binding, open or set; used under _LOCK


def in_force() -> dict[Gateable, Binding | None]:
    """The layers of any model that have bindings, with the one that this thread's calls have."""
    with _LOCK:
        layers = [*_HELD]
    opened = {layer: layer._fedms_open for layer in layers}
    return {
        layer: layer._fedms_set if threads is None else threads.get(_THREAD.number)
        for layer, threads in opened.items()
    }


def routing_of(layer: Gateable) -> AdapterRouting | None:
    """The routing of the call of `layer` that is being made.

    Raises RuntimeError where it cannot be told: in a thread that has opened no block while another
    has, or in a backward pass that no checkpoint explains; and where an adapter of it was deleted.
    """
    if torch.compiler.is_compiling():  # a checkpoint in a compiled graph keeps the graph's inputs
        binding = _binding(layer)
        return None if binding is None else binding.routing
    task = torch._C._current_graph_task_id()
    if task != -1:
        return _in_backward(layer, task)
    if layer._fedms_open is None and layer._fedms_set is None:
        return None
    binding = _binding(layer)
    if binding is None or binding.routing is None:
        return None
    note(layer, binding.routing, binding.held, binding.depth)
    call = generating_call()
    return binding.routing if call is None else call.fit(binding.routing)


def _binding(layer: Gateable) -> Binding | None:
    if layer._fedms_open is not None:
        binding = layer._fedms_open.get(_THREAD.number)
        if binding is None:
            raise RuntimeError(
                "another thread has gates open on this model and this thread has none: open a "
                "`gated` block in every thread that uses the model meanwhile (gated(model, None) "
                "for no gates), or set them for all threads with set_gates"
            )
    else:
        binding = layer._fedms_set
    if binding is not None:
        gone = deleted(layer, binding.held)
        if gone:
            raise RuntimeError(
                f"gates or adapter names are set for adapters {gone}, which were deleted since: "
                "set them anew, or clear them with set_gates(model, None)"
            )
    return binding


def _in_backward(layer: Gateable, task: int) -> AdapterRouting | None:
    opened = None if layer._fedms_open is None else layer._fedms_open.get(_THREAD.number)
    binding = layer._fedms_set if opened is None else opened
    restored = binding is not None and binding.restored
    if binding is not None and binding.task == task and not restored:  # by the recomputation itself
        if binding.routing is not None:
            note(layer, binding.routing, binding.held, binding.depth)
        return binding.routing
    routing, known = noted(layer)
    if routing is None and binding is not None and restored:
        return binding.routing
    if not known and binding is not None:
        raise RuntimeError(
            "a layer is called within a backward pass, but not by activation checkpointing as "
            "torch.utils.checkpoint does it, so the gates of its forward are not known: clear the "
            "gates before the backward pass"
        )
    return routing


def set_on(model: nn.Module, bindings: Mapping[Gateable, Binding]) -> None:
    """The layers of `model` have these bindings from now on."""
    with _LOCK:
        for layer, binding in bindings.items():
            if binding.routing is None:
                vars(layer).pop("_fedms_set", None)
            else:
                vars(layer)["_fedms_set"] = binding
            _hold(layer)
    for module in generating_models(model):
        layers = [layer for layer in module.modules() if isinstance(layer, Gateable)]
        handles = vars(module).pop("_fedms_watch", None)
        if _by_row(layer._fedms_set for layer in layers):
            vars(module)["_fedms_watch"] = handles or watch(module)
        else:
            for handle in handles or ():
                handle.remove()


def _by_row(bindings: Iterable[Binding | None]) -> bool:
    return any(b is not None and b.routing is not None and b.routing.by_row() for b in bindings)


@contextmanager
def bound_on(model: nn.Module, bindings: Mapping[Gateable, Binding]) -> Iterator[None]:
    """The calls that this thread makes in the block have these bindings of layers of `model`."""
    with watching(model) if _by_row(bindings.values()) else nullcontext(), bound(bindings):
        yield


@contextmanager
def bound(bindings: Mapping[Gateable, Binding]) -> Iterator[None]:
    """The calls that this thread makes in the block have these bindings."""
    thread = _THREAD.number
    before = {layer: _swap(layer, thread, binding) for layer, binding in bindings.items()}
    try:
        yield
    finally:
        for layer, binding in before.items():
            _swap(layer, thread, binding)


def _swap(layer: Gateable, thread: int, binding: Binding | None) -> Binding | None:
    """Put a thread's open block on a layer, None for none; returns the one before."""
    with _LOCK:
        others = dict(layer._fedms_open or {})
        before = others.pop(thread, None)
        if binding is not None:
            others[thread] = binding
        # by vars: nn.Module's __setattr__ takes ten times as long
        if others:
            vars(layer)["_fedms_open"] = others
        else:
            vars(layer).pop("_fedms_open", None)
        _hold(layer)
    return before


def release(layer: Gateable) -> None:
    """No binding is on the layer any more, whoever has a block open on it."""
    with _LOCK:
        vars(layer).pop("_fedms_open", None)
        vars(layer).pop("_fedms_set", None)
        _HELD.discard(layer)


def _hold(layer: Gateable) -> None:
    """Keep _HELD up to date, under _LOCK."""
    if layer._fedms_open is None and layer._fedms_set is None:
        _HELD.discard(layer)
    else:
        _HELD.add(layer)
