"""Views where the parameters' storage is adjacent, a copy everywhere else."""

from __future__ import annotations

import torch

from fedms.kernels.packing import stack_columns, stack_rows


def test_adjacent_rows_are_a_view():
    whole = torch.randn(6, 5)
    parts = [whole[:2], whole[2:3], whole[3:]]
    assert stack_rows(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(stack_rows(parts), whole)
    # Read again on every call: writing through .data moves the storage and leaves _version alone.
    moved = torch.nn.Parameter(whole[2:3])
    version = moved._version
    moved.data = torch.ones(1, 5)
    assert moved._version == version
    assert torch.equal(stack_rows([parts[0], moved, parts[2]])[2], torch.ones(5))


def test_other_rows_are_copied():
    whole = torch.randn(6, 5)
    for parts in (
        [whole[3:], whole[:3]],  # order
        [whole[:2], whole[3:]],  # a gap
        [whole[:3], whole[:3]],  # one listed twice
        [whole[:3], whole[3:].clone()],
        [whole.t()[:2], whole.t()[2:]],  # strided
    ):
        assert torch.equal(stack_rows(parts), torch.cat(parts))


def test_columns():
    whole = torch.randn(4, 6)
    parts = [whole[:, :2], whole[:, 2:3], whole[:, 3:]]
    assert stack_columns(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(stack_columns(parts), whole)
    for others in (
        [whole[:, 3:], whole[:, :3]],
        [whole[:, :2], whole[:, 3:], whole[:, 2:3]],  # starts right, goes on wrong
        [whole[:, :2], whole[:, 3:]],
        [whole, whole],
    ):
        assert torch.equal(stack_columns(others), torch.cat(others, dim=1))
