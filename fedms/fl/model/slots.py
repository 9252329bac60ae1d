"""S clients' parameters side by side on one backbone.

A leaf holds all S clients' values of one parameter, [S, ...], so an elementwise optimiser over the
leaves is S optimisers, and the experts' op takes a leaf as it is. What all clients share and nobody
trains is held once, [1, ...]. One client is S = 1, by the same code.

S slots, B examples, T positions, r rank, K in, N out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fedms.fl.model.backbone import Backbone
from fedms.fl.settings import Count, Names, Positive, Section
from fedms.fl.types import ConfigError, Patterns, State, matches
from fedms.kernels import Segments, gated_lora_linear

Path = tuple[str, ...]
"""Experts whose outputs are added in every linear, e.g. ``("global",)``; () is the base alone."""


@dataclass
class _Route:
    """What the layers of a model read in a forward.

    Attributes:
        path: the experts in use.
        rows: examples of each slot, in order; they sum to B.
        gates: [B, len(path)] or None; differentiable.
        seeds: a CPU generator a slot, where the experts drop out.
        router: name of what makes the gates in each layer, of its input; or None.
    """

    path: Path = ()
    rows: Sequence[int] = ()
    gates: Tensor | None = None
    seeds: Sequence[torch.Generator] | None = None
    router: str | None = None
    _made: dict[tuple[tuple[int, ...], int], Segments] = field(default_factory=dict)

    def of_slots(self, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Each slot's experts, counted through stacks of ``sizes`` slots (S or 1)."""
        starts = [0, *accumulate(sizes)]
        return [
            tuple(starts[i] + (s if size > 1 else 0) for i, size in enumerate(sizes))
            for s in range(len(self.rows))
        ]

    def experts(self, sizes: tuple[int, ...], device: torch.device) -> Tensor:
        """Each example's experts, int64 [B, len(sizes)]."""
        each = np.repeat(np.array(self.of_slots(sizes)), self.rows, axis=0)
        return torch.from_numpy(each).to(device, non_blocking=True)

    def segments(self, sizes: tuple[int, ...], width: int, *, by_example: bool) -> Segments:
        """A segment a slot, or an example, of ``width`` rows an example."""
        key = sizes, width
        if key not in self._made:
            experts = self.of_slots(sizes)
            rows = list(self.rows)
            if by_example:
                experts = [own for own, n in zip(experts, rows, strict=True) for _ in range(n)]
                rows = [1] * sum(rows)
            self._made[key] = Segments([0, *accumulate(n * width for n in rows)], experts)
        return self._made[key]


@dataclass
class _Shared:
    """What the slots and their layers hold in common."""

    live: State = field(default_factory=dict)
    route: _Route = field(default_factory=_Route)


