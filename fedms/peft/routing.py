"""What the fused layers of a model read in a forward: gates, top-k indices, adapters per sample.

An `AdapterRouting` is immutable; `fit` turns it into arguments of the op for the x at
hand. Shape suffixes: B samples, T tokens, E adapters, k adapters a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedms.kernels import Segments

BASE = "__base__"  # peft's name for "no adapter" in a list of adapter names

Gates = Tensor | tuple[Tensor, Tensor]  # gates, or (gates, expert_idxs)


class Experts(NamedTuple):
    """Which of a call's adapters act where, as the op takes it."""

    gates: Tensor | None = None
    expert_idxs: Tensor | None = None
    segments: Segments | None = None


@dataclass(frozen=True, eq=False)
class AdapterRouting:
    """Which adapters take part in a forward, with which gates, on which samples.

    Attributes:
        adapters: the names that the last dimension of dense gates, or `expert_idxs`, counts.
        gates: None (ones), a tensor [E], [B, E] or [B, T, E] ([..., k] beside expert_idxs), or a
            function of the layer's input that gives gates or (gates, expert_idxs).
        expert_idxs: None, or int64 with the shape of gates: only these pairs exist.
        samples: None, or for each sample the adapters of its rows; it replaces gates.
        sample_idxs: the samples as int64 [B, W] of positions in `adapters`, -1 for none: what a
            compiled graph takes, so that another batch's names are no other graph.
        bias_gate: None, or the gate that every adapter's `lora_bias` has in place of its own.
        factors_only: the adapters' dropout and `lora_bias` are left out.
    """

    adapters: tuple[str, ...] = ()
    gates: Tensor | Callable[[Tensor], Gates] | None = None
    expert_idxs: Tensor | None = None
    samples: tuple[tuple[str, ...], ...] | None = None
    sample_idxs: Tensor | None = None
    bias_gate: float | None = None
    factors_only: bool = False

    def by_row(self) -> bool:
        """Whether it tells rows of x apart: by sample or token, not for a layer as a whole."""
        if self.samples is not None:
            return True
        return isinstance(self.gates, Tensor) and self.gates.dim() > 1

    def named(self, there: Container[str]) -> list[str]:
        """The adapters that take part, of those that are there."""
        return [name for name in self.adapters if name in there]

    def resolved(self, x: Tensor) -> AdapterRouting:
        """With the gates that a function gives for x in the function's place."""
        if isinstance(self.gates, Tensor) or self.gates is None:
            return self
        gates, idxs = split_gates(self.gates(x))
        return replace(self, gates=gates, expert_idxs=idxs)

    def fit(self, x: Tensor, names: list[str]) -> Experts:
        """The op's routing arguments for x [B, ..., K] on a layer that has the adapters `names`.

        Raises ValueError when the gates or the list of samples do not fit x.
        """
        if self.sample_idxs is not None and torch.compiler.is_compiling():
            return Experts(segments=self._traced_segments(x, names))  # no guard on the samples
        if self.samples is not None:
            return Experts(segments=_segments(self.samples, x, names))
        if self.gates is not None and not isinstance(self.gates, Tensor):
            return self.resolved(x).fit(x, names)
        gates, idxs = self.gates, self.expert_idxs
        if gates is None:
            return Experts()
        if idxs is not None:
            gates, idxs = _to_rows("gates", gates, x), _to_rows("expert_idxs", idxs, x)
            if len(names) != len(self.adapters):
                # pairs with an adapter that the layer, or the call, lacks add nothing; an index of
                # no adapter stays as it is, out of the op's range too, which refuses it
                last = len(self.adapters) - 1
                there = self._positions(names, x.device)[idxs.clamp(0, last)]
                gates = gates.masked_fill(there < 0, 0.0)
                idxs = torch.where((idxs < 0) | (idxs > last), idxs, there.clamp(min=0))
            return Experts(gates, idxs)
        if gates.shape[-1] != len(self.adapters):
            raise ValueError(
                f"gates must have one column for each of the adapters {list(self.adapters)}, got "
                f"{list(gates.shape)}"
            )
        if len(names) != len(self.adapters):
            gates = gates[..., [self.adapters.index(name) for name in names]]
        return Experts(gates if gates.dim() == 1 else _to_rows("gates", gates, x))

    def weights(self, x: Tensor, names: list[str]) -> Tensor | None:
        """How much of each of the adapters a row of x gets: None (ones), [E] or [..., E]."""
        held = None
        if self.sample_idxs is not None and torch.compiler.is_compiling():  # as `fit`
            idxs = self.sample_idxs.unsqueeze(-1)
            columns = torch.tensor([*map(self.adapters.index, names)], device=idxs.device)
            held = (idxs == columns).any(1).float().to(x.device)
        elif self.samples is not None:
            listed = [[float(name in sample) for name in names] for sample in self.samples]
            held = torch.tensor(listed, device=x.device)
        if held is not None:
            return _to_rows("adapter names", held, x)
        gates, idxs, _ = self.fit(x, names)
        if gates is None or idxs is None:
            return gates
        return gates.new_zeros(*gates.shape[:-1], len(names)).scatter_add(-1, idxs, gates)

    def _positions(self, names: list[str], device: torch.device) -> Tensor:
        """For each of `adapters` its position in `names`, -1 where it is not there; [E] int64."""
        positions = [names.index(n) if n in names else -1 for n in self.adapters]
        return torch.tensor(positions, device=device)

    def _traced_segments(self, x: Tensor, names: list[str]) -> Segments:
        """A segment a sample, as tensors."""
        idxs = self.sample_idxs
        assert idxs is not None
        if x.dim() < 2 or x.shape[0] != idxs.shape[0]:
            raise _wrong_samples(x, idxs.shape[0])
        if len(names) != len(self.adapters):
            idxs = torch.where(idxs < 0, idxs, self._positions(names, idxs.device)[idxs])
        offsets = torch.arange(idxs.shape[0] + 1, device=idxs.device) * math.prod(x.shape[1:-1])
        return Segments(offsets, idxs)


