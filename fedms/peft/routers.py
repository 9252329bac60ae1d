"""Routers that gate peft adapters by what a token is, and models that carry them.

Two forms known from the literature, over :func:`fedms.gated`:

    RoutedModel   X-LoRA (arXiv 2402.07148): one pass without adapters gives hidden states, one
                  router turns them into the gates of every layer
    LayerRouters  MoLA (arXiv 2402.08562): each layer routes by its own input

With top_k a router lists k adapters a token, and the op computes no other.
Shape suffixes: H width of the input, E adapters, k adapters a token.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from fedms.peft.binding import Binding, Gateable, bound_on
from fedms.peft.gates import gate_bindings, gated
from fedms.peft.generation import tokens_held
from fedms.peft.layer import FusedLayer
from fedms.peft.routing import Gates

# on a cache: how many of its layers are the model's, with those of the pass without adapters behind
_RIDING = "_fedms_riding"


class Router(nn.Module):
    """Softmax over adapters from a token's features, all of them or the best k.

    Args:
        in_features: H.
        num_adapters: E.
        top_k: None, or how many adapters a token uses. Their gates are scaled to sum to one; a
            single one keeps its softmax value, because a constant would teach the router nothing.
        hidden_features: None for one linear, or the width of a hidden layer between two.

    The last linear starts at zero, so that training begins at equal gates. With top_k its weight
    starts at random: ties would send every token to the first k adapters, and the others would
    never be listed.
    Raises ValueError when top_k is not in [1, E].
    """

    def __init__(
        self,
        in_features: int,
        num_adapters: int,
        *,
        top_k: int | None = None,
        hidden_features: int | None = None,
    ) -> None:
        super().__init__()
        if top_k is not None and not 1 <= top_k <= num_adapters:
            raise ValueError(f"top_k must be None or in [1, {num_adapters}], got {top_k}")
        self.top_k = top_k
        last = nn.Linear(hidden_features or in_features, num_adapters)
        nn.init.zeros_(last.bias)
        if top_k is None:
            nn.init.zeros_(last.weight)
        parts = [last]
        if hidden_features is not None:
            parts = [nn.Linear(in_features, hidden_features), nn.GELU(), last]
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., H] of any floating dtype -> gates [..., E], or (gates, expert_idxs) [..., k]."""
        dtype = next(self.parameters()).dtype
        gates = self.layers(x.to(dtype)).softmax(-1)
        if self.top_k is None:
            return gates
        best, idxs = gates.topk(self.top_k, dim=-1)
        return best if self.top_k == 1 else best / best.sum(-1, keepdim=True), idxs


class LayerRouters(nn.Module):
    """One router for each fused layer of a model, on the layer's own input.

    Args:
        model: an accelerated peft model.
        adapters: the names that the gates count.
        top_k: as in Router, for all layers.

    ``with fedms.gated(model, routers.gates(), adapters=routers.adapters):`` uses them.
    """

    def __init__(
        self, model: nn.Module, adapters: Sequence[str], *, top_k: int | None = None
    ) -> None:
        super().__init__()
        self.adapters = tuple(adapters)
        self.names: dict[str, str] = {}
        self.routers = nn.ModuleDict()
        for name, layer in model.named_modules():
            if not isinstance(layer, FusedLayer):
                continue
            key = name.replace(".", "/")  # a ModuleDict's keys have no dots
            self.names[name] = key
            assert layer.in_features is not None  # peft's annotation allows None for other layers
            router = Router(layer.in_features, len(self.adapters), top_k=top_k)
            self.routers[key] = router.to(next(layer.lora_A.parameters()).device)
        if not self.names:
            raise ValueError("model must have fused layers (fedms.accelerate(model) makes them)")

    def gates(self) -> Mapping[str, nn.Module]:
        """Layer name -> its router, as `fedms.gated` and `fedms.set_gates` take it."""
        return {name: self.routers[key] for name, key in self.names.items()}


