"""peft's LoRA linears with one fused op in place of their chain of products.

`FusedLayer` overrides `forward` and nothing that holds state: parameters, merging, saving,
hot-swapping and variants stay peft's own code. `fedms.peft.adapters` decides on every call, because
all of that changes under a live model, and says why a call goes to peft's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from fedms.kernels import gated_lora_linear
from fedms.peft.adapters import Adapters, held, plain, read, unobserved
from fedms.peft.binding import Gateable, routing_of
from fedms.peft.compiled import watched
from fedms.peft.mixtures import arrow_routing, gated_by_xlora
from fedms.peft.routing import AdapterRouting, of_samples

FUSED = ""  # among reasons in a layer's counts: none

Base = Tensor | Callable[[Tensor], Tensor]


class FusedLayer(Gateable, nn.Module, LoraLayer):
    """A layer of peft whose forward is `gated_lora_linear` where it can be.

    Subclasses name peft's class as their second base: `class FusedLinear(FusedLayer, Linear)`.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out] in the base result's dtype, as peft gives it.

        Raises RuntimeError when gates are set and the call cannot be fused: peft's own forward
        would leave them out.
        """
        routing, disabled = routing_of(self), self.disable_adapters
        if routing is not None and torch.compiler.is_compiling():
            routing, x = watched(routing, x)
        if kwargs or self.lora_variant:
            own, rest = self._own_routing(x, routing, kwargs)
            found = read(self, own, x, args, rest, disabled=disabled)
            routing = own if isinstance(found, Adapters) else routing
        else:
            found = read(self, routing, x, args, kwargs, disabled=disabled)
        if isinstance(found, Adapters):
            return self.fused(x, routing, found)
        if routing is not None and not disabled:
            raise RuntimeError(
                f"gates or adapter names are set on this layer, but it cannot run fused: {found}; "
                f"clear them with set_gates(model, None)"
            )
        self.count(found)
        return super().forward(x, *args, **kwargs)

    def _own_routing(
        self, x: Tensor, routing: AdapterRouting | None, kwargs: dict[str, Any]
    ) -> tuple[AdapterRouting | None, dict[str, Any]]:
        """A routing that peft's own arguments or adapters mean, and the arguments that are left."""
        if routing is not None:
            return routing, kwargs
        names = kwargs.get("adapter_names")
        if names is not None and len(kwargs) == 1 and not self.training and len(names) == len(x):
            return of_samples(names), {}
        if not kwargs:
            return arrow_routing(self), kwargs
        return None, kwargs

    def fused(self, x: Tensor, routing: AdapterRouting | None, adapters: Adapters) -> Tensor:
        """The base layer's result and the adapters', by the op."""
        self.count(FUSED)
        base: Any = self._modules["base_layer"]
        if not adapters.names:
            return base(x)
        weight, bias = _plain_weight(base, x), None
        if weight is None:
            weight = base
        else:
            bias = held(base, "bias")
        dropouts = adapters.dropouts
        if not adapters.biases and dropouts.count(dropouts[0]) == len(dropouts):
            return _op(x, weight, bias, routing, adapters)
        # adapters with a dropout of their own each take a call; the first holds the base layer
        if routing is not None:
            routing = routing.resolved(x)
        first, *others = [adapters.only(p) for p in dict.fromkeys(dropouts)]
        y = _op(x, weight, bias, routing, first)
        for part in others:
            y = _add(y, x, routing, part)
        return y if not adapters.biases else _with_biases(y, x, routing, adapters)

    def count(self, reason: str) -> None:
        """Count a call for `fedms.stats`: FUSED, or why it was peft's own.

        In a compiled graph, which a count would guard, only that it was traced, when it is.
        """
        if torch.compiler.is_compiling():
            self._count_trace(reason)
            return
        counts = vars(self).setdefault("_fedms_counts", {})
        counts[reason] = counts.get(reason, 0) + 1

    @torch.compiler.assume_constant_result  # so it runs when the call is traced, and only then
    def _count_trace(self, reason: str) -> bool:
        traces = vars(self).setdefault("_fedms_traces", {})
        traces[reason] = traces.get(reason, 0) + 1
        return True

    def counts(self, *, reset: bool = False) -> tuple[dict[str, int], dict[str, int]]:
        """Calls, and calls that were traced, so far by reason, FUSED or why not."""
        held = vars(self)
        calls, traces = (dict(held.get(key, {})) for key in ("_fedms_counts", "_fedms_traces"))
        if reset:
            held.pop("_fedms_counts", None)
            held.pop("_fedms_traces", None)
        return calls, traces

    @classmethod
    def stock(cls) -> type[LoraLayer]:
        """peft's own class, of which this one is the fused form."""
        return cls.__bases__[1]

    def _get_name(self) -> str:
        return self.stock().__name__  # repr and peft's layer status go on saying what they said