def split_gates(gates: Any) -> tuple[Tensor, Tensor | None]:
    """Gates and the indices beside them, if there are any.

    Raises TypeError when they are neither a floating tensor nor a pair of one and int64 indices.
    """
    values, idxs = gates if isinstance(gates, tuple) and len(gates) == 2 else (gates, None)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(
            "gates must be a floating point Tensor, or a pair (gates, expert_idxs) with one, got "
            f"{getattr(values, 'dtype', type(values).__name__)}"
        )
    if idxs is not None and (not isinstance(idxs, Tensor) or idxs.dtype != torch.int64):
        raise TypeError(
            "expert_idxs must be an int64 Tensor, got "
            f"{getattr(idxs, 'dtype', type(idxs).__name__)}"
        )
    return values, idxs


def of_samples(
    names: Sequence[str | Sequence[str]], order: Sequence[str] | None = None
) -> AdapterRouting:
    """The routing that gives each sample an adapter of its own, several, or "__base__" for none.

    order: the adapters in an order that does not change with the batch: then the routing has
        `sample_idxs` too.
    """
    samples = tuple(
        tuple(one for one in ([name] if isinstance(name, str) else name) if one != BASE)
        for name in names
    )
    listed = dict.fromkeys(one for sample in samples for one in sample)
    if order is None:
        return AdapterRouting(tuple(listed), samples=samples)
    adapters = tuple(name for name in order if name in listed)
    width = max(1, *(len(sample) for sample in samples)) if samples else 1
    idxs = [[*map(adapters.index, s), *[-1] * (width - len(s))] for s in samples]
    held = torch.tensor(idxs, device="cpu")  # whatever torch's default device is
    return AdapterRouting(adapters, samples=samples, sample_idxs=held)


def _to_rows(what: str, values: Tensor, x: Tensor) -> Tensor:
    """values [..., C] with x's leading dims: as they are, per sample (a view), or reshaped."""
    lead, width = x.shape[:-1], values.shape[-1]
    if values.shape[:-1] == lead:
        return values
    if values.dim() == 2 and len(lead) > 1 and values.shape[0] == lead[0]:
        return values.view(lead[0], *[1] * (len(lead) - 1), width).expand(*lead, width)
    # tokens of the whole batch in one dimension, as mixtures of expert MLPs pass them
    if values.dim() - 1 > len(lead) and math.prod(values.shape[:-1]) == math.prod(lead):
        return values.reshape(*lead, width)
    raise ValueError(
        f"{what} must be [E], one row a sample [{lead[0] if lead else 1}, E] or one a token "
        f"{[*lead]} + [E] for the layer's input {list(x.shape)}, got {list(values.shape)}"
    )


def _segments(samples: tuple[tuple[str, ...], ...], x: Tensor, names: list[str]) -> Segments:
    """Row ranges of x [B, ..., K], one for each run of samples with the same adapters."""
    if x.dim() < 2 or x.shape[0] != len(samples):
        raise _wrong_samples(x, len(samples))
    index = {name: i for i, name in enumerate(names)}
    rows = math.prod(x.shape[1:-1])
    offsets, experts = [0], []
    for i, sample in enumerate(samples):
        chosen = tuple(index[name] for name in sample if name in index)
        if experts and experts[-1] == chosen:
            offsets[-1] += rows
            continue
        experts.append(chosen)
        offsets.append((i + 1) * rows)
    return Segments(offsets, experts)


def _wrong_samples(x: Tensor, count: int) -> ValueError:
    return ValueError(
        f"the adapter names must be one entry for each of the layer's {x.shape[0]} samples, got "
        f"{count}"
    )
