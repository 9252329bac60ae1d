"""Robust aggregates against worked examples, and what an attacker can do to them."""

from __future__ import annotations

import pytest
import torch

from fedms.fl.channel.robust import Robust, bound, median, multi_krum, trimmed_mean
from fedms.fl.types import QuorumError


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def test_the_median_by_hand():
    assert median(column(5, -100, 1, 100, 2), 2).tolist() == [2]
    assert median(column(4, -100, 2, 100), 1).tolist() == [3]  # (2 + 4) / 2
    assert median(column(7), 0).tolist() == [7]
    values = torch.tensor([[1.0, 9.0], [2.0, 8.0], [30.0, -70.0]])
    assert median(values, 1).tolist() == [2, 8]  # of each value by itself


def test_the_trimmed_mean_by_hand():
    values = column(1, 2, 3, 6, 1000, -1000)
    assert trimmed_mean(values, 1).tolist() == [3]  # (1 + 2 + 3 + 6) / 4
    assert trimmed_mean(values, 2).tolist() == [2.5]
    assert trimmed_mean(values, 0).tolist() == [2]
    with pytest.raises(QuorumError, match="3 hostile clients needs 7 updates, 6 came"):
        trimmed_mean(values, 3)


def test_multi_krum_by_hand():
    """n = 7, f = 2: each is scored by its n - f - 2 = 3 nearest, the n - f = 5 best stay.

    On a line at 0, 1, 2, 3, 4, 10, 11: scores are 14, 6, 6, 6, 14, 1 + 36 + 49 and 1 + 49 + 64.
    """
    line = column(10, 0, 1, 11, 2, 3, 4)
    assert multi_krum(line, 2) == [1, 2, 4, 5, 6]
    # f = 1: 4 nearest, 6 stay: 4 scores 1 + 4 + 9 + 16 = 30, 10 scores 1 + 36 + 49 + 64 = 150
    assert multi_krum(line, 1) == [0, 1, 2, 4, 5, 6]
    # two alike at 60, the others 10 apart: scores 1400, 600, 600, 600, 900, 0 + 400 + 900 twice, so
    # one of the two comes in. With one neighbour fewer both would, with their own 0 among them too
    assert multi_krum(column(0, 10, 20, 30, 40, 60, 60), 2) == [1, 2, 3, 4, 5]
    with pytest.raises(QuorumError, match="3 hostile clients needs 9 updates, 7 came"):
        multi_krum(line, 3)


def test_multi_krum_does_not_lose_digits_far_from_zero():
    """Updates are near each other and far from zero; |x|^2 + |y|^2 - 2 xy would cancel."""
    near = 1e6 + torch.arange(30).double()[:, None] * 1e-3
    far = torch.full((6, 1), 1e6 + 5.0).double() + torch.arange(6)[:, None]
    assert multi_krum(torch.cat([far, near]), 6) == list(range(6, 36))


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "multi_krum"])
def test_three_of_ten_cannot_move_it_far(rule):
    draw = torch.Generator().manual_seed(0)
    honest = {f"h{i}": {"w": 1 + 0.1 * torch.randn(50, generator=draw)} for i in range(7)}
    hostile = {f"x{i}": {"w": torch.full((50,), -1e6)} for i in range(3)}
    server = {"w": torch.zeros(50), "v": torch.ones(1)}
    after = Robust(rule, 3)(server, {**hostile, **honest}, {})
    assert (after["w"] - 1).abs().max() < 0.3
    assert after["v"] is server["v"]


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "multi_krum"])
def test_too_few_to_outvote_them_is_an_error(rule):
    """f is of the cohort that was drawn: honest clients that fail make nobody honest."""
    each = {str(i): {"w": column(float(i))} for i in range(6)}
    with pytest.raises(QuorumError, match=r"against 3 hostile clients needs [79] updates, 6 came"):
        Robust(rule, 3)({}, each, {})


def test_nobody_leaves_the_server_as_it_is():
    server = {"w": torch.ones(1)}
    assert Robust("median", 0)(server, {}, {}) is server


def test_the_bound_is_not_lost_to_rounding():
    assert bound(100, 0.29) == 29  # 0.29 * 100 is below 29
    assert bound(20, 0.3) == 6
    assert bound(3, 0.3) == 0


def test_bfloat16_is_widened():
    each = {c: {"w": torch.ones(2, dtype=torch.bfloat16)} for c in "abc"}
    assert Robust("median", 0)({}, each, {})["w"].dtype == torch.float32
