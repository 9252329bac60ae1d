"""Routing by contiguous row ranges: which experts each range of tokens uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Segments:
    """Rows `offsets[i]:offsets[i + 1]` of the flattened x use only `experts[i]`.

    offsets: S + 1 non-decreasing row numbers, the first 0 and the last M (a sequence or a 1-D
        integer tensor; a tensor is read once, here).
    experts: S entries, each an expert's index or a sequence of distinct indices; an empty
        sequence leaves the rows to the base alone.
    Raises ValueError when the two disagree; that the last offset is M is checked by the op.
    """

    offsets: Sequence[int]
    experts: Sequence[int | Sequence[int]]

    def __post_init__(self) -> None:
        raw = self.offsets.tolist() if isinstance(self.offsets, torch.Tensor) else self.offsets
        offsets = tuple(int(o) for o in raw)
        experts = tuple((e,) if isinstance(e, int) else tuple(int(i) for i in e)
                        for e in self.experts)  # fmt: skip
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
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "experts", experts)

    def runs(self) -> list[int]:
        """(row_begin, row_end, expert_begin, expert_end) quadruples, flattened.

        One per non-empty segment and maximal run of consecutive experts: what the backends walk.
        Sorted by row, then by expert, so that the order of summation is fixed.
        """
        flat: list[int] = []
        for i, ids in enumerate(self.experts):
            begin, end = self.offsets[i], self.offsets[i + 1]
            if begin == end:
                continue
            order = sorted(ids)  # type: ignore[arg-type]  # normalised to tuples above
            first = 0
            for j in range(1, len(order) + 1):
                if j == len(order) or order[j] != order[j - 1] + 1:
                    flat += (begin, end, order[first], order[j - 1] + 1)
                    first = j
        return flat


def row_width(ranks: Sequence[int], runs: Sequence[int] | None) -> int:
    """The most ranks that any one row uses: `runs` are `Segments.runs()`, None for all experts."""
    if runs is None:
        return sum(ranks)
    widths: dict[tuple[int, int], int] = {}
    for i in range(0, len(runs), 4):
        begin, end, first, last = runs[i : i + 4]
        widths[begin, end] = widths.get((begin, end), 0) + sum(ranks[first:last])
    return max(widths.values(), default=0)


def _short(values: Sequence[int]) -> str:
    return str(values) if len(values) <= 8 else f"({', '.join(map(str, values[:8]))}, ...)"
