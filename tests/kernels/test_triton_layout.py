"""The tables of the Triton kernels, by hand."""

from __future__ import annotations

import pytest
import torch
from lora_problem import triton

if not triton.available():
    pytest.skip("triton is not installed", allow_module_level=True)

from fedms.kernels import Segments
from fedms.kernels.segments import read_runs
from fedms.kernels.triton.layout import Layout, rank_block


def layout(m: int, ranks: tuple[int, ...], segments: Segments | None = None, **kwargs) -> Layout:
    runs = None if segments is None else read_runs(*segments.tensors, None, m, len(ranks))
    width = kwargs.pop("width", sum(ranks))
    return Layout(
        m, width, ranks, (1.0,) * len(ranks), runs, kwargs.pop("dropout", False),
        lambda values, dtype: torch.tensor(values, dtype=dtype),
    )  # fmt: skip


def lines(table: torch.Tensor, width: int) -> list[list[int]]:
    return table.view(-1, width).tolist()


def test_a_dense_call_needs_no_table():
    where, programs = layout(70, (8, 3, 16)).where(32)
    assert where == (None, None)
    assert programs == 3


def test_without_segments_no_table_knows_the_rows():
    """So batches of any size share them: one piece an expert under dropout, for all rows."""
    for m in (70, 71):
        where, programs = layout(m, (8, 3), dropout=True).where(32)
        assert where.count == 2
        assert programs == 6
        assert lines(where.table, 8) == [[0, 0, 0, 8, 0, 0, 0, 0], [0, 0, 8, 11, 8, 1, 0, 0]]
        grad = layout(m, (8, 3), dropout=True).gradient(32, (False, True))
        assert (grad.entries, grad.chunks, grad.count) == (2, 3, 6)
        assert lines(grad.spans, 2) == [[0, 0], [8, 11]]


def test_segments_are_cut_into_items():
    """Experts 0 and 2 are no neighbours: two pieces of the same rows, side by side in h."""
    there = layout(10, (8, 3, 4), Segments([0, 5, 10], [(0, 2), 1]), width=12)
    where, programs = there.where(4)
    assert where.count is None
    assert programs == 6
    assert lines(where.table, 8) == [
        [0, 4, 0, 8, 0, 0, 0, 0], [4, 5, 0, 8, 0, 0, 0, 0], [0, 4, 11, 15, 8, 2, 0, 0],
        [4, 5, 11, 15, 8, 2, 0, 0], [5, 9, 8, 11, 0, 1, 0, 0], [9, 10, 8, 11, 0, 1, 0, 0],
    ]  # fmt: skip
    tiles, offsets = there.of_tiles(8)
    assert [line[:4] for line in lines(tiles.table, 8)] == [
        [0, 5, 0, 8], [0, 5, 11, 15], [5, 10, 8, 11], [5, 10, 8, 11],
    ]  # fmt: skip
    assert offsets.tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("need", "span"),
    [
        ((False, True, False), [8, 16]),
        ((True, False, True), [0, 24]),
        ((False, True, True), [8, 24]),
    ],
)
def test_frozen_experts_are_not_computed(need, span):
    """The span of ranks goes from the first to the last expert asked for."""
    grad = layout(40, (8, 8, 8)).gradient(40, need)
    assert lines(grad.spans, 2) == [span]
    assert grad.block_s == rank_block([span[1] - span[0]])


def test_parts_of_an_expert_in_two_pieces():
    """Expert 1's ranks 100 to 160 lie in the pieces 0:128 and 128:176."""
    grad = layout(40, (100, 60, 16)).gradient(20, (False, True, False))
    assert lines(grad.spans, 2) == [[100, 128], [128, 160]]
    assert (grad.entries, grad.chunks) == (2, 2)
    heads, parts = grad.sums(0, 1)[:3].tolist(), lines(grad.sums(0, 1)[3:], 4)
    assert heads == [0, 2, 60]
    assert parts == [[0, 0, 0, 28], [1, 0, 28, 60]]
