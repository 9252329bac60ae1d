"""peft's LoRA linears with one fused op in place of their chain of products.

`FusedLayer` overrides `forward` and nothing that holds state: parameters, merging, saving,
hot-swapping and variants stay peft's own code. `why_not_fused` decides on every call, because all
of that changes under a live model, and can say why a call goes to peft's own forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fedms.kernels import gated_lora_linear
from fedms.peft.binding import Gateable, routing_of
from fedms.peft.routing import AdapterRouting

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Adapters(NamedTuple):
    """What a fused call computes: the adapters in use, in order, as they are now."""

    names: list[str]
    A: list[Tensor]
    B: list[Tensor]
    scaling: list[float | Tensor]
    dropout_p: float


class FusedLayer(Gateable, nn.Module, LoraLayer):
    """A layer of peft whose forward is `gated_lora_linear` where it can be.

    Subclasses name peft's class as their second base: `class FusedLinear(FusedLayer, Linear)`.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> [..., out] in the base result's dtype, as peft gives it.

        Raises RuntimeError when gates are set and the call cannot be fused: peft's own forward
        would leave them out.
        """
        routing = routing_of(self)
        found = _read(self, routing, x, args, kwargs)
        if isinstance(found, Adapters):
            return self._fused(x, routing, found)
        if routing is not None and not self.disable_adapters:
            raise RuntimeError(
                f"gates or adapter names are set on this layer, but it cannot run fused: {found}; "
                f"clear them with set_gates(model, None)"
            )
        return super().forward(x, *args, **kwargs)

    def _fused(self, x: Tensor, routing: AdapterRouting | None, adapters: Adapters) -> Tensor:
        names, A, B, scaling, dropout_p = adapters
        gates = expert_idxs = segments = None
        if routing is not None:
            gates, expert_idxs, segments = routing.fit(x, names)
        base = cast(nn.Module, self._modules["base_layer"])
        if not names:
            return base(x)
        if any(isinstance(scale, Tensor) for scale in scaling):
            # hot-swapping keeps scales in tensors, and reading their values would split a compiled
            # graph: they act as gates of the layer
            scales = torch.stack([torch.as_tensor(scale, device=x.device) for scale in scaling])
            if expert_idxs is not None:
                scales = scales[expert_idxs]
            gates = scales if gates is None else gates * scales
            scaling = None
        plain = _plain_base(base, x)
        return gated_lora_linear(
            x,
            cast(Tensor, base.weight) if plain else base,
            A,
            B,
            bias=cast("Tensor | None", base.bias) if plain else None,
            scaling=cast("list[float] | None", scaling),
            gates=gates,
            expert_idxs=expert_idxs,
            segments=segments,
            dropout_p=dropout_p,
        )

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
    found = _read(layer, routing, x, args, kwargs)
    return found if isinstance(found, str) else None


def _read(
    layer: Linear | FusedLayer,
    routing: AdapterRouting | None,
    x: Any,
    args: Iterable[Any],
    kwargs: dict[str, Any] | None,
) -> Adapters | str:
    """The layer's adapters in use, or why this call cannot be fused."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "the model is being traced"
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged"
    if args or kwargs:
        return f"the call has more arguments than x: {[*map(type, args), *(kwargs or ())]}"
    if not layer.cast_input_dtype_enabled:
        return "casting of the input is switched off"
    there = cast(nn.Module, layer._modules["lora_A"])._modules
    if routing is not None:
        names = routing.named(there)
    else:
        names = [name for name in layer.active_adapters if name in there]
        if not names:
            return "no active adapter"
    found = _read_adapters(layer, names)
    if isinstance(found, str) or x is None:
        return found
    reason = _why_not_input(x)
    if reason is None and torch.compiler.is_compiling():
        reason = _why_not_compiled(found)
    return found if reason is None else reason


def _read_adapters(layer: Linear | FusedLayer, names: list[str]) -> Adapters | str:
    if _has_any_global_hook():
        return "global module hooks are registered"
    # `layer.lora_A[name].weight` is three searches by nn.Module.__getattr__: too slow for what
    # every call does several times an adapter
    modules = layer._modules
    all_A, all_B, dropouts = (
        cast(nn.Module, modules[key])._modules for key in ("lora_A", "lora_B", "lora_dropout")
    )
    found = Adapters(names, [], [], [], 0.0)
    dtype = p = None
    for name in names:
        if name in layer.lora_variant:
            return f"adapter {name!r} is a variant ({type(layer.lora_variant[name]).__name__})"
        A, B, dropout = all_A[name], all_B[name], cast(nn.Module, dropouts[name])
        if type(A) is not nn.Linear or type(B) is not nn.Linear or A.bias is not None:
            return f"adapter {name!r} is made of {type(A).__name__} and {type(B).__name__}"
        if B.bias is not None:
            return f"adapter {name!r} has a bias (lora_bias)"
        if type(dropout) not in (nn.Identity, nn.Dropout):
            return f"adapter {name!r} drops out with {type(dropout).__name__}"
        if not (_unobserved(A) and _unobserved(B) and _unobserved(dropout)):
            return f"a module of adapter {name!r} has hooks or a forward of its own"
        weights = _weight(A), _weight(B)
        for weight in weights:
            if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _FLOATS:
                return f"a weight of adapter {name!r} is a {type(weight).__name__} {weight.dtype}"
            if weight.is_meta or not weight.numel():
                return f"a weight of adapter {name!r} has no data here"
            if dtype is not None and weight.dtype != dtype:
                return f"the adapters mix {dtype} and {weight.dtype}"
            dtype = weight.dtype
        scale = layer.scaling[name]
        if isinstance(scale, Tensor) and scale.dim():
            return f"the scaling of adapter {name!r} is no scalar"
        if p is not None and p != _dropout_p(dropout):
            return "the adapters have different dropout"
        p = _dropout_p(dropout)
        found.A.append(weights[0])
        found.B.append(weights[1])
        found.scaling.append(scale)
    if p is not None and p >= 1.0:
        return "dropout is 1"
    return found._replace(dropout_p=p) if p else found


def _why_not_compiled(adapters: Adapters) -> str | None:
    if adapters.dropout_p:
        return "dropout under torch.compile (its seed is a number, which would split the graph)"
    if torch.compiler.is_exporting():
        return "torch.export, whose programs should hold no op that only fedms knows"
    return None


def _weight(linear: nn.Module) -> Tensor:
    """`linear.weight`, at once where it is a parameter."""
    weight = linear._parameters.get("weight")
    return cast(Tensor, linear.weight) if weight is None else weight


def _why_not_input(x: Any) -> str | None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
        return f"the input is a {type(x).__name__} {getattr(x, 'dtype', '')}".rstrip()
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    return None


def _dropout_p(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _unobserved(module: nn.Module) -> bool:
    """True when nobody would notice that the module is not called."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _plain_base(base: nn.Module, x: Tensor) -> bool:
    """True when the base's result is `F.linear(x, base.weight, base.bias)` and nothing else."""
    if type(base) is not nn.Linear or not _unobserved(base):
        return False
    weight = _weight(base)
    if type(weight) not in (nn.Parameter, Tensor) or weight.device != x.device:
        return False
    return weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
