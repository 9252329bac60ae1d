"""Where each expert's ranks lie, as small integer tables for the kernels, built once and kept.

Segments are read on the host (`read_runs`), so no table needs a device value. Tables are
cached by the values that they hold, never by an address, and are copied to the device the first
time: a steady training loop copies nothing and can be captured in a CUDA graph.

A piece is a range of rows that meets a range of ranks. `column` is where the piece begins in the
rows of h, which hold only the ranks that exist for them, side by side; `expert` is that of its
first rank. With dropout a piece is one expert's, and the mask of its rows is that of seed number
`seed`, row `row - mask_row` and expert `mask_expert`. An item is a piece cut to the rows of one
program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fedms.kernels.packing import constant
from fedms.kernels.segments import Run

MAX_RANKS = 128
"""Ranks that one program takes at most."""


class Piece(NamedTuple):
    row_begin: int
    row_end: int
    rank_begin: int
    rank_end: int
    column: int
    expert: int
    seed: int
    mask_row: int
    mask_expert: int


class Layout:
    """The tables of one (ranks, scale, routing, device); all of them are made when first asked for.

    ranks: r_e of every expert. width: of a row of h. runs: `read_runs`, or None when every row uses
    every expert.
    """

    def __init__(
        self,
        m: int,
        ranks: tuple[int, ...],
        scale: tuple[float, ...],
        width: int,
        runs: tuple[Run, ...] | None,
        dropout: bool,
        device: torch.device,
    ) -> None:
        self.m, self.ranks, self.runs, self.device = m, ranks, runs, device
        self.offsets = [0, *accumulate(ranks)]
        self.total = self.offsets[-1]
        self.width = width
        self.dense = runs is None and not dropout and self.total <= MAX_RANKS
        # A dropout mask belongs to one expert, so a program then serves one.
        self.pieces = self._cut(by_expert=dropout)
        self.block_r = rank_block(p.rank_end - p.rank_begin for p in self.pieces)
        self.by_rank = rank_tables(ranks, scale, device)
        self._items: dict[tuple[str, int], Tensor] = {}
        self._gradients: dict[tuple[int, tuple[bool, ...]], GradientItems] = {}
        self._tiles: dict[int, tuple[Tensor, Tensor]] = {}

    def items(self, rows: int) -> Tensor:
        """[items, 9]: every piece, cut to `rows` rows."""
        return self._cached("pieces", rows, self.pieces)

    def expert_items(self, rows: int) -> Tensor:
        """[items, 9]: the same with one expert an item, also those of rank 0."""
        return self._cached("experts", rows, self._by_expert)

    @cached_property
    def _by_expert(self) -> list[Piece]:
        return self._cut(by_expert=True, whole=True)

    def gradient_items(self, rows: int, need: Sequence[bool]) -> GradientItems:
        """What the outer kernel walks for the weight gradients of the experts in `need`."""
        key = (rows, tuple(need))
        if key not in self._gradients:
            self._gradients[key] = GradientItems(self, rows, key[1])
        return self._gradients[key]

    def tiles(self, block_m: int) -> tuple[Tensor, Tensor]:
        """Pieces [P, 9] that meet each row tile of a GEMM, and offsets [tiles + 1] into them."""
        if block_m not in self._tiles:
            per_tile: list[list[Piece]] = [[] for _ in range(-(-self.m // block_m))]
            for piece in self.pieces:
                for tile in range(piece.row_begin // block_m, -(-piece.row_end // block_m)):
                    per_tile[tile].append(piece)
            offsets = [0, *accumulate(map(len, per_tile))]
            self._tiles[block_m] = (
                self._table([piece for tile in per_tile for piece in tile], len(Piece._fields)),
                torch.tensor(offsets, dtype=torch.int32).to(self.device),
            )
        return self._tiles[block_m]

    def _cached(self, kind: str, rows: int, pieces: list[Piece]) -> Tensor:
        if (kind, rows) not in self._items:
            self._items[kind, rows] = self._table(
                [item for piece in pieces for item in _rows(piece, rows)], len(Piece._fields)
            )
        return self._items[kind, rows]

    def _cut(self, *, by_expert: bool, whole: bool = False) -> list[Piece]:
        """The runs as pieces of up to MAX_RANKS ranks (`whole`: of any), in row and rank order."""
        whole_call = (Run(0, self.m, 0, len(self.ranks), 0, 0, 0),)
        pieces, column, before = [], 0, (-1, -1)
        for run in whole_call if self.runs is None else self.runs:
            begin, end, first, last = run[:4]
            column = column if before == (begin, end) else 0  # another run of the same segment
            before = (begin, end)
            steps = range(first, last) if by_expert else (first,)
            for e in steps:
                low, high = self.offsets[e], self.offsets[e + 1 if by_expert else last]
                size = max(high - low, 1) if whole else MAX_RANKS
                for rank in range(low, max(high, low + whole), size):
                    top = min(rank + size, high)
                    owner = e if by_expert else self._owner(rank)
                    mask = (run.seed, run.mask_row, run.mask_expert + e - first)
                    pieces.append(Piece(begin, end, rank, top, column + rank - low, owner, *mask))
                column += high - low
        return pieces

    def _owner(self, rank: int) -> int:
        return next(e for e in range(len(self.ranks)) if rank < self.offsets[e + 1])

    def _table(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        flat = torch.tensor([list(row) for row in rows], dtype=torch.int32)
        return flat.reshape(len(rows), width).to(self.device)


class GradientItems:
    """Items with the span of ranks whose gradient is asked for, and where each expert's parts are.

    items [I, 11]: a piece's nine numbers, span_begin, span_end. entries [P, 4]: item, row in the
    item's span, first and last of the expert's ranks there. entry_offsets [E' + 1] and ranks [E']
    for the E' experts asked for, in order.
    """

    def __init__(self, layout: Layout, rows: int, need: tuple[bool, ...]) -> None:
        wanted = [e for e, n in enumerate(need) if n]
        items: list[tuple[int, ...]] = []
        parts: dict[int, list[tuple[int, int, int, int]]] = {e: [] for e in wanted}
        spans = []
        for piece in layout.pieces:
            inside = []
            for e in wanted:
                low = max(layout.offsets[e], piece.rank_begin)
                high = min(layout.offsets[e + 1], piece.rank_end)
                if low < high:
                    inside.append((e, low, high))
            begin = min((low for _, low, _ in inside), default=piece.rank_begin)
            end = max((high for _, _, high in inside), default=piece.rank_begin)
            spans.append(end - begin)
            for item in _rows(piece, rows):
                for e, low, high in inside:
                    first = layout.offsets[e]
                    parts[e].append((len(items), low - begin, low - first, high - first))
                items.append((*item, begin, end))
        self.count = len(items)
        self.block_s = rank_block(spans)
        self.items = layout._table(items, len(Piece._fields) + 2)
        self.entries = layout._table([part for e in wanted for part in parts[e]], 4)
        offsets = [0, *accumulate(len(parts[e]) for e in wanted)]
        self.entry_offsets = torch.tensor(offsets, dtype=torch.int32).to(layout.device)
        ranks = [layout.ranks[e] for e in wanted]
        self.ranks = torch.tensor(ranks, dtype=torch.int32).to(layout.device)
        self.max_rank = max(ranks, default=0)


def rank_block(sizes: Iterable[int]) -> int:
    """The power of two, 16 at least (a dot needs it), that holds the largest of the sizes."""
    return max(16, 1 << (max(sizes, default=1) - 1).bit_length())


class RankTables(NamedTuple):
    """What is the same for any number of rows: expert [R] int32, scale [R] fp32, offset [E + 1]."""

    expert: Tensor
    scale: Tensor
    offset: Tensor


@lru_cache(maxsize=1024)
def rank_tables(
    ranks: tuple[int, ...], scale: tuple[float, ...], device: torch.device
) -> RankTables:
    """The kept tables of these ranks and scales."""
    owners = tuple(e for e, r in enumerate(ranks) for _ in range(r))
    return RankTables(
        constant(owners, torch.int32, device),
        constant(tuple(scale[e] for e in owners), torch.float32, device),
        constant((0, *accumulate(ranks)), torch.int32, device),
    )


layout = lru_cache(maxsize=4096)(Layout)
"""The kept Layout of these values."""


def _rows(piece: Piece, rows: int) -> list[Piece]:
    return [
        piece._replace(row_begin=begin, row_end=min(begin + rows, piece.row_end))
        for begin in range(piece.row_begin, piece.row_end, rows)
    ]