class ExpertLinear(nn.Module):
    """A frozen linear under the experts of :class:`Slots`.

    Where ``base.<name>`` [1, N, K] is live, scaling times it is added to the weight.

    Args:
        base_layer: the linear.
        name: its dotted name in the model, as in the parameters' names.
        scaling: of every expert.
        dropout: of their input, while :meth:`Slots.routed` has seeds.
        shared: the slots' own.
    """

    def __init__(
        self, base_layer: nn.Linear, name: str, scaling: float, dropout: float, shared: _Shared
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.scaling, self.dropout = name, scaling, dropout
        self._shared = shared

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., K] -> [B, ..., N]."""
        live, route = self._shared.live, self._shared.route
        present = [
            (i, live[name], live[f"{expert}.{self.name}.lora_B"])
            for i, expert in enumerate(route.path)
            if (name := f"{expert}.{self.name}.lora_A") in live
        ]
        corrected = f"base.{self.name}" in live
        if not present:
            return self._base(x) if corrected else self.base_layer(x)
        columns, lora_A, lora_B = zip(*present, strict=True)
        return gated_lora_linear(
            x,
            self._base if corrected else self.base_layer.weight,
            lora_A,
            lora_B,
            bias=None if corrected else self.base_layer.bias,
            scaling=self.scaling,
            **self._routing(x, tuple(len(stack) for stack in lora_A), columns),
        )

    def _base(self, x: Tensor) -> Tensor:
        # Not added to the weight itself: in bf16 the correction would be rounded away.
        delta = self._shared.live[f"base.{self.name}"][0] * self.scaling
        return self.base_layer(x) + nn.functional.linear(x, delta.to(x.dtype))

    def _routing(self, x: Tensor, sizes: tuple[int, ...], columns: Sequence[int]) -> dict[str, Any]:
        """Which experts, counted through the stacks of ``sizes``, each row of x uses, and how."""
        route = self._shared.route
        drops = self.dropout > 0 and route.seeds is not None
        gates = self._gates(x)
        gates = None if gates is None else gates[..., list(columns)]
        if not drops and (len(route.rows) <= 1 or max(sizes) == 1):
            return {"gates": _to_tokens(gates, x)}
        if gates is not None:  # the op's gates have a column for every slot's expert
            place = route.experts(sizes, x.device)
            place = place.view(len(place), *[1] * (gates.dim() - 2), -1).expand_as(gates)
            gates = gates.new_zeros(*gates.shape[:-1], sum(sizes)).scatter(-1, place, gates)
        routing: dict[str, Any] = {"gates": _to_tokens(gates, x)}
        routing["segments"] = route.segments(sizes, math.prod(x.shape[1:-1]), by_example=drops)
        if drops:
            # One seed an example, so that its mask depends on neither its neighbours nor padding.
            drawn = [
                torch.randint(2**62, (rows,), generator=seed)
                for rows, seed in zip(route.rows, route.seeds or (), strict=True)
            ]
            routing |= {"dropout_p": self.dropout, "seed": torch.cat(drawn).to(x.device)}
        return routing

    def _gates(self, x: Tensor) -> Tensor | None:
        """Weights of the path's experts: [B, E], or of a router [B, ..., E], one set a token."""
        route = self._shared.route
        if route.router is None:
            return route.gates
        weight = self._shared.live[f"{route.router}.{self.name}.weight"]  # [S or 1, E, K]
        if len(weight) == 1:
            scores = nn.functional.linear(x.to(weight.dtype), weight[0])
        else:
            slot = np.repeat(np.arange(len(route.rows)), route.rows)
            each = weight[torch.from_numpy(slot).to(x.device, non_blocking=True)]
            scores = torch.einsum("b...k,bek->b...e", x.to(weight.dtype), each)
        return scores.softmax(-1)


def _to_tokens(gates: Tensor | None, x: Tensor) -> Tensor | None:
    """Gates [B, E] for every row of x [B, ..., K]; those that are by row already as they are."""
    if gates is None or gates.dim() == x.dim():
        return gates
    gates = gates.view(len(gates), *[1] * (x.dim() - 2), -1)
    return gates.expand(*x.shape[:-1], -1)


