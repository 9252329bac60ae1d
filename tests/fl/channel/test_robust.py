"""Robust aggregates against worked examples, and what an attacker can do to them."""

from __future__ import annotations

import pytest
import torch

from fedms.fl.channel.robust import (
    Robust,
    bipartition,
    bound,
    larger_group,
    median,
    multi_krum,
    trimmed_mean,
)
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
    # beside four at 0, 19 scores 4 + 361 + 361 and so less than -16 with 3 * 256 or 21; with one
    # neighbour more it would be 1087 against 1024
    assert multi_krum(column(0, 0, 0, 0, 19, 21, -16), 2) == [0, 1, 2, 3, 4]
    with pytest.raises(QuorumError, match="3 hostile clients needs 9 updates, 7 came"):
        multi_krum(line, 3)


def test_multi_krum_does_not_lose_digits_far_from_zero():
    """Updates are near each other and far from zero; |x|^2 + |y|^2 - 2 xy would cancel."""
    near = 1e6 + torch.arange(30).double()[:, None] * 1e-3
    far = torch.full((6, 1), 1e6 + 5.0).double() + torch.arange(6)[:, None]
    assert multi_krum(torch.cat([far, near]), 6) == list(range(6, 36))


def diverse(*factors: float) -> torch.Tensor:
    """Changes [n, n + 1] of 1 that all share and 2 that is each one's own, times its factor.

    Any two of the same sign have cosine 1 / 5, of other signs -1 / 5.
    """
    n = len(factors)
    changes = torch.cat([torch.ones(n, 1), 2 * torch.eye(n)], dim=1).double()
    return torch.tensor(factors)[:, None] * changes


def test_the_bipartition_leaves_out_changes_that_are_turned_round():
    """Halved, too, they are nearer to everyone than honest ones.

    n = 7, f = 2. Squared distances: honest 8, hostile 2, between them 1.5^2 + 4 + 1 = 7.25, so by
    their 3 nearest honest ones score 22.5 and hostile ones 16.5: multi-Krum keeps them.
    """
    changes = diverse(-0.5, 1, 1, -0.5, 1, 1, 1)
    assert {0, 3} < set(multi_krum(changes, 2))
    mean = torch.tensor([1, 0, 0.4, 0.4, 0, 0.4, 0.4, 0.4]).double()
    torch.testing.assert_close(bipartition(changes, 2), mean)
    with pytest.raises(QuorumError, match="bipartition against 4 hostile clients needs 9 updates"):
        bipartition(changes, 4)


def test_a_long_change_of_an_honest_direction_stays_and_counts_for_one():
    """As long as the median, 5 ** 0.5, if it was longer; shorter ones are not stretched."""
    changes = diverse(-0.5, 1, 1e6, -30, 1, 0.5, 1)
    mean = torch.tensor([0.9, 0, 0.4, 0.4, 0, 0.4, 0.2, 0.4]).double()
    torch.testing.assert_close(bipartition(changes, 2), mean)
    # nobody is hostile, all are chosen: lengths 1, 2, 2, 9 times 5 ** 0.5, whose median is 2
    mean = torch.tensor([7, 2, 4, 4, 4]).double() / 4
    torch.testing.assert_close(bipartition(diverse(1, 2, 9, 2), 0), mean)


def cosines(
    within: float, across: float, small: float, larger: int = 3, smaller: int = 2
) -> torch.Tensor:
    """Within the larger group, which stands first, across, and within the smaller."""
    found = torch.full((larger + smaller, larger + smaller), within).double()
    found[:larger, larger:] = found[larger:, :larger] = across
    found[larger:, larger:] = small
    return found.fill_diagonal_(1)


@pytest.mark.parametrize("numbers", [(0.2, -0.2, 0.2), (0.1, 0.0, 0.9), (0.1, -0.1, -0.1)])
def test_the_larger_group_by_hand(numbers):
    """However alike the smaller is; in the last case by those across alone."""
    order = torch.tensor([3, 0, 1, 4, 2])
    found = cosines(*numbers)
    assert larger_group(found, 2) == [0, 1, 2]
    assert larger_group(found[order][:, order], 2) == [1, 2, 4]
    assert larger_group(found, 0) == [0, 1, 2, 3, 4]


def test_the_two_farthest_apart_are_not_the_smaller_group():
    """2 and 3 differ most, which is the direction of the largest variance; 2 belongs to 0 and 1.

    With 3 and 4 put apart cosines sum to 4 * 0.1 within and to -5 * 0.1 - 0.5 across, 1.4 in all;
    with 2 and 3 to -0.1 - 0.5 within and to 0 across.
    """
    found = cosines(0.1, -0.1, 0.1)
    found[2, 3] = found[3, 2] = -0.5
    centred = found - found.mean(0)
    spread = torch.linalg.eigh(centred - centred.mean(1, keepdim=True)).eigenvectors[:, -1].abs()
    assert sorted(spread.argsort()[-2:].tolist()) == [2, 3]
    assert larger_group(found, 2) == [0, 1, 2]


def test_who_differs_from_nobody_is_not_left_out():
    """f bounds how many are."""
    assert larger_group(torch.full((7, 7), 0.1).double(), 3) == list(range(7))
    assert larger_group(cosines(0.1, -0.1, 0.1, larger=7), 4) == list(range(7))
    assert larger_group(cosines(0.1, 0.02, 0.02, larger=7), 4) == list(range(9))


