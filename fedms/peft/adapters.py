"""What a fused call of a peft layer computes, read anew on every call, or why it cannot be fused.

Anything about a live model may have changed since the last call: what is merged, which adapters are
active, what their factors are made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fedms.peft.routing import AdapterRouting
from fedms.peft.sharded import gathered, is_unit

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (nn.Parameter, Tensor)


class Adapters(NamedTuple):
    """What a fused call computes: the adapters in use, in order, as they are now.

    dropouts: each adapter's probability, 0 in evaluation. biases: each adapter's `lora_bias`, empty
    where none has one.
    """

    names: list[str]
    A: list[Tensor]
    B: list[Tensor]
    scaling: list[float | Tensor]
    dropouts: list[float]
    biases: list[Tensor | None]

    def only(self, p: float) -> Adapters:
        """Those with dropout p, without their biases."""
        keep = [i for i, own in enumerate(self.dropouts) if own == p]
        parts = [[part[i] for i in keep] for part in self[:5]]
        return Adapters(*parts, biases=[])  # type: ignore[arg-type]

    def factors(self) -> Adapters:
        """Without their dropouts and biases."""
        return self._replace(dropouts=[0.0] * len(self.names), biases=[])


class Undecided(str):
    """A reason that says nothing about the calls to come."""

    __slots__ = ()


def read(
    layer: LoraLayer,
    routing: AdapterRouting | None,
    x: Any,
    args: Iterable[Any],
    kwargs: dict[str, Any] | None,
    *,
    disabled: bool,
) -> Adapters | str:
    """The layer's adapters in use, or why this call cannot be fused.

    x None: whether the layer can run fused at all, whatever the input.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "the model is being traced"
    if disabled:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged"
    if args or kwargs:
        return f"the call has more arguments than x: {[*map(type, args), *(kwargs or ())]}"
    if not layer.cast_input_dtype_enabled:
        return "casting of the input is switched off"
    there: Any = layer._modules["lora_A"]._modules  # type: ignore[attr-defined]
    if routing is not None:
        names = routing.named(there)
    else:
        names = [name for name in layer.active_adapters if name in there]
        if not names:
            return Undecided("no active adapter")
    found = read_adapters(layer, names, called=x is not None)
    if isinstance(found, str) or x is None:
        return found
    if routing is not None and routing.factors_only:
        found = found.factors()
    return why_not_input(x) or found


def read_adapters(layer: LoraLayer, names: list[str], *, called: bool) -> Adapters | str:
    """The named adapters of the layer, or why the op cannot compute them.

    called: within a call of the layer, which can gather what FSDP has sharded.
    """
    if _has_any_global_hook():
        return "global module hooks are registered"
    # `layer.lora_A[name].weight` is three searches by nn.Module.__getattr__: too slow for what
    # every call does several times an adapter
    modules: Any = layer._modules  # type: ignore[attr-defined]
    all_A, all_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts, variants = modules["lora_dropout"]._modules, layer.lora_variant
    found = Adapters(names, [], [], [], [], [])
    dtype = None
    for name in names:
        if name in variants:
            return f"adapter {name!r} is a variant ({type(variants[name]).__name__})"
        A, B, dropout = all_A[name], all_B[name], dropouts[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear or held(A, "bias") is not None:
            if not (is_unit(A) and is_unit(B)):
                return f"adapter {name!r} is made of {type(A).__name__} and {type(B).__name__}"
            if not called:
                return Undecided(f"FSDP holds adapter {name!r} in units of its own")
            A, B = gathered(A), gathered(B)
        if type(dropout) is nn.Identity:
            p = 0.0
        elif type(dropout) is nn.Dropout:
            p = dropout.p if dropout.training else 0.0
        else:
            return f"adapter {name!r} drops out with {type(dropout).__name__}"
        if not (unobserved(A) and unobserved(B) and unobserved(dropout)):
            return f"a module of adapter {name!r} has hooks or a forward of its own"
        weights = held(A, "weight"), held(B, "weight")
        for weight in weights:
            own = weight.dtype
            if not plain(weight) or own not in _FLOATS:
                layout = "" if weight.layout is torch.strided else f" {weight.layout}"
                kind = f"a {type(weight).__name__} {own}{layout}"
                if hasattr(weight, "placements"):  # a DTensor, which FSDP2 gathers for the call
                    return Undecided(f"a weight of adapter {name!r} is sharded ({kind})")
                return f"a weight of adapter {name!r} is {kind}"
            if weight.is_meta or not weight.numel():
                return Undecided(f"a weight of adapter {name!r} has no data here")
            if own is not dtype:
                if dtype is not None:
                    return f"the adapters mix {dtype} and {own}"
                dtype = own
        scale = layer.scaling[name]
        if isinstance(scale, Tensor) and scale.dim():
            return f"the scaling of adapter {name!r} is no scalar"
        if p >= 1.0:
            return "dropout is 1"
        bias = held(B, "bias")
        if bias is not None or found.biases:
            found.biases.extend([None] * (len(found.A) - len(found.biases)))
            found.biases.append(bias)
        found.A.append(weights[0])
        found.B.append(weights[1])
        found.scaling.append(scale)
        found.dropouts.append(p)
    return found


def why_not_input(x: Any) -> str | None:
    """Why the op cannot take this input, or be called at all here."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
        return f"the input is a {type(x).__name__} {getattr(x, 'dtype', '')}".rstrip()
    if x.layout is not torch.strided or x.is_nested:
        return f"the input is {'nested' if x.is_nested else x.layout}"
    if torch.compiler.is_compiling() and _exporting():
        return "torch.export, whose programs should hold no op that only fedms knows"
    return None


@torch.compiler.assume_constant_result  # asked, not traced: torch 2.11 folds it to True in compile
def _exporting() -> bool:
    return torch.compiler.is_exporting()


def held(linear: nn.Module, name: str) -> Any:
    """The weight or bias of a linear, at once where it is a parameter or a None in its place."""
    parameters = linear._parameters
    return parameters[name] if name in parameters else getattr(linear, name)


def plain(tensor: Tensor) -> bool:
    """Whether it is a tensor like any other: strided, and of no subclass but nn.Parameter."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def unobserved(module: nn.Module) -> bool:
    """True when nobody would notice that the module is not called."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
