"""What the fused layers of a model read in a forward: gates, top-k indices, adapters per sample.

An `AdapterRouting` is immutable; `fit` turns it into arguments of the op for the x at
hand. Shape suffixes: B samples, T tokens, E adapters, k adapters a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import NamedTuple

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
    """

    adapters: tuple[str, ...] = ()
    gates: Tensor | Callable[[Tensor], Gates] | None = None
    expert_idxs: Tensor | None = None
    samples: tuple[tuple[str, ...], ...] | None = None

    def by_row(self) -> bool:
        """Whether it tells rows of x apart: by sample or token, not for a layer as a whole."""
        if self.samples is not None:
            return True
        return isinstance(self.gates, Tensor) and self.gates.dim() > 1

    def named(self, there: Container[str]) -> list[str]:
        """The adapters that take part, of those that are there."""
        if self.samples is None:
            return [name for name in self.adapters if name in there]
        listed = dict.fromkeys(name for names in self.samples for name in names)
        return [name for name in listed if name in there]

    def fit(self, x: Tensor, names: list[str]) -> Experts:
        """The op's routing arguments for x [B, ..., K] on a layer that has the adapters `names`.

        Raises ValueError when the gates or the list of samples do not fit x.
        """
        if self.samples is not None:
            return Experts(segments=_segments(self.samples, x, names))
        gates, idxs = self.gates, self.expert_idxs
        if callable(gates):
            found = gates(x)
            gates, idxs = found if isinstance(found, tuple) else (found, None)
        if idxs is not None:
            if len(names) != len(self.adapters):
                missing = [name for name in self.adapters if name not in names]
                raise ValueError(
                    f"expert_idxs must count adapters that the layer has, it lacks {missing}"
                )
            return Experts(_to_rows("gates", gates, x), _to_rows("expert_idxs", idxs, x))
        if gates is None:
            return Experts()
        if gates.shape[-1] != len(self.adapters):
            raise ValueError(
                f"gates must have one column for each of the adapters {list(self.adapters)}, got "
                f"{list(gates.shape)}"
            )
        if len(names) != len(self.adapters):
            gates = gates[..., [self.adapters.index(name) for name in names]]
        return Experts(gates if gates.dim() == 1 else _to_rows("gates", gates, x))


def _to_rows(what: str, values: Tensor | None, x: Tensor) -> Tensor | None:
    """values [..., C] with x's leading dims: as they are, per sample (a view), or reshaped."""
    if values is None:
        return None
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
        raise ValueError(
            f"the adapter names must be one entry for each of the layer's {x.shape[0]} samples, "
            f"got {len(samples)}"
        )
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