def test_hostile_clients_who_are_more_alike_than_honest_ones_are_left_out():
    """As those are who learn the same wrong labels: such cosines were measured."""
    found = cosines(0.15, -0.03, 0.33, larger=14, smaller=6)
    assert larger_group(found, 6) == list(range(14))


@pytest.mark.parametrize("links", [0.05, 0.02])
def test_a_pair_that_is_alike_across_does_not_change_sides_for_it(links):
    """5 fits the smaller group (pull -0.25) better than 6 does (-0.2), but for 6 alone.

    With 6 and 7 put apart cosines sum to 10 * 0.1 + 5 * 0.05 + 0.1 within and to -10 * 0.1 + 0.4 +
    0.1 across, 1.85 in all. Next are 7 alone with 1.45, and 5 and 6 with 0.95.
    """
    found = cosines(0.1, -0.1, 0.1, larger=6)
    found[5, :5] = found[:5, 5] = links  # with 0.02 the search begins with 5 and 6 put apart
    found[5, 6] = found[6, 5] = 0.4
    found[5, 7] = found[7, 5] = 0.1
    assert larger_group(found, 2) == [0, 1, 2, 3, 4, 5]


def test_lengths_do_not_decide_who_is_in_the_larger_group():
    draw = torch.Generator().manual_seed(0)
    changes = torch.randn(20, 200, generator=draw) + 0.2
    changes[:6] *= -1
    directions = (changes / changes.norm(dim=1, keepdim=True)).double()
    lengths = torch.ones(20, 1).double()
    lengths[[2, 9, 15]] = 50.0
    mean = bipartition(directions, 6)
    torch.testing.assert_close(mean, directions[6:].mean(0))
    torch.testing.assert_close(bipartition(lengths * directions, 6), mean)


def test_who_changes_nothing_is_no_number_less():
    assert bipartition(torch.zeros(3, 2), 0).tolist() == [0, 0]
    changes = torch.tensor([[0.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    assert bipartition(changes, 0).tolist() == [0, 2]


def test_the_server_moves_from_what_clients_began_with():
    """Which need not be what it holds: nobody has sent v before."""
    reference = {"v": torch.tensor([[100.0], [200.0]]), "w": torch.tensor([300.0])}
    changes = diverse(1, 1)  # [2, 3]: v and w by turns
    each = {
        str(i): {"w": reference["w"] + row[2:], "v": reference["v"] + row[:2, None]}
        for i, row in enumerate(torch.cat([changes, diverse(1, 1)]).float())
    }
    server = {"w": torch.zeros(1), "other": torch.ones(1)}
    after = Robust("bipartition", 0, reference)(server, each, {})
    assert after["v"].tolist() == [[101], [201]]
    assert after["w"].tolist() == [301]
    assert after["other"] is server["other"]


RULES = ["median", "trimmed_mean", "multi_krum", "bipartition"]


@pytest.mark.parametrize("rule", RULES)
def test_three_of_ten_cannot_move_it_far(rule):
    draw = torch.Generator().manual_seed(0)
    honest = {f"h{i}": {"w": 1 + 0.1 * torch.randn(50, generator=draw)} for i in range(7)}
    hostile = {f"x{i}": {"w": torch.full((50,), -1e6)} for i in range(3)}
    server = {"w": torch.zeros(50), "v": torch.ones(1)}
    after = Robust(rule, 3, server)(server, {**hostile, **honest}, {})
    assert (after["w"] - 1).abs().max() < 0.3
    assert after["v"] is server["v"]


@pytest.mark.parametrize("rule", RULES)
def test_too_few_to_outvote_them_is_an_error(rule):
    """f is of the cohort that was drawn: honest clients that fail make nobody honest."""
    each = {str(i): {"w": column(float(i))} for i in range(6)}
    with pytest.raises(QuorumError, match=r"against 3 hostile clients needs [79] updates, 6 came"):
        Robust(rule, 3, each["0"])({}, each, {})


@pytest.mark.parametrize("rule", RULES)
def test_nobody_and_nothing_leave_the_server_as_it_is(rule):
    server = {"w": torch.ones(1)}
    assert Robust(rule, 0, server)(server, {}, {}) is server
    assert Robust(rule, 0, server)(server, {c: {} for c in "abc"}, {}) is server


def test_the_bound_is_not_lost_to_rounding():
    assert bound(100, 0.29) == 29  # 0.29 * 100 is below 29
    assert bound(20, 0.3) == 6
    assert bound(3, 0.3) == 0


@pytest.mark.parametrize("rule", RULES)
def test_sums_are_not_rounded_to_what_was_sent(rule):
    """1 and 1 + 2^-7 are neighbours in bfloat16."""
    one, two = torch.tensor([[1, 1 + 2**-7], [1 + 2**-7, 1]]).bfloat16()
    each = {"a": {"w": one}, "b": {"w": two}, "c": {"w": two}, "d": {"w": one}}
    after = Robust(rule, 0, {"w": torch.ones(2).bfloat16()})({}, each, {})["w"]
    assert after.tolist() == [1 + 2**-8] * 2