class RoutedModel(nn.Module):
    """A peft model and a router that reads the hidden states of a pass without adapters.

    Args:
        model: an accelerated PeftModel whose forward takes `output_hidden_states`. The adapters
            keep their `requires_grad`: freeze them to train the router alone.
        router: [batch, tokens, H] -> gates or (gates, expert_idxs) over `adapters`.
        adapters: the names that the gates count.
    """

    def __init__(self, model: nn.Module, router: nn.Module, adapters: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.router = router
        self.adapters = tuple(adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with every adapter gated by the router, token by token."""

        def gate(gates: Gates) -> AbstractContextManager[None]:
            return gated(self.model, gates, adapters=self.adapters)

        return self._route(self.model, self._ungated(), gate, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the model, each token routed by the pass without adapters over all before.

        That pass has a cache of its own, of the same kind: its layers ride behind the model's in
        the one that `generate` keeps, so that beams, cropping and what else it does reach both.
        Calls are not compiled.
        """
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        ungated, latest = self._ungated(), []
        # looking for the layers takes as long as a token of a small model: once, not every token
        bindings = gate_bindings(self.model, lambda x: latest[-1], self.adapters)

        def gate(gates: Gates) -> AbstractContextManager[None]:
            latest[:] = [gates]
            return bound_on(self.model, bindings)

        def routed(*args: Any, **kwargs: Any) -> Any:
            return self._route(model, ungated, gate, args, kwargs)

        # A generating model that shares everything but its forward: nothing is put on the real
        # one, and threads do not meet.
        twin: Any = copy.copy(model)
        vars(twin).pop("_cache", None)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):  # they run on the real one
            setattr(twin, hooks, OrderedDict())
        twin.forward = functools.wraps(model.forward)(routed)
        return twin.generate(*args, **{"disable_compile": True, **kwargs})

    def _ungated(self) -> dict[Gateable, Binding]:
        # no adapter by gates: peft's disable_adapter would make frozen adapters trainable again
        return gate_bindings(self.model, None, ())

    def _route(
        self,
        model: nn.Module,
        ungated: Mapping[Gateable, Binding],
        gate: Callable[[Gates], AbstractContextManager[None]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One call of `model`: the pass without adapters, the router, the gated pass."""
        asked = {"labels": None, "output_hidden_states": True, "return_dict": True}
        name, cache = _cache_of(kwargs)
        own = {} if cache is None else {name: _second(cache)}
        with torch.no_grad(), bound_on(self.model, ungated):
            hidden = model(*args, **{**kwargs, **asked, **own}).hidden_states[-1]
        with gate(self.router(hidden)):
            output = model(*args, **kwargs)
        if cache is not None:
            _ride(cache, own[name])
        return output


def _cache_of(kwargs: Mapping[str, Any]) -> tuple[str, Cache | None]:
    """The cache among a call's arguments, by its name."""
    for name, value in kwargs.items():
        if isinstance(value, EncoderDecoderCache):
            raise TypeError("a RoutedModel must be a decoder or an encoder, got an encoder-decoder")
        if isinstance(value, Cache):
            return name, value
    return "", None


def _second(cache: Cache) -> Cache:
    """The cache of the pass without adapters that goes with the model's."""
    behind = getattr(cache, _RIDING, None)
    if behind is not None:
        second = copy.copy(cache)
        second.layers = cache.layers[behind:]
        return second
    held = tokens_held(cache)
    if cache.has_previous_state() if held is None else held:
        raise ValueError(
            "the cache must be empty or come from a RoutedModel: it lacks the states of the pass "
            "without adapters"
        )
    return copy.deepcopy(cache)


def _ride(cache: Cache, second: Cache) -> None:
    """Put the second cache's layers behind the model's, once these are there."""
    if getattr(cache, _RIDING, None) is None:
        setattr(cache, _RIDING, len(cache.layers))
        cache.layers.extend(second.layers)
