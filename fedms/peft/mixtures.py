"""peft's own mixtures of LoRA on the op: X-LoRA's scalings and Arrow's routing become gates.

X-LoRA (arXiv 2402.07148) multiplies each adapter's input by a scaling a token, layer and adapter
that its classifier gives; peft computes all adapters, also those that top-k has set to zero. Arrow
(arXiv 2405.11157) weights the k adapters whose first right singular vectors are nearest the token;
peft forms every adapter's output, [tokens, E, out]. Here only listed pairs are computed.

Shape suffixes: B samples, T tokens, L layers, E adapters.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import ArrowLinearVariant
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn

from fedms.peft.adapters import Adapters, read
from fedms.peft.routing import AdapterRouting, Gates


class FusedXLora(XLoraLinearLayer):
    """An `XLoraLinearLayer`, which stands in for a layer's forward, on the op where it can be."""

    def forward(
        self, x: Tensor, *args: Any, scalings: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """x [B, T, in], scalings [B, T, L, E] or None for all adapters ungated -> [B, T, out]."""
        target: Any = self.target
        routing = None
        if scalings is not None:
            gates, idxs = self._gates(scalings)
            # peft scales what enters A: a bias of B comes after that, also that of an adapter
            # which the token does not pick
            weight = self.config.global_scaling_weight
            names = tuple(target.active_adapters)
            routing = AdapterRouting(names, gates, idxs, bias_gate=weight)
        # the layer's own switch is off in X-LoRA's scaling pass, where this forward ignores it
        found = read(target, routing, x, args, kwargs, disabled=self.adapters_disabled)
        if isinstance(found, Adapters):
            return target.fused(x, routing, found).to(x.dtype)
        target.count(found)
        return super().forward(x, *args, scalings=scalings, **kwargs)

    def _gates(self, scalings: Tensor) -> tuple[Tensor, Tensor | None]:
        """This layer's gates [B, T, E], or those that top-k lists and their indices [B, T, k]."""
        gates, idxs = scalings[:, :, self.layer_number, :], None
        if self.config.top_k_lora is not None:
            gates, idxs = gates.topk(self.config.top_k_lora, dim=-1)
        if self.config.enable_softmax_topk:  # over those that are not zero
            zero = gates == 0
            gates = gates.masked_fill(zero, -torch.inf).softmax(-1).masked_fill(zero, 0.0)
        return gates * self.config.global_scaling_weight, idxs


def fuse_xlora(layer: nn.Module) -> bool:
    """Let X-LoRA's forward on this layer run fused; whether the layer has one."""
    return _swap_xlora(layer, XLoraLinearLayer, FusedXLora)


def restore_xlora(layer: nn.Module) -> None:
    """Undo `fuse_xlora`."""
    _swap_xlora(layer, FusedXLora, XLoraLinearLayer)


def gated_by_xlora(layer: nn.Module) -> bool:
    """Whether X-LoRA's forward on this layer runs fused."""
    return isinstance(getattr(vars(layer).get("forward"), "__self__", None), FusedXLora)


def _swap_xlora(layer: nn.Module, old: type, new: type) -> bool:
    stand_in: Any = getattr(vars(layer).get("forward"), "__self__", None)
    if type(stand_in) is old:
        stand_in.__class__ = new
        layer.forward = stand_in.forward
    return isinstance(stand_in, XLoraLinearLayer)


def arrow_routing(layer: LoraLayer) -> AdapterRouting | None:
    """What Arrow's router means where it is the layer's one active adapter, else None.

    peft multiplies by the task adapters' factors alone, without their dropout and bias. Dropout of
    the router's own, which it applies to what they add, leaves the call to peft.
    """
    if len(layer.active_adapters) != 1 or layer.disable_adapters:
        return None
    name = layer.active_adapters[0]
    if not isinstance(layer.lora_variant.get(name), ArrowLinearVariant):
        return None
    dropout = layer.lora_dropout[name]
    if dropout.training and isinstance(dropout, nn.Dropout):
        return None
    arrow = cast(Any, layer).lora_arrow[name]

    def gates(x: Tensor) -> Gates:
        # peft's layer does the same before each forward: both keep what they have done
        arrow.gen_know_sub(layer.lora_A, layer.lora_B)
        arrow.build_prototypes(layer.lora_A, layer.lora_B)
        similarity = (x.to(arrow.prototypes.dtype) @ arrow.prototypes.T).abs()
        best, idxs = similarity.topk(arrow.top_k, dim=-1)
        return (best / arrow.temperature).softmax(-1), idxs

    return AdapterRouting(tuple(arrow.task_adapter_names), gates, factors_only=True)