class LoraConfig(Section):
    r: Count = 8
    """Rank of an expert in every linear."""
    alpha: Positive = 16.0
    """An expert is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of an expert's inputs that is dropped in training."""
    targets: Names = ("query", "key", "value", "attention.output.dense")
    """Ends of the names of the linears in a block that carry experts."""

    @field_validator("targets")
    @classmethod
    def _names_a_linear(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("must name at least one linear, got none")
        return targets


class Slots:
    """The experts on a backbone's blocks, and whose values they hold at the moment.

    Args:
        backbone: its linears named by ``targets`` are replaced by :class:`ExpertLinear`.
        r, alpha, dropout: of every expert, which scales by alpha / r.
        targets: a linear takes part if its dotted name is one of them or ends in one.
        head: what a trained head [C, D] starts from, or None.

    Attributes:
        live: leaves by name, [S, ...] or [1, ...].
        count: S.

    Raises:
        ConfigError: a target that names no linear, the message lists the linears that there are; a
            rank that no linear has.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        targets: Sequence[str],
        head: Tensor | None = None,
    ) -> None:
        self.backbone, self.count = backbone, 1
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self._shared = _Shared()
        self._list = backbone.blocks.name + "."
        self.layers = self._put_on(targets)
        linears = [layer.base_layer for layer in self.layers.values()]
        widest = max(min(linear.in_features, linear.out_features) for linear in linears)
        if r > widest:
            raise ConfigError(
                f"lora.r must be at most {widest}, more than which no update of the model's "
                f"linears can have, got {r}"
            )
        self._fresh = self._draw()
        if head is not None:
            self._fresh["head.weight"] = head.to(backbone.device, backbone.master)
        self.awake: tuple[int, ...] = ()

    @property
    def heads_are_trained(self) -> bool:
        """Whether every expert has a head of its own, which the task trains."""
        return "head.weight" in self._fresh

    # Blocks ---------------------------------------------------------------------------------------

    def block_of(self, name: str) -> int | None:
        """The block that a layer or parameter belongs to; None for heads and small networks."""
        _, found, rest = name.partition(self._list)
        return int(rest.partition(".")[0]) if found else None

    def is_awake(self, name: str) -> bool:
        """Whether a parameter takes part: its block is awake, or it belongs to no block."""
        block = self.block_of(name)
        return block is None or block in self.awake

    def set_awake(self, blocks: Sequence[int]) -> None:
        """Only these blocks' experts take part from the next :meth:`load` on."""
        self.awake = tuple(sorted(blocks))

    @property
    def depth(self) -> int:
        """The block to start from: the lowest awake one (the last, if none is).

        Below it all clients agree.
        """
        return self.awake[0] if self.awake else len(self.backbone.blocks) - 1

    # States ---------------------------------------------------------------------------------------

    @property
    def live(self) -> State:
        return self._shared.live

    def fresh(self, expert: str) -> State:
        """An untrained expert of all blocks, the same for everybody: A random, B zero."""
        return {f"{expert}.{name}": tensor for name, tensor in self._fresh.items()}

    def fresh_router(self, router: str, num_experts: int) -> State:
        """``<router>.<layer>.weight`` [E, K] of every layer, Kaiming-uniform, alike for everybody.

        A layer's gates are the softmax of weight x, of each token's own input.
        """
        draw = torch.Generator().manual_seed(0)
        place = {"device": self.backbone.device, "dtype": self.backbone.master}
        state: State = {}
        for name, layer in self.layers.items():
            weight = torch.empty(num_experts, layer.base_layer.in_features, dtype=place["dtype"])
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=draw)
            state[f"{router}.{name}.weight"] = weight.to(**place)
        return state

    @torch.no_grad()
    def load(self, states: Sequence[State], trains: Patterns = ()) -> None:
        """Stack S clients' states, which have the same names; sleeping blocks are left out.

        A parameter that is the same tensor in every state and fits none of ``trains`` is held once.
        """
        self.count, live = len(states), {}
        place = {"device": self.backbone.device, "non_blocking": True}
        apart = {  # an expert's A and B in a layer are stacked alike
            name.partition(".lora_")[0]
            for name, first in states[0].items()
            if matches(name, trains) or any(state[name] is not first for state in states)
        }
        for name, first in states[0].items():
            if not self.is_awake(name):
                continue
            if name.partition(".lora_")[0] in apart:
                live[name] = torch.stack([state[name] for state in states]).to(**place)
            else:
                live[name] = first.to(**place)[None]
        self._shared.live = live

    def of(self, slot: int, state: State | None = None) -> State:
        """One slot's values as views of ``state`` (default: the live leaves)."""
        state = self.live if state is None else state
        return {name: t[slot if len(t) > 1 else 0] for name, t in state.items()}

    @contextmanager
    def routed(
        self,
        path: Path,
        rows: Sequence[int],
        gates: Tensor | None = None,
        seeds: Sequence[torch.Generator] | None = None,
        router: str | None = None,
    ) -> Iterator[None]:
        """Within the block ``rows[s]`` examples of a batch use slot s's experts of ``path``.

        Args:
            rows: S numbers that sum to B.
            gates: [B, len(path)], one weight an expert for each example.
            seeds: a generator a slot: the experts drop out by what it draws.
            router: in place of gates, what weighs the experts in each layer, token by token.
        """
        before = self._shared.route
        self._shared.route = _Route(path, rows, gates, seeds, router)
        try:
            yield
        finally:
            self._shared.route = before

    # Setting up -----------------------------------------------------------------------------------

    def _put_on(self, targets: Sequence[str]) -> dict[str, ExpertLinear]:
        model, layers = self.backbone.model, {}
        linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(self._list)
        }
        for target in targets:
            found = [name for name in linears if name.endswith("." + target)]
            if not found:
                endings = sorted({name.rpartition(".")[2] for name in linears})
                raise ConfigError(
                    f"lora.targets: no linear of the model is named {target!r}; "
                    f"its linears end in {', '.join(endings)}"
                )
            for name in found:
                parent, _, child = name.rpartition(".")
                layers[name] = ExpertLinear(
                    linears[name], name, self.alpha / self.r, self.dropout, self._shared
                )
                setattr(model.get_submodule(parent), child, layers[name])
        return layers

    def _draw(self) -> State:
        """A [r, K] Kaiming-uniform, as in peft, and B [N, r] zero, of every layer."""
        draw = torch.Generator().manual_seed(0)  # clients must agree on the start of A
        fresh: State = {}
        place = {"device": self.backbone.device, "dtype": self.backbone.master}
        for name, layer in self.layers.items():
            base = layer.base_layer
            A = torch.empty(self.r, base.in_features, dtype=self.backbone.master)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=draw)
            fresh[f"{name}.lora_A"] = A.to(**place)
            fresh[f"{name}.lora_B"] = torch.zeros(base.out_features, self.r, **place)
        return fresh
