"""What the CUDA kernels read from device memory besides tensors; tables.py keeps it there.

Segments become `Routes`: rows that use the same experts are a group, however many segments they
come from, so a thousand segments of two rows are a few full tiles. The layout of the words is
csrc/cuda/problem.cuh's: groups, members, row sets, ranges, all int32.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache

from fedms.kernels.segments import Run

_RANGE_WORDS = 6
Range = tuple[int, ...]  # position, row, column, seed, mask_row, mask_expert: csrc/cuda/problem.cuh


@dataclass(frozen=True)
class Routes:
    """Segments as the kernels walk them.

    words: the tables. max_rows: of an expert. The counts are those of csrc/cuda/problem.cuh.
    """

    words: bytes
    max_rows: int
    num_groups: int
    num_members: int
    group_tiles: int
    member_tiles: int


@lru_cache(maxsize=64)
def routes_of(runs: tuple[Run, ...], ranks: tuple[int, ...], tile_rows: int) -> Routes:
    """`read_runs` of experts of these ranks, in tiles of `tile_rows` rows."""
    # An expert with where its masks begin; and rows with whose they are.
    experts_of_rows: dict[tuple[int, int, int, int], list[tuple[int, int]]] = {}
    for run in runs:
        rows = (run.row_begin, run.row_end, run.seed, run.mask_row)
        members = ((e, run.mask_expert + e - run.expert_begin)
                   for e in range(run.expert_begin, run.expert_end))  # fmt: skip
        experts_of_rows.setdefault(rows, []).extend(members)
    groups: dict[tuple[tuple[int, int], ...], list[tuple[int, int, int, int]]] = {}
    for rows, experts in experts_of_rows.items():
        groups.setdefault(tuple(experts), []).append(rows)

    group_words, member_words, ranges = array("i"), array("i"), array("i")
    row_sets: list[list[Range]] = [[] for _ in ranks]
    counts = [0] * len(ranks)
    group_tiles = member_tiles = num_members = 0
    for g, (experts, spans) in enumerate(groups.items()):
        first_range, rows = len(ranges) // _RANGE_WORDS, 0
        for begin, end, seed, mask_row in spans:
            ranges.extend((rows, begin, 0, seed, mask_row, 0))
            rows += end - begin
        tiles = -(-rows // tile_rows)
        last_range = len(ranges) // _RANGE_WORDS
        group_words.extend(
            (group_tiles, rows, first_range, last_range, num_members, num_members + len(experts))
        )
        column = 0
        for e, mask_expert in experts:
            member_words.extend((member_tiles, g, e, column, mask_expert))
            for begin, end, seed, mask_row in spans:
                row_sets[e].append((counts[e], begin, column, seed, mask_row, mask_expert))
                counts[e] += end - begin
            member_tiles += tiles
            column += ranks[e]
        num_members += len(experts)
        group_tiles += tiles
    set_words = array("i")
    for rows, row_set in zip(counts, row_sets, strict=True):
        first_range = len(ranges) // _RANGE_WORDS
        for entry in row_set:
            ranges.extend(entry)
        set_words.extend((rows, first_range, first_range + len(row_set)))
    return Routes(
        words=b"".join(t.tobytes() for t in (group_words, member_words, set_words, ranges)),
        max_rows=max(counts, default=0),
        num_groups=len(groups),
        num_members=num_members,
        group_tiles=group_tiles,
        member_tiles=member_tiles,
    )
