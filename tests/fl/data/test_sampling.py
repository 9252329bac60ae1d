"""Draws depend on names and on nothing else."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from fedms.fl.data.sampling import draw_batches, draw_cohort, draw_each, generator

IDS = [f"client-{k:02d}" for k in range(20)]


def test_a_cohort_depends_on_seed_and_round_alone():
    first = draw_cohort(IDS, 0.5, 3, 7)
    for other in range(1, 7):  # rounds before do not matter
        draw_cohort(IDS, 0.5, 3, other)
    np.random.default_rng().random()
    assert draw_cohort(IDS, 0.5, 3, 7) == first
    assert draw_cohort(IDS, 0.5, 3, 8) != first
    assert draw_cohort(IDS, 0.5, 4, 7) != first


@pytest.mark.parametrize(
    ("fraction", "clients", "size"),
    [
        (1.0, 20, 20),
        (0.5, 20, 10),
        (0.51, 20, 11),
        (0.01, 20, 1),
        (0.55, 20, 11),
        (0.07, 100, 7),
        (0.1, 3, 1),
    ],
)
def test_the_size_of_a_cohort_is_the_fraction_rounded_up(fraction, clients, size):
    """0.07 * 100 is a hair above 7 in floating point; that must not add a client."""
    assert len(draw_cohort([str(k) for k in range(clients)], fraction, 0, 1)) == size


def test_a_cohort_repeats_nobody_keeps_the_order_and_reaches_everybody():
    seen = set()
    for round in range(1, 30):
        cohort = draw_cohort(IDS, 0.3, 0, round)
        assert cohort == sorted(set(cohort))
        assert len(cohort) == 6
        seen.update(cohort)
    assert seen == set(IDS)


def test_each_client_is_drawn_by_itself():
    """Poisson sampling: sizes of a binomial, and one client's chance does not hang on another's."""
    rounds = [draw_each(IDS, 0.3, 0, round) for round in range(1, 2001)]
    sizes = np.array([len(cohort) for cohort in rounds])
    assert sizes.mean() == pytest.approx(20 * 0.3, rel=0.03)
    assert sizes.var() == pytest.approx(20 * 0.3 * 0.7, rel=0.1)
    both = np.mean([{IDS[0], IDS[7]} <= set(cohort) for cohort in rounds])
    assert both == pytest.approx(0.3**2, abs=0.02)
    assert draw_each(IDS, 0.3, 0, 7) == rounds[6] != draw_each(IDS, 0.3, 1, 7)
    assert draw_each(IDS, 1.0, 0, 1) == IDS
    assert not all(draw_each(IDS, 0.02, 0, round) for round in range(1, 20))


@pytest.mark.parametrize(
    ("batch_size", "steps"), [(3, 1), (3, 4), (3, 9), (10, 3), (25, 5), (1, 23)]
)
def test_every_index_is_seen_before_one_is_seen_again(batch_size, steps):
    indices, lengths = np.arange(100, 110), np.arange(10) % 4
    batches = [*draw_batches(indices, lengths, batch_size, steps, generator(0, "batches"))]
    assert len(batches) == steps
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    per_pass = -(-len(indices) // batch_size)
    for start in range(0, steps, per_pass):
        drawn = np.concatenate(batches[start : start + per_pass]).tolist()
        assert len(set(drawn)) == len(drawn)
        if start + per_pass <= steps:
            assert set(drawn) == set(indices.tolist())


def test_a_batch_holds_texts_of_like_length():
    lengths = np.array([5, 1, 3, 1, 5, 3])
    batches = draw_batches(np.arange(6), lengths, 2, 3, generator(0, "batches"))
    assert sorted(sorted(batch.tolist()) for batch in batches) == [[0, 4], [1, 3], [2, 5]]


def test_each_pass_over_the_data_has_an_order_of_its_own():
    same = np.zeros(30, dtype=np.int64)
    batches = draw_batches(np.arange(30), same, 30, 3, generator(0, "batches"))
    assert len({tuple(batch.tolist()) for batch in batches}) == 3
    orders = {
        tuple(len(batch) for batch in draw_batches(np.arange(5), same[:5], 2, 3, generator(seed)))
        for seed in range(20)
    }
    assert orders == {(2, 2, 1), (2, 1, 2), (1, 2, 2)}  # the short batch is not always the last


def test_batches_are_drawn_when_they_are_asked_for():
    """The next billion takes no memory."""
    plan = draw_batches(np.arange(5), np.ones(5), 2, 10**9, generator(0, "batches"))
    assert [len(batch) for batch in islice(plan, 7)].count(1) == 2
    assert len([*draw_batches(np.arange(5), np.ones(5), 2, 7, generator(0, "batches"))]) == 7


def test_names_make_streams():
    draws = {
        tuple(generator(seed, *names).integers(2**32, size=3).tolist())
        for seed in (0, 1)
        for names in ((), ("a",), ("b",), ("a", 1), ("a", 2), ("a", 1, "x"))
    }
    assert len(draws) == 12
    again = [generator(5, "a", 2).integers(2**32, size=3).tolist() for _ in range(2)]
    assert again[0] == again[1]