class FusedLinear(FusedLayer, Linear):
    """A `peft.tuners.lora.layer.Linear` with a fused forward."""


def why_not_fused(
    layer: Linear | FusedLayer,
    x: Any = None,
    args: Iterable[Any] = (),
    kwargs: dict[str, Any] | None = None,
) -> str | None:
    """Why this call goes to peft's own forward; None when it is fused.

    x None: whether the layer can run fused at all, whatever the input.
    """
    routing = routing_of(layer) if isinstance(layer, FusedLayer) else None
    if routing is None and not kwargs:
        routing = arrow_routing(layer)
    found = read(layer, routing, x, args, kwargs, disabled=layer.disable_adapters)
    return found if isinstance(found, str) else None


def why_not_taken(layer: LoraLayer) -> str | None:
    """Why calls of a LoRA layer do not reach a fused forward, whatever its adapters are."""
    if not isinstance(layer, FusedLayer | Linear):
        return f"{type(layer).__module__}.{type(layer).__qualname__} has no fused form"
    if "forward" in vars(layer) and not gated_by_xlora(layer):
        return "its forward was replaced on the instance (X-LoRA, hooks of accelerate)"
    return None


def _op(
    x: Tensor, weight: Base, bias: Tensor | None, routing: AdapterRouting | None, adapters: Adapters
) -> Tensor:
    """The op on adapters of one dropout."""
    names, A, B, scaling, dropouts, _ = adapters
    gates = expert_idxs = segments = None
    if routing is not None:
        gates, expert_idxs, segments = routing.fit(x, names)
    if any(map(torch.is_tensor, scaling)):
        # hot-swapping keeps scales in tensors, and reading their values would split a compiled
        # graph: they act as gates of the layer
        scales = _stack([torch.as_tensor(scale, device=x.device) for scale in scaling])
        if expert_idxs is not None:
            scales = scales[expert_idxs.clamp(0, len(names) - 1)]  # the op refuses others
        gates = scales if gates is None else gates * scales
        scaling = None
    return gated_lora_linear(
        x,
        weight,
        A,
        B,
        bias=bias,
        scaling=cast("list[float] | None", scaling),
        gates=gates,
        expert_idxs=expert_idxs,
        segments=segments,
        dropout_p=dropouts[0],
    )


def _add(y: Tensor, x: Tensor, routing: AdapterRouting | None, adapters: Adapters) -> Tensor:
    """y plus what the adapters add."""
    return _op(x, lambda _: y, None, routing, adapters)


def _with_biases(
    y: Tensor, x: Tensor, routing: AdapterRouting | None, adapters: Adapters
) -> Tensor:
    """y plus each adapter's lora_bias, scaled, and gated as its product is or by `bias_gate`."""
    held = [i for i, bias in enumerate(adapters.biases) if bias is not None]
    biases = _stack([adapters.biases[i] * adapters.scaling[i] for i in held])  # type: ignore[operator]
    weights = None
    if routing is not None and routing.bias_gate is not None:
        biases = biases * routing.bias_gate
    elif routing is not None:
        weights = routing.weights(x, adapters.names)
    added = biases.sum(0) if weights is None else weights[..., held].to(biases.dtype) @ biases
    return (y + added).to(y.dtype)


def _stack(parts: list[Tensor]) -> Tensor:
    """torch.stack, under autocast too, where it takes no 16-bit type but autocast's own."""
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.stack(parts)


def _plain_weight(base: nn.Module, x: Tensor) -> Tensor | None:
    """The base's weight where its result is `F.linear(x, base.weight, base.bias)` and no more."""
    if type(base) is not nn.Linear or not unobserved(base):
        return None
    weight = held(base, "weight")
    if not plain(weight) or weight.device != x.device:
        return None
    if weight.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    return weight
