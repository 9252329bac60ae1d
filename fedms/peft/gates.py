"""Gates for the adapters of an accelerated model, and an adapter per sample, in training too.

Both are set for a whole model and read by every fused layer: `set_gates` and `set_adapter_names`
until they are cleared, by every thread; `gated` and `mixed_adapters` for the calls that the thread
makes in a `with` block. The backward pass may run after it, or after the next `set_gates`:
activation checkpointing recomputes with the gates that the forward had. They name the adapters that
take part themselves, whatever peft's active adapters are, and leave `requires_grad` alone: an
adapter that was frozen takes part frozen.

In transformers' `generate` rows follow their samples, and tokens after the last one that has gates
take that one's (fedms.peft.generation).

Shape suffixes: B samples, T tokens, E adapters, k adapters a token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from fedms.peft.binding import Binding, Gateable, bound_on, set_on
from fedms.peft.layer import FusedLayer, why_not_taken
from fedms.peft.mixtures import gated_by_xlora
from fedms.peft.routing import AdapterRouting, Gates, of_samples, split_gates

LayerGates = Gates | Callable[[Tensor], Gates]


def set_gates(
    model: nn.Module,
    gates: LayerGates | Mapping[str, LayerGates] | None,
    *,
    adapters: Sequence[str] | None = None,
) -> None:
    """Gate the adapters of an accelerated model from now on; None without adapters clears.

    gates: a floating tensor, differentiable: [E], one row a sample [B, E] or a token [B, T, E]. A
        pair (gates, expert_idxs), each [B, k] or [B, T, k], computes only the listed adapters. A
        function of a layer's input gives either. A mapping from layer names (as `accelerate`
        reports them, or endings of names) gates those layers one by one and no other. None with
        adapters: these take part, ungated (an empty list: none).
    adapters: the E names that the gates count; None: the model's active adapters, in order.

    Raises TypeError or ValueError when the model is not accelerated, an adapter is on no layer, the
    number of gates is not E, an adapter also sits on a layer that cannot be gated, or X-LoRA gates
    the model.
    """
    set_on(model, gate_bindings(model, gates, adapters))


@contextmanager
def gated(
    model: nn.Module,
    gates: LayerGates | Mapping[str, LayerGates] | None,
    *,
    adapters: Sequence[str] | None = None,
) -> Iterator[None]:
    """`set_gates` for the calls that this thread makes in the block.

    Blocks nest; None without adapters is a block without gates. Nothing of it stays on the model,
    and a copy of the model that is made inside has no gates of it.
    """
    with bound_on(model, gate_bindings(model, gates, adapters)):
        yield


def set_adapter_names(model: nn.Module, names: Sequence[str | Sequence[str]] | None) -> None:
    """Give each sample adapters of its own from now on, in training as in evaluation; None clears.

    names: for each of the B samples an adapter's name, "__base__" for none, or several names. Only
        these are computed on the sample's rows, and an adapter without samples gets no gradient.
        Samples of one adapter are best put side by side: they are one segment then.

    Raises ValueError when the model is not accelerated, an adapter is on no layer or on one that
    cannot be gated, or X-LoRA gates the model.
    """
    set_on(model, _name_bindings(model, names))


@contextmanager
def mixed_adapters(model: nn.Module, names: Sequence[str | Sequence[str]]) -> Iterator[None]:
    """`set_adapter_names` for the calls that this thread makes in the block, as `gated` does it."""
    with bound_on(model, _name_bindings(model, names)):
        yield


def gate_bindings(
    model: nn.Module,
    gates: LayerGates | Mapping[str, LayerGates] | None,
    adapters: Sequence[str] | None,
) -> dict[Gateable, Binding]:
    """What each fused layer of the model gets; layers that gates by layer leave out get none."""
    layers = _fused_layers(model)
    ungated = Binding(None)
    if gates is None and adapters is None:
        return dict.fromkeys(layers.values(), ungated)
    if isinstance(gates, Mapping):
        chosen = _by_layer(layers, gates)
    else:
        _check_all_gateable(model, _active(layers) if adapters is None else adapters)
        chosen = dict.fromkeys(layers, gates)
    if adapters is None:
        adapters = _active({name: layers[name] for name in chosen})
    names = tuple(adapters)
    _check_known(layers, names)
    _warn_of_frozen(model, layers, names)
    routings = {id(value): _routing(value, names) for value in chosen.values()}
    return {
        **dict.fromkeys(layers.values(), ungated),
        **_bound({layers[name]: routings[id(value)] for name, value in chosen.items()}),
    }


def _bound(routings: Mapping[FusedLayer, AdapterRouting]) -> dict[Gateable, Binding]:
    """Bindings to these routings, one for all layers that have the same of its adapters."""
    shared: dict[tuple[AdapterRouting, tuple[str, ...]], Binding] = {}
    bindings: dict[Gateable, Binding] = {}
    for layer, routing in routings.items():
        if gated_by_xlora(layer):
            raise ValueError(
                "gates and adapter names must be for layers that nothing else gates, got a model "
                "whose X-LoRA classifier gates them in each forward"
            )
        held = tuple(routing.named(layer.lora_A))
        if (routing, held) not in shared:
            shared[routing, held] = Binding(routing, held=held)
        bindings[layer] = shared[routing, held]
    return bindings


def _name_bindings(
    model: nn.Module, names: Sequence[str | Sequence[str]] | None
) -> dict[Gateable, Binding]:
    layers = _fused_layers(model)
    if names is None:
        return dict.fromkeys(layers.values(), Binding(None))
    _check_known(layers, of_samples(names).adapters)
    # in the layers' order, so that a compiled graph depends on who is listed, not on who is first
    order = dict.fromkeys(name for layer in layers.values() for name in layer.lora_A)
    routing = of_samples(names, order=[*order])
    _check_all_gateable(model, routing.adapters)
    _warn_of_frozen(model, layers, routing.adapters)
    return _bound(dict.fromkeys(layers.values(), routing))


def _routing(gates: LayerGates | None, names: tuple[str, ...]) -> AdapterRouting:
    if gates is None or (callable(gates) and not isinstance(gates, Tensor)):
        return AdapterRouting(names, gates)
    values, idxs = split_gates(gates)
    if idxs is None and (not values.dim() or values.shape[-1] != len(names)):
        raise ValueError(
            f"gates must have one column for each of the adapters {list(names)}, got "
            f"{list(values.shape)}"
        )
    return AdapterRouting(names, values, idxs)


def _fused_layers(model: nn.Module) -> dict[str, FusedLayer]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FusedLayer)}
    if not layers:
        why = {why_not_taken(m) for m in model.modules() if isinstance(m, LoraLayer)}
        raise ValueError(
            f"model must have fused layers (fedms.accelerate(model) makes them), got a "
            f"{type(model).__name__} without any"
            + "".join(f"; {reason}" for reason in sorted(filter(None, why)))
        )
    return layers


def _active(layers: Mapping[str, FusedLayer]) -> list[str]:
    """The active adapters, which all layers must agree on."""
    found = {tuple(layer.active_adapters) for layer in layers.values()}
    if len(found) != 1:
        raise ValueError(f"adapters must be given: the layers' active adapters differ: {found}")
    return list(found.pop())


def _check_known(layers: Mapping[str, FusedLayer], names: Sequence[str]) -> None:
    there = {name for layer in layers.values() for name in layer.lora_A}
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ValueError(f"adapters must be among {sorted(there)}, got {unknown}")
    if len(set(names)) != len(names):
        raise ValueError(f"adapters must be distinct, got {list(names)}")


# model -> gated adapters that were named in a warning
_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _warn_of_frozen(
    model: nn.Module, layers: Mapping[str, FusedLayer], names: Sequence[str]
) -> None:
    """Name, once, the adapters that will not learn as nobody has made them trainable.

    peft freezes an adapter that is added while another is active. One that is active and frozen,
    or loaded for inference, is meant to be, and where no adapter learns none is missed.
    """
    if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    holding = {name: layer for layer in layers.values() for name in layer.lora_A}
    trained = {
        name
        for name in names
        if any(p.requires_grad for p in holding[name].lora_A[name].parameters())
    }
    configs, warned = getattr(model, "peft_config", {}), _WARNED.setdefault(model, set())
    forgotten = [
        name
        for name in names
        if name not in trained | warned | {*holding[name].active_adapters}
        and not _for_inference(configs.get(name))
    ]
    if forgotten and trained:
        warned.update(forgotten)
        warnings.warn(
            f"adapters {forgotten} are gated but frozen, as peft's add_adapter leaves them, so "
            f"they get no gradient; model.set_requires_grad({forgotten}) lets them learn",
            stacklevel=5,
        )


def _for_inference(config: object) -> bool:
    return bool(getattr(config, "inference_mode", False))


def _check_all_gateable(model: nn.Module, names: Sequence[str]) -> None:
    """No adapter may also act where gates do not reach: that part would go on ungated."""
    for where, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        held = [n for n in names if n in module.lora_A or n in module.lora_embedding_A]
        reason = why_not_taken(module) or (
            None if isinstance(module, FusedLayer) else "fedms.accelerate was not called since"
        )
        if held and reason is not None:
            raise ValueError(
                f"gates reach fused layers only, but {where} ({type(module).__name__}) also holds "
                f"{held}: {reason}; name the layers to gate in a mapping to leave it ungated"
            )


def _by_layer(
    layers: Mapping[str, FusedLayer], gates: Mapping[str, LayerGates]
) -> dict[str, LayerGates]:
    if not gates:
        raise ValueError(f"gates must name at least one layer ({_some(layers)}), got {dict(gates)}")
    chosen: dict[str, LayerGates] = {}
    for key, value in gates.items():
        # a name is that layer alone, even where it is the ending of another's
        found = [key] if key in layers else [n for n in layers if n.endswith(f".{key}")]
        if not found:
            raise ValueError(f"gates must name fused layers ({_some(layers)}), got {key!r}")
        for name in found:
            if name in chosen:
                raise ValueError(f"gates must name each layer once, got {name!r} twice")
            chosen[name] = value
    return chosen


def _some(names: Mapping[str, object]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")
