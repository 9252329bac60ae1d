"""Routing by contiguous row ranges: which experts each range of tokens uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows `offsets[i]:offsets[i + 1]` of the flattened x use only `experts[i]`.

    offsets: S + 1 non-decreasing row numbers, the first 0 and the last M.
    experts: S entries, each an expert's index or a sequence of distinct indices; an empty
        sequence leaves the rows to the base alone. Or an int64 tensor [S], or [S, W] with -1 where
        a segment has fewer than W experts; offsets are then best an int64 tensor too.

    Given as tensors, the values are input of the op like x is: another batch with other segments
    neither recompiles a compiled graph nor splits it, and nothing in Python walks the segments.
    Two things differ. Whether an expert has rows is not known outside the kernels: one without gets
    a gradient of zeros, not None. And the Triton, CUDA and stacked backends read the values on the
    host: CPU tensors cost nothing and may be used beside an x on a GPU; tensors on a GPU are waited
    for, which a CUDA graph's capture forbids.

    Raises ValueError or TypeError when the two disagree; what only the values of tensors say (they
    cover M rows, the indices are below E and distinct) is checked by the op.
    """

    offsets: Sequence[int] | Tensor
    experts: Sequence[int | Sequence[int]] | Tensor
    used: frozenset[int] | None = field(init=False, repr=False, default=None)
    """The experts of any rows; None when only the tensors know."""
    tensors: tuple[Tensor, Tensor] = field(init=False, repr=False)
    """offsets [S + 1] and experts [S, W], -1 where there is none; int64."""

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # they may be used in training, too
                return self.__post_init__()
        if isinstance(self.experts, Tensor):
            found = _checked_tensors(self.offsets, self.experts)
        else:
            raw = self.offsets.tolist() if isinstance(self.offsets, Tensor) else self.offsets
            offsets = _integers("offsets", raw)
            experts = tuple(
                (e,) if isinstance(e, int) else _integers(f"experts[{i}]", e)
                for i, e in enumerate(self.experts)
            )
            _check_lists(offsets, experts)
            object.__setattr__(self, "offsets", offsets)
            object.__setattr__(self, "experts", experts)
            lengths = [end - begin for begin, end in pairwise(offsets)]
            used = (ids for ids, rows in zip(experts, lengths, strict=True) if rows)
            object.__setattr__(self, "used", frozenset(e for ids in used for e in ids))
            width = max(map(len, experts), default=0)
            padded = [[*ids, *[-1] * (width - len(ids))] for ids in experts]
            found = _on_cpu(offsets), _on_cpu(padded).view(len(experts), width)
        object.__setattr__(self, "tensors", found)


class Run(NamedTuple):
    """Rows that all use the experts from `expert_begin` on, and where their dropout masks are.

    The mask of a pair is that of seed number `seed`, row `row - mask_row` and expert
    `expert - expert_begin + mask_expert` (fedms.kernels.dropout).
    """

    row_begin: int
    row_end: int
    expert_begin: int
    expert_end: int
    seed: int
    mask_row: int
    mask_expert: int


def read_runs(
    offsets: Tensor | None, experts: Tensor | None, seed: Tensor | None, m: int, num_experts: int
) -> tuple[Run, ...] | None:
    """One run a non-empty segment and range of consecutive experts; None without segments.

    Sorted by row, then by expert, so that the order of summation is fixed. A tensor on a GPU is
    waited for. Raises ValueError for what only the values say.
    """
    if offsets is None or experts is None:
        return None
    rows, ids = tuple(offsets.tolist()), tuple(map(tuple, experts.tolist()))
    return _runs(rows, ids, seed is not None and seed.dim() == 1, m, num_experts)


@lru_cache(maxsize=256)
def _runs(
    offsets: tuple[int, ...],
    experts: tuple[tuple[int, ...], ...],
    own_seeds: bool,
    m: int,
    num_experts: int,
) -> tuple[Run, ...]:
    chosen = tuple(tuple(e for e in ids if e != -1) for ids in experts)
    _check_lists(offsets, chosen)
    if offsets[-1] != m:
        raise ValueError(
            f"segments.offsets must cover the {m} rows of x, the last one is {offsets[-1]}"
        )
    runs: list[Run] = []
    for i, (ids, (begin, end)) in enumerate(zip(chosen, pairwise(offsets), strict=True)):
        if ids and max(ids) >= num_experts:
            raise ValueError(f"segments.experts[{i}] must be in [0, {num_experts}), got {ids}")
        if begin == end:
            continue
        order = sorted(ids)
        first = 0
        for j in range(1, len(order) + 1):
            if j < len(order) and order[j] == order[j - 1] + 1:
                continue
            mask = (i, begin, first) if own_seeds else (0, 0, order[first])
            runs.append(Run(begin, end, order[first], order[j - 1] + 1, *mask))
            first = j
    return tuple(runs)


def _on_cpu(values: Sequence[Any]) -> Tensor:
    """int64, on the CPU whatever the default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def nobody(m: int) -> tuple[Tensor, Tensor]:
    """`Segments.tensors` that leave all of M rows to the base alone."""
    offsets = torch.arange(2, device="cpu") * m
    return offsets, offsets.new_empty((1, 0))


def row_width(ranks: Sequence[int], experts: Tensor | None) -> int:
    """The most ranks that a row may use: with segments' `experts` [S, W], those of any W experts.

    It depends on no value of a tensor, as the shape of what a forward saves must not.
    """
    if experts is None:
        return sum(ranks)
    return sum(sorted(ranks, reverse=True)[: experts.shape[1]])


def _integers(what: str, values: Any) -> tuple[int, ...]:
    """One integer or several, also numpy's; no number is rounded to one."""
    try:
        several = not hasattr(values, "__index__") or getattr(values, "shape", ()) != ()
        return tuple(map(index, values)) if several else (index(values),)
    except TypeError:
        raise TypeError(f"segments.{what} must hold integers, got {values!r}") from None


def _checked_tensors(offsets: Sequence[int] | Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    if experts.dtype != torch.int64 or experts.dim() not in (1, 2):
        raise TypeError(
            f"segments.experts must be int64 [S] or [S, W], got {list(experts.shape)} "
            f"{experts.dtype}"
        )
    if not isinstance(offsets, Tensor):
        offsets = _on_cpu(offsets)
    if offsets.dtype != torch.int64 or offsets.shape != (experts.shape[0] + 1,):
        raise ValueError(
            f"segments.offsets must be int64 [{experts.shape[0] + 1}], one entry more than "
            f"segments.experts, got {list(offsets.shape)} {offsets.dtype}"
        )
    experts = experts if experts.dim() == 2 else experts.unsqueeze(1)
    return offsets.contiguous(), experts.contiguous()


def _check_lists(offsets: tuple[int, ...], experts: tuple[tuple[int, ...], ...]) -> None:
    if len(offsets) != len(experts) + 1:
        raise ValueError(
            f"segments.offsets must have one entry more than segments.experts "
            f"({len(experts) + 1}), got {len(offsets)}"
        )
    if offsets[0] != 0 or any(b < a for a, b in pairwise(offsets)):
        raise ValueError(
            f"segments.offsets must start at 0 and never decrease, got {_short(offsets)}"
        )
    for i, ids in enumerate(experts):
        if len(set(ids)) != len(ids) or any(e < 0 for e in ids):
            raise ValueError(
                f"segments.experts[{i}] must hold distinct indices >= 0, got {_short(ids)}"
            )


def _short(values: Sequence[int]) -> str:
    return str(values) if len(values) <= 8 else f"({', '.join(map(str, values[:8]))}, ...)"
