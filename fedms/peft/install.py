"""Put the fused forward on peft's LoRA layers, and take it off again.

Only the class of a layer changes: the module tree, the parameter objects, the state_dict keys and
everything a layer remembers stay the same objects.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import Linear, LoraLayer, MultiheadAttention
from peft.tuners.lora.model import LoraModel
from torch import nn

from fedms.peft.adapters import Undecided
from fedms.peft.binding import Binding, release, set_on
from fedms.peft.layer import FUSED, FusedLayer, FusedLinear, why_not_fused, why_not_taken
from fedms.peft.mixtures import fuse_xlora, restore_xlora


@dataclass(frozen=True)
class Report:
    """What `accelerate` found.

    Attributes:
        fused: dotted names of the LoRA layers that now run fused.
        fallback: dotted name -> why that layer runs peft's own forward as things stand. A layer
            that was taken over is asked again on every call, so merging and unmerging, say, or
            disabling and enabling move it there and back.
        at_each_call: dotted name -> what keeps the layer, which was taken over, from saying now
            how its calls will run: its weights are sharded and whole in calls only, or none of
            its adapters is active yet.
    """

    fused: tuple[str, ...]
    fallback: dict[str, str]
    at_each_call: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} LoRA layers run fused, {len(self.fallback)} do not"]
        lines += _grouped(self.fallback)
        if self.at_each_call:
            lines += [f"{len(self.at_each_call)} are decided at each call"]
            lines += _grouped(self.at_each_call)
        return "\n".join(lines)


def _grouped(reasons: Mapping[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"  {reason}: {', '.join(listed)}" for reason, listed in names.items()]


@dataclass(frozen=True)
class Stats:
    """How a model's LoRA layers ran since they were taken over, or since the last reset.

    Attributes:
        fused: calls of layers that ran fused.
        fallback: reason -> calls that ran peft's own forward for it.
        layers: dotted name of a layer -> its own calls: the reason, "" for fused -> how many.
        traced: dotted name of a layer -> how its calls were traced into compiled graphs, alike.
            How often such a graph then runs is not counted: the count would be a guard of it.
            Blocks compiled one by one share a graph, which is traced in one of them.

    Calls of layers that have no fused form are not counted.
    """

    fused: int
    fallback: dict[str, int]
    layers: dict[str, dict[str, int]]
    traced: dict[str, dict[str, int]]

    def __str__(self) -> str:
        lines = [f"{self.fused} calls ran fused, {sum(self.fallback.values())} did not"]
        lines += (f"  {why}: {n}" for why, n in self.fallback.items())
        traces: dict[str, int] = {}
        for reason in (reason for found in self.traced.values() for reason in found):
            traces[reason] = traces.get(reason, 0) + 1
        if traces:
            fused = traces.pop(FUSED, 0)
            lines.append(
                f"calls of compiled graphs are not counted: {fused} layers were traced fused, "
                f"{sum(traces.values())} as peft's own"
            )
            lines += (f"  {why}: {n}" for why, n in traces.items())
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Let the LoRA layers of a PeftModel, or of any module that holds some, run fused, in place.

    An optimiser made before still trains them, checkpoints keep their keys. Calling it again is
    harmless, and takes over layers that a later adapter has added. `restore` undoes it.

    Raises TypeError when model is no module and ValueError when it holds no LoRA layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    fused, fallback, at_each_call = [], {}, {}
    for name, layer in _lora_layers(model):
        reason = _fuse(layer)
        if reason is None:
            fused.append(name)
        elif isinstance(reason, Undecided):
            at_each_call[name] = str(reason)
        else:
            fallback[name] = reason
    if not fused and not fallback and not at_each_call:
        raise ValueError(
            f"model must hold LoRA layers of peft (get_peft_model or add_adapter makes them), got "
            f"a {type(model).__name__} without any"
        )
    return Report(tuple(fused), fallback, at_each_call)


def stats(model: nn.Module, *, reset: bool = False) -> Stats:
    """How the calls of an accelerated model's LoRA layers ran; reset starts the counts anew.

    Counting takes a tenth of a microsecond a call and no lock: threads in one layer at the same
    moment may lose a count.
    """
    layers: dict[str, dict[str, int]] = {}
    traced: dict[str, dict[str, int]] = {}
    fallback: dict[str, int] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, FusedLayer):
            continue
        layers[name], traces = layer.counts(reset=reset)
        if traces:
            traced[name] = traces
        for reason, calls in layers[name].items():
            if reason != FUSED:
                fallback[reason] = fallback.get(reason, 0) + calls
    fused = sum(counts.get(FUSED, 0) for counts in layers.values())
    return Stats(fused, fallback, layers, traced)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every layer is peft's own again, with the weights that it has now.

    Gates and adapter names that were set on the model are gone.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    set_on(model, dict.fromkeys(layers, Binding(None)))
    for layer in layers:
        release(layer)
        layer.counts(reset=True)
        restore_xlora(layer)
        layer.__class__ = layer.stock()  # type: ignore[assignment]


def enable_peft() -> None:
    """Let every LoRA layer that peft makes from now on run fused.

    That covers get_peft_model, loading, and transformers' add_adapter and load_adapter. Which layer
    a module gets stays peft's decision: only those that `accelerate` takes are taken over.
    `disable_peft` undoes it.
    """
    stock = LoraModel._create_new_module
    if hasattr(stock, "_fedms_stock"):
        return

    @functools.wraps(stock)
    def create_new_module(*args: Any, **kwargs: Any) -> nn.Module:
        module = stock(*args, **kwargs)
        fused = _fused_class(type(module))
        if fused is not None:
            module.__class__ = fused
        return module

    create_new_module._fedms_stock = stock  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)


def disable_peft() -> None:
    """Undo `enable_peft` for the models made from now on; `restore` is for those made before."""
    stock = getattr(LoraModel._create_new_module, "_fedms_stock", None)
    if stock is not None:
        LoraModel._create_new_module = staticmethod(stock)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Every LoRA layer whose forward is called, by dotted name."""
    never_called = {
        id(module.base_layer.out_proj)  # its parent merges its delta and calls a function
        for module in model.modules()
        if isinstance(module, MultiheadAttention)
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and id(module) not in never_called:
            yield name, module


def _fused_class(stock: type) -> type[FusedLayer] | None:
    """The fused form of peft's class, where there is one."""
    if stock is Linear:
        return FusedLinear
    if stock.__module__ in ("peft.tuners.lora.bnb", "peft.tuners.lora.torchao"):
        from fedms.peft import quantized  # brings bitsandbytes in, which is loaded then

        return quantized.FUSED.get(stock)
    return None


def _fuse(layer: LoraLayer) -> str | None:
    """Change the layer's class where that is possible. Why its calls do not run fused, or None."""
    fused = _fused_class(type(layer))
    if fused is not None:
        layer.__class__ = fused  # type: ignore[assignment]
    fuse_xlora(layer)  # type: ignore[arg-type]  # a LoraLayer is a module too
    return why_not_taken(layer) or why_not_fused(layer)  # type: ignore[arg-type]
