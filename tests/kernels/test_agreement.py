"""The check that results pass before they are timed or chosen."""

from __future__ import annotations

import re

import pytest
import torch

from fedms.kernels.agreement import difference


def rows(count: int = 40000) -> torch.Tensor:
    return torch.randn(count, 16, dtype=torch.float64)


def test_rounding_agrees():
    truth = [rows(), torch.randn(7, dtype=torch.float64), torch.empty(0, dtype=torch.float64)]
    assert difference([t.bfloat16() for t in truth], truth, 2e-2) == ""


def wrong_row(t):
    return torch.cat([t[:-1], -t[-1:]])


def zero_tile(t):
    return t.index_fill(0, torch.arange(64), 0.0)


def not_finite(t):
    return t.index_fill(0, torch.tensor([3]), float("nan"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (wrong_row, "a row of output 1 is off by"),
        (zero_tile, "output 1 is off by"),
        (not_finite, "output 1 is off by nan"),
        (lambda t: t[:-1], r"output 1 has shape \[39999, 16\], must have \[40000, 16\]"),
    ],
    ids=["row", "tile", "nan", "shape"],
)
def test_what_is_wrong_is_named(spoil, said):
    truth = [rows(5), rows()]
    assert re.match(said, difference([truth[0], spoil(truth[1])], truth, 2e-2))


def test_one_wrong_row_is_within_the_bound_of_the_whole():
    """What the check of single rows is for."""
    truth = rows()
    assert (wrong_row(truth) - truth).norm() < 2e-2 * truth.norm()


def test_zeros_must_be_zeros():
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    assert difference([zeros], [zeros], 1e-4) == ""
    assert "off by" in difference([zeros + 1e-9], [zeros], 1e-4)
