"""Where each expert's ranks lie, as small integer tables for the kernels.

A piece is a range of rows that meets a range of ranks: (row_begin, row_end, rank_begin, rank_end,
column, expert, seed, seed_row). `column` is where the piece begins in the rows of h, which hold
only the ranks that exist for them, side by side. The last three place its dropout mask, which
belongs to one expert (fedms.kernels.segments.Run).

Without segments every piece has all rows: the tables then know neither the number of rows nor their
own (row_begin and row_end are 0), and the kernels make rows by arithmetic. With segments a table
lists items, pieces cut to the rows of one program. Tables hold values of the call, never addresses;
fedms.kernels.tables keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fedms.kernels.segments import Run
from fedms.kernels.triton.tile import Where

MAX_RANKS = 128
"""Ranks that one program takes at most."""

Table = Callable[[Sequence[float], torch.dtype], Tensor]
"""Host values as a tensor on the call's device."""


class Piece(NamedTuple):
    row_begin: int
    row_end: int
    rank_begin: int
    rank_end: int
    column: int
    expert: int
    seed: int
    seed_row: int


class Layout:
    """The tables of one call signature.

    ranks: r_e of every expert. runs: those of segments, or None when every row uses every expert.
    """

    def __init__(
        self,
        m: int,
        width: int,
        ranks: tuple[int, ...],
        scale: tuple[float, ...],
        runs: tuple[Run, ...] | None,
        dropout: bool,
        table: Table,
    ) -> None:
        self.m, self.ranks, self.runs, self._to_device = m, ranks, runs, table
        self.width = width
        self.offsets = [0, *accumulate(ranks)]
        self.total = self.offsets[-1]
        self.dense = runs is None and not dropout and self.total <= MAX_RANKS
        # A dropout mask belongs to one expert, so a program then serves one.
        self.pieces = self._cut(by_expert=dropout)
        self.block_r = rank_block(p.rank_end - p.rank_begin for p in self.pieces)
        owners = [e for e, r in enumerate(ranks) for _ in range(r)]
        self.expert = table(owners, torch.int32)
        self.scale = table([scale[e] for e in owners], torch.float32)

    def where(self, rows: int) -> tuple[Where, int]:
        """Pieces for programs of `rows` rows, and how many programs."""
        if self.dense:
            return Where(None, None), self._programs(1, rows)
        return self._where(self.pieces, rows)

    def by_expert(self, rows: int) -> tuple[Where, int]:
        """The same with one whole expert an item, also those of rank 0; `expert` is its index."""
        return self._where(self._experts, rows)

    @cached_property
    def _experts(self) -> list[Piece]:
        return self._cut(by_expert=True, whole=True)

    def gradient(self, rows: int, need: Sequence[bool]) -> Gradient:
        """What the outer kernels walk for the weight gradients of the experts in `need`."""
        return Gradient(self, rows, [e for e, wanted in enumerate(need) if wanted])

    def of_tiles(self, block_m: int) -> tuple[Where, Tensor | None]:
        """Pieces for a row tile of a GEMM, and with segments the offsets [tiles + 1] of each."""
        if self.dense:
            return Where(None, None), None
        if self.runs is None:
            return Where(self.table(self.pieces), len(self.pieces)), None
        per_tile: list[list[Piece]] = [[] for _ in range(-(-self.m // block_m))]
        for piece in self.pieces:
            for tile in range(piece.row_begin // block_m, -(-piece.row_end // block_m)):
                per_tile[tile].append(piece)
        offsets = [0, *accumulate(map(len, per_tile))]
        pieces = self.table([piece for tile in per_tile for piece in tile])
        return Where(pieces, None), self._to_device(offsets, torch.int32)

    def _where(self, pieces: list[Piece], rows: int) -> tuple[Where, int]:
        if self.runs is None:
            return Where(self.table(pieces), len(pieces)), self._programs(len(pieces), rows)
        items = [item for piece in pieces for item in _items(piece, rows)]
        return Where(self.table(items), None), len(items)

    def _programs(self, pieces: int, rows: int) -> int:
        return pieces * -(-self.m // rows)

    def _cut(self, *, by_expert: bool, whole: bool = False) -> list[Piece]:
        """The runs as pieces of up to MAX_RANKS ranks (`whole`: of any), in row and rank order."""
        everywhere = Run(0, 0, 0, len(self.ranks), 0, 0, 0)
        pieces, column, before = [], 0, (-1, -1)
        for run in (everywhere,) if self.runs is None else self.runs:
            rows = (run.row_begin, run.row_end)
            column = column if before == rows else 0  # another run of the same segment
            before = rows
            for e in range(run.expert_begin, run.expert_end) if by_expert else (run.expert_begin,):
                last = e + 1 if by_expert else run.expert_end
                low, high = self.offsets[e], self.offsets[last]
                size = max(high - low, 1) if whole else MAX_RANKS
                owner = e if whole else e - run.expert_begin + run.mask_expert
                for rank in range(low, max(high, low + whole), size):
                    top = min(rank + size, high)
                    at = column + rank - low
                    pieces.append(Piece(*rows, rank, top, at, owner, run.seed, run.mask_row))
                column += high - low
        return pieces

    def table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return self._to_device([value for row in rows for value in row], torch.int32)


class Gradient:
    """Items with the span of ranks whose gradient is asked for, and where each expert's parts are.

    where: the items, `count` of them; spans: first and last rank for each of its entries; block_s:
    of the widest span. max_rank: of the experts asked for.
    """

    def __init__(self, layout: Layout, rows: int, wanted: list[int]) -> None:
        self._layout, self._parts = layout, {e: [] for e in wanted}
        entries: list[Piece] = []
        spans: list[tuple[int, int]] = []
        for piece in layout.pieces:
            inside = []
            for e in wanted:
                low = max(layout.offsets[e], piece.rank_begin)
                high = min(layout.offsets[e + 1], piece.rank_end)
                if low < high:
                    inside.append((e, low, high))
            begin = min((low for _, low, _ in inside), default=piece.rank_begin)
            end = max((high for _, _, high in inside), default=piece.rank_begin)
            for item in [piece] if layout.runs is None else _items(piece, rows):
                for e, low, high in inside:
                    first = layout.offsets[e]
                    self._parts[e].append((len(entries), low - begin, low - first, high - first))
                entries.append(item)
                spans.append((begin, end))
        everywhere = layout.runs is None
        self.entries = len(entries)
        self.chunks = -(-layout.m // rows) if everywhere else 1
        self.count = self.entries * self.chunks
        self.where = Where(layout.table(entries), self.entries if everywhere else None)
        self.spans = layout.table(spans)
        self.block_s = rank_block(end - begin for begin, end in spans)
        self.wanted = wanted
        self.max_rank = max((layout.ranks[e] for e in wanted), default=0)

    def sums(self, first: int, last: int) -> Tensor:
        """The table of the first-th to last-th expert asked for, as outer.py's Sum has it."""
        experts = self.wanted[first:last]
        ends = [0, *accumulate(len(self._parts[e]) for e in experts)]
        heads = [(ends[i], ends[i + 1], self._layout.ranks[e]) for i, e in enumerate(experts)]
        return self._layout.table([*heads, *(part for e in experts for part in self._parts[e])])


def rank_block(sizes: Iterable[int]) -> int:
    """The power of two, 16 at least (a dot needs it), that holds the largest of the sizes."""
    return max(16, 1 << (max(sizes, default=1) - 1).bit_length())


def _items(piece: Piece, rows: int) -> list[Piece]:
    return [
        piece._replace(row_begin=begin, row_end=min(begin + rows, piece.row_end))
        for begin in range(piece.row_begin, piece.row_end, rows)
    ]
