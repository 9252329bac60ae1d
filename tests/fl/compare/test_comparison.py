"""Ranks, intervals, full tables and frontiers, worked by hand."""

from __future__ import annotations

import pytest
from results import result

from fedms.fl.compare.cells import bracketed, ranged
from fedms.fl.compare.comparison import Comparison, FullTable, Interval, interval
from fedms.fl.compare.result import Block, Point, balance, frontier, own_at
from fedms.fl.tasks.causal_lm import BITS
from fedms.fl.tasks.classify import ACCURACY


def own(run):
    return run.scores.own


def test_ranks_share_ties_and_are_means_over_blocks():
    found = Comparison([
        result("a", 0.9), result("b", 0.9), result("c", 0.1),
        result("a", 0.5, seed=1), result("b", 0.6, seed=1), result("c", 0.7, seed=1),
    ])  # fmt: skip
    table = found.most_blocks()
    assert table == (["a", "b", "c"], [Block("one", 0), Block("one", 1)])
    ranks = found.ranks(table, own)
    assert {m: rank.mean for m, rank in ranks.items()} == {"a": 2.25, "b": 1.75, "c": 2.0}
    assert (ranks["c"].low, ranks["c"].high) == (1.0, 3.0)


def test_a_score_that_a_run_lacks_gives_no_ranks_and_no_difference_there():
    found = Comparison([
        result("a", 0.9, 0.5), result("b", 0.5, None), result("a", 0.4, 0.4, 1),
        result("b", 0.2, 0.4, 1),
    ])  # fmt: skip
    assert found.ranks(found.most_blocks(), lambda run: balance(run.scores)) == {}
    gain = found.difference(lambda run: balance(run.scores), "a", "b")
    assert gain == pytest.approx((0.1, 0.1, 0.1))
    assert found.difference(own, "a", "b") == pytest.approx((0.3, 0.2, 0.4))
    assert found.difference(own, "a", "nobody") is None


def test_the_bootstrap_of_equal_values_is_that_value_and_of_two_reaches_from_one_to_the_other():
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert interval([7.0]) == (7.0, 7.0, 7.0)
    assert interval([0.0, 1.0]) == (0.5, 0.0, 1.0)  # a quarter of the means are 0, a quarter 1


def test_the_bootstrap_draws_as_the_mathematics_says():
    # of 100 values with deviation 1 the mean has 0.1: 1.96 of them to either side
    values = [1.0, -1.0] * 50
    assert interval(values) == pytest.approx((0.0, -0.196, 0.196), abs=0.012)


def test_the_last_run_of_a_method_in_a_block_counts():
    found = Comparison([result("a", 0.1), result("a", 0.2)])
    assert [own(run) for run in found.of("one", "a")] == [0.2]


def rows(**methods: str) -> Comparison:
    """``rows(one="abc", two="ab")``: which methods ran in which block of its own setting."""
    return Comparison(
        result(method, 0.5, setting=setting) for setting, ran in methods.items() for method in ran
    )


def test_two_full_tables_of_rows_of_uneven_length():
    found = rows(one="abcdefgh", two="abcdefgh", three="abcdefg", four="abcdef", five="abcde",
                 six="ab")  # fmt: skip
    long, wide = found.most_blocks(), found.most_methods()
    assert "".join(long.methods) == "abcde"
    assert {block.setting for block in long.blocks} == {"one", "two", "three", "four", "five"}
    assert "".join(wide.methods) == "abcdefgh"
    assert {block.setting for block in wide.blocks} == {"one", "two"}


def test_most_methods_takes_every_block_that_has_them_all():
    found = rows(one="abc", two="abc", three="abc", four="abc", five="ab")
    assert [len(part) for part in found.most_methods()] == [3, 4]
    assert [len(part) for part in found.most_blocks()] == [3, 4]


def test_few_methods_and_blocks_are_compared_as_they_are():
    assert rows(one="a").most_blocks() == (["a"], [Block("one", 0)])
    assert rows(one="ab", two="abc").most_methods() == FullTable(
        ["a", "b"], [Block("one", 0), Block("two", 0)]
    )
    assert Comparison([]).most_blocks() == Comparison([]).most_methods() == ([], [])


def test_a_setting_compares_its_methods_over_the_same_seeds():
    found = Comparison([
        *(result(m, 0.5, seed=seed) for m in "ab" for seed in (0, 1)),
        result("c", 0.9), result("d", 0.9, seed=2), result("a", 0.1, seed=3, setting="two"),
    ])  # fmt: skip
    seeds = {m: [run.block.seed for run in found.of("one", m)] for m in found.labels}
    assert seeds == {"a": [0, 1], "b": [0, 1], "c": [], "d": []}
    assert [run.block.seed for run in found.of("two", "a")] == [3]


def test_units_are_kept_apart():
    found = Comparison([result("a", 0.5), result("a", -3.0, -4.0, setting="two", metric=BITS)])
    assert {m: part.settings() for m, part in found.by_metric().items()} == {
        ACCURACY: ["one"], BITS: ["two"]
    }  # fmt: skip


def test_own_data_at_equal_everyones_lies_between_the_knobs():
    points = {0.5: Point(0.8, 0, 0.6, None), -0.5: Point(0.4, 0, 0.7, None)}
    curve = frontier([result("a", 0.7, 0.7, by_knob=points)])
    assert curve == [(-0.5, 0.7, 0.4), (0.0, 0.7, 0.7), (0.5, 0.6, 0.8)]
    assert own_at(curve, 0.65) == pytest.approx(0.75)
    assert own_at(curve, 0.6) == 0.8
    assert own_at(curve, 0.5) == 0.8
    assert own_at(curve, 0.71) is None


def test_a_frontier_has_the_knobs_that_all_seeds_were_scored_at():
    def at(*knobs: float) -> dict[float, Point]:
        return {knob: Point(0.9, 0, 0.1, None) for knob in knobs}

    curve = frontier([
        result("a", 0.4, 0.2, by_knob=at(0.5, 1.0)), result("a", 0.6, 0.4, by_knob=at(0.5)),
    ])  # fmt: skip
    assert curve == [(0.0, pytest.approx(0.3), 0.5), (0.5, 0.1, 0.9)]
    assert frontier([result("a", 0.4, None, by_knob=at(0.5))]) == []


def test_numbers_as_people_read_them():
    assert ranged(ACCURACY, [0.738, 0.792]) == "76.5 (73.8–79.2)"
    assert ranged(ACCURACY, [0.5]) == "50.0"
    assert ranged(ACCURACY, [None]) == "–"
    assert ranged(BITS, [-4.0, -3.5]) == "3.750 (3.500–4.000)"
    assert bracketed(Interval(0.045, 0.023, 0.072), 100, 1, signed=True) == "+4.5 [+2.3, +7.2]"
    assert bracketed(Interval(0.5, 0.25, 1.0), -1, 2) == "-0.50 [-1.00, -0.25]"
