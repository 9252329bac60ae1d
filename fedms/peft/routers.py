"""Routers that gate peft adapters by what a token is, and models that carry them.

Two forms known from the literature, over :func:`fedms.gated`:

    RoutedModel   X-LoRA (arXiv 2402.07148): one pass without adapters gives hidden states, one
                  router turns them into the gates of every layer
    LayerRouters  MoLA (arXiv 2402.08562): each layer routes by its own input

With top_k a router lists k adapters a token, and the op computes no other.
Shape suffixes: H width of the input, E adapters, k adapters a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedms.peft.gates import gated
from fedms.peft.layer import FusedLayer


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
        asked = {"labels": None, "output_hidden_states": True, "return_dict": True}
        # no adapter by gates: peft's disable_adapter would make frozen adapters trainable again
        with torch.no_grad(), gated(self.model, None, adapters=()):
            hidden = self.model(*args, **{**kwargs, **asked}).hidden_states[-1]
        with gated(self.model, self.router(hidden), adapters=self.adapters):
            return self.model(*args, **kwargs)
