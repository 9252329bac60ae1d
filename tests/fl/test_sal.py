"""SAL, worked by hand: in which order blocks wake, and after which score."""

from __future__ import annotations

import json

import pytest

from fedms.fl.sal import Activation, SalConfig, wake_order


def never() -> list[float]:
    raise AssertionError("importance was asked for")


def awake_after(
    config: SalConfig, order: list[int], scores: list[float | None]
) -> list[tuple[int, ...]]:
    activation = Activation(config, order)
    seen = [activation.awake]
    for score in scores:
        activation.observe(score)
        seen.append(activation.awake)
    return seen


def test_orders():
    assert wake_order(SalConfig(order="deep_to_shallow", max_blocks=3), 6, 0, never) == [5, 4, 3]
    assert wake_order(SalConfig(order="shallow_to_deep", max_blocks=3), 6, 0, never) == [0, 1, 2]
    assert wake_order(SalConfig(order="deep_to_shallow", max_blocks=9), 4, 0, never) == [3, 2, 1, 0]
    scores = [0.1, 0.9, 0.3, 0.9]
    assert wake_order(SalConfig(order="importance", max_blocks=3), 4, 0, lambda: scores) == [
        1,
        3,
        2,
    ]


def test_a_random_order_is_a_permutation_that_the_seed_chooses():
    config = SalConfig(order="random", max_blocks=8)
    orders = [wake_order(config, 8, seed, never) for seed in range(4)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert wake_order(config, 8, 2, never) == orders[2]


def test_the_capability_queue():
    """Queue of 3, threshold 0.05: a gain of 0.10 wakes nothing, 0.03 wakes two and clears it."""
    config = SalConfig(queue_length=3, threshold=0.05, start_blocks=1, wake_blocks=2, max_blocks=5)
    scores = [0.50, 0.52, 0.60, 0.55, 0.64, 0.64, 0.64, 0.64]
    # queue:   .50  .50    .50    .52    .60   .64   .64   .64
    #               .52    .52    .60    .55         .64   .64
    #                      .60    .55    .64               .64
    # gain:    -    -      .10    .03    -     -     -     -     (after .55 the queue is cleared)
    seen = awake_after(config, [5, 4, 3, 2, 1], scores)
    assert seen == [
        (5,),
        (5,),
        (5,),
        (5,),
        (3, 4, 5),
        (3, 4, 5),
        (3, 4, 5),
        (1, 2, 3, 4, 5),
        (1, 2, 3, 4, 5),
    ]


def test_a_gain_of_exactly_the_threshold_wakes_nothing():
    config = SalConfig(queue_length=2, threshold=0.25, max_blocks=2)
    assert awake_after(config, [1, 0], [0.5, 0.75]) == [(1,), (1,), (1,)]
    assert awake_after(config, [1, 0], [0.5, 0.625]) == [(1,), (1,), (0, 1)]


def test_a_score_that_was_not_measured_does_not_enter_the_queue():
    config = SalConfig(queue_length=2, threshold=0.1, max_blocks=2)
    assert awake_after(config, [1, 0], [0.5, None, 0.5]) == [(1,), (1,), (1,), (0, 1)]
    assert awake_after(config, [1, 0], [None] * 5)[-1] == (1,)


def test_every_third_round_whatever_the_score():
    config = SalConfig(trigger="every", every=3, wake_blocks=1, max_blocks=3)
    seen = awake_after(config, [2, 1, 0], [0.1, 0.5, 0.9, None, 0.9, 0.9, 0.9])
    assert seen == [(2,), (2,), (2,), (1, 2), (1, 2), (1, 2), (0, 1, 2), (0, 1, 2)]


@pytest.mark.parametrize("config", [SalConfig(trigger="all_at_once"), SalConfig(enabled=False)])
def test_all_at_once(config):
    assert awake_after(config, [3, 2, 1], [0.5, 0.5, 0.5]) == [(1, 2, 3)] * 4


def test_observe_says_whether_blocks_woke():
    activation = Activation(SalConfig(trigger="every", every=1, max_blocks=2), [1, 0])
    assert [activation.observe(0.0) for _ in range(3)] == [True, False, False]


def test_depths_are_where_a_forward_may_have_to_start():
    config = SalConfig(trigger="every", every=1, wake_blocks=1, max_blocks=4)
    activation = Activation(config, [3, 5, 1, 4])
    assert activation.depths == [1, 3]
    activation.observe(None)
    assert activation.depths == [1, 3]
    activation.observe(None)
    assert activation.depths == [1]


def test_a_client_trains_the_deepest_blocks_within_its_budget():
    config = SalConfig(scope="client", trigger="all_at_once", min_budget=2, max_blocks=4)
    activation = Activation(config, [5, 4, 3, 2])
    budgets = {}
    for k in range(40):
        blocks = activation.client_blocks(f"client-{k:02d}", seed=0)
        assert blocks == (2, 3, 4, 5)[-len(blocks) :]
        assert blocks == activation.client_blocks(f"client-{k:02d}", seed=0)
        budgets[k] = len(blocks)
    assert set(budgets.values()) == {2, 3, 4}
    few = Activation(SalConfig(scope="client", min_budget=2, max_blocks=4), [5, 4, 3, 2])
    assert {few.client_blocks(f"client-{k:02d}", seed=0) for k in range(40)} == {(5,)}
    everyone = Activation(SalConfig(trigger="all_at_once"), [5, 4, 3])
    assert everyone.client_blocks("client-00", seed=0) == (3, 4, 5)


@pytest.mark.parametrize(
    "config",
    [
        SalConfig(max_blocks=4, wake_blocks=1, threshold=0.05),
        SalConfig(trigger="every", wake_blocks=1, max_blocks=4),
    ],
)
@pytest.mark.parametrize("stop", range(1, 9))
def test_a_restored_activation_goes_on_as_if_it_had_not_stopped(config, stop):
    scores = [0.1, 0.3, 0.31, 0.3, 0.5, 0.5, 0.7, 0.71, 0.7]
    order = [5, 2, 4, 0]
    whole = awake_after(config, order, scores)
    first = Activation(config, order)
    for score in scores[:stop]:
        first.observe(score)
    second = Activation(config, [0])  # the order comes from the state
    second.restore(json.loads(json.dumps(first.state())))
    seen = [second.awake]
    for score in scores[stop:]:
        second.observe(score)
        seen.append(second.awake)
    assert seen == whole[stop:]
    assert len(set(whole)) > 2
