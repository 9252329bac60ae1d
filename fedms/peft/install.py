"""Put the fused forward on peft's LoRA layers, and take it off again.

Only the class of a layer changes: the module tree, the parameter objects, the state_dict keys and
everything a layer remembers stay the same objects.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import Linear, LoraLayer, MultiheadAttention
from peft.tuners.lora.model import LoraModel
from torch import nn

from fedms.peft.binding import Binding, set_on
from fedms.peft.layer import FusedLayer, FusedLinear, why_not_fused


@dataclass(frozen=True)
class Report:
    """What `accelerate` found.

    Attributes:
        fused: dotted names of the LoRA layers that now run fused.
        fallback: dotted name -> why that layer runs peft's own forward as things stand. A layer
            that was taken over is asked again on every call, so merging and unmerging, say, or
            disabling and enabling move it there and back.
    """

    fused: tuple[str, ...]
    fallback: dict[str, str]

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for name, reason in self.fallback.items():
            reasons.setdefault(reason, []).append(name)
        lines = [f"{len(self.fused)} LoRA layers run fused, {len(self.fallback)} do not"]
        lines += [f"  {reason}: {', '.join(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Let the LoRA layers of a PeftModel, or of any module that holds some, run fused, in place.

    An optimiser made before still trains them, checkpoints keep their keys. Calling it again is
    harmless, and takes over layers that a later adapter has added. `restore` undoes it.

    Raises TypeError when model is no module and ValueError when it holds no LoRA layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    fused, fallback = [], {}
    for name, layer in _lora_layers(model):
        reason = _fuse(layer)
        if reason is None:
            fused.append(name)
        else:
            fallback[name] = reason
    if not fused and not fallback:
        raise ValueError(
            f"model must hold LoRA layers of peft (get_peft_model or add_adapter makes them), got "
            f"a {type(model).__name__} without any"
        )
    return Report(tuple(fused), fallback)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every layer is peft's own again, with the weights that it has now.

    Gates and adapter names that were set on the model are gone.
    """
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    set_on(model, dict.fromkeys(layers, Binding(None)))
    for layer in layers:
        vars(layer).pop("_fedms_open", None)
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
    if not isinstance(layer, FusedLayer):
        return f"{type(layer).__module__}.{type(layer).__qualname__} has no fused form"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (X-LoRA, hooks of accelerate)"
    return why_not_fused(layer)
