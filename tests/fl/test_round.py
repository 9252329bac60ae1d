"""Whole runs, tiny: fast equals slow, nothing private leaves, one failure stops nobody."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch

from fedms.fl.engines.world import World
from fedms.fl.journal.records import RoundRecord
from fedms.fl.model.prefix import Prefix

METHODS = ("fedms", "fedavg", "fedavg_ft", "local_only", "zero_shot")
SHORT = ("stage1.rounds=1", "stage2.rounds=1", "stage1.local_steps=1", "stage2.local_steps=1")


def numbers(value, at: str = "") -> dict[str, float]:
    """Every number of a record by where it stands."""
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in numbers(inner, f"{at}/{key}").items()
        }
    if isinstance(value, list):
        return {
            k: v for i, inner in enumerate(value) for k, v in numbers(inner, f"{at}/{i}").items()
        }
    return {at: float(value)} if isinstance(value, int | float) else {}


# Fast equals slow ------------------------------------------------------------------------------


def assert_close(found: tuple[list, list], wanted: tuple[list, list]) -> None:
    """Every number of two runs' lines agrees to 1e-9, bytes to what the digits of losses take."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == len(theirs)
        for line, line_wanted in zip(ours, theirs, strict=True):
            a, b = numbers(line), numbers(line_wanted)
            assert a.keys() == b.keys()
            for key, value in b.items():
                # a message says its loss in as many digits as it has, in steps of 8 bytes
                digits = 8 * len(line["participants"]) if key == "/bytes_up" else 1e-9
                assert abs(a[key] - value) <= digits, (line["round"], key)


SLOW = {
    "prefix": ("engine.prefix_cache_mb=0",),
    "global": ("engine.cache_global=false",),
    "cohort": ("engine.cohort=3",),
}
SLOW["all"] = SLOW["prefix"] + SLOW["global"] + SLOW["cohort"]


@pytest.mark.parametrize(
    ("base", "names"),
    [
        ((), ("prefix", "cohort", "all")),
        (("mofm.local_loss=mixture", "lora.dropout=0.3"), ("global", "cohort")),
        (("mofm.combine=layer", "mofm.gate_input=base"), ("all",)),
        (("mofm.clusters=2", "mofm.cluster_rounds=1", "lora.dropout=0.3"), ("all",)),
    ],
)
def test_what_makes_it_fast_changes_no_result(metrics, in_float64, base, names):
    base = (*base, in_float64)
    fast = metrics(*base, name="fast")
    for name in names:
        assert_close(metrics(*base, *SLOW[name], name=name), fast)
    losses = [line["train_loss"] for line in fast[0]]
    assert len(set(losses)) == 4


def test_32_clients_side_by_side_give_what_each_gives_alone(metrics, in_float64):
    """Of three or four training texts each, so their batches differ in size, too."""
    clients = (
        "data.num_clients=32", "data.unseen_clients=1", "data.partitioner=iid",
        "data.min_partition_size=1", "lora.dropout=0.3", "sal.scope=client",
        "sal.trigger=all_at_once",
    )  # fmt: skip
    alone = metrics(*SHORT, in_float64, *clients, "engine.cohort=1", name="1")
    assert len(alone[0][0]["participants"]) == 32
    for cohort in (4, 32):
        cohorts = metrics(*SHORT, in_float64, *clients, f"engine.cohort={cohort}", name=str(cohort))
        assert_close(cohorts, alone)


def test_a_batch_past_the_bound_of_the_cache_gives_the_same(metrics, config, quiet):
    whole = metrics(*SHORT, name="whole")
    world = World(config(), quiet)
    model, everyone = world.model, world.federation.everyone.values()
    own = [np.concatenate([c.train, c.gate, c.val, c.test]) for c in everyone]
    model.prefix = Prefix(model.backbone, model.task, own, 150_000)  # of about 350,000
    bounded = metrics(*SHORT, name="bounded", world=world)
    assert 0 < model.prefix.bytes <= 150_000
    for one, other in zip(bounded[0], whole[0], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        assert one["personalized_accuracy"] == other["personalized_accuracy"]


# Every setting runs ----------------------------------------------------------------------------


def check_lines(lines: list[dict], clients: list[dict], stages: list[str]) -> None:
    names = {field.name for field in fields(RoundRecord)} - {"seconds", "peak_memory_mb"}
    assert [line["stage"] for line in lines] == stages
    for number, line in enumerate(lines, start=1):
        assert set(line) == names
        assert line["round"] == number
        assert all(math.isfinite(value) for value in numbers(line).values())
        assert line["failed"] == []
        for score in ("personalized_accuracy", "pooled_accuracy", "unseen_accuracy"):
            assert 0 <= line[score]["min"] <= line[score]["worst10"] <= line[score]["mean"] <= 1
        assert not {"client-00"} - {c["client_id"] for c in clients if c["round"] == number}
    assert len(clients) == 5 * len(lines)  # four that take part and one unseen


@pytest.mark.parametrize("method", METHODS)
def test_every_method(metrics, method):
    lines, clients = metrics(f"method={method}")
    stages = ["zero_shot"] if method == "zero_shot" else ["stage1", "stage1", "stage2", "stage2"]
    check_lines(lines, clients, stages)
    last = lines[-1]
    assert (last["gate_local_mean"] is not None) == (method == "fedms")
    assert (last["global_accuracy"] is not None) == (method != "local_only")
    assert (last["train_loss"] is not None) == (method != "zero_shot")
    assert (sum(line["bytes_up"] for line in lines) > 0) == (
        method in ("fedms", "fedavg", "fedavg_ft")
    )
    assert (last["trainable_parameters"] > 0) == (method != "zero_shot")
    assert last["awake_blocks"] == ([] if method == "zero_shot" else [2, 3])
    own = [c["accuracy"] for c in clients if c["round"] == len(lines) and c["seen"]]
    assert last["personalized_accuracy"]["mean"] == pytest.approx(np.mean(own))
    assert last["personalized_accuracy"]["std"] == pytest.approx(np.std(own))
    assert last["personalized_accuracy"]["min"] == min(own)


COMBINE = [
    *product(("probabilities", "features", "logits"), ("experts", "base", "both")),
    ("layer", "base"),
]


@pytest.mark.parametrize(("combine", "gate_input"), COMBINE)
def test_every_mixture(metrics, combine, gate_input):
    settings = (
        f"mofm.combine={combine}",
        f"mofm.gate_input={gate_input}",
        "mofm.local_loss=mixture",
    )
    lines, clients = metrics(*SHORT, *settings)
    check_lines(lines, clients, ["stage1", "stage2"])
    assert 0 < lines[-1]["gate_local_mean"] < 1


@pytest.mark.parametrize(
    "setting",
    ["gate=fixed", "gate_data=train", "share_adapter=false", "local_from=zero", "balance=0"],
)
def test_every_other_setting_of_the_mixture(metrics, setting):
    lines, clients = metrics(*SHORT, f"mofm.{setting}")
    check_lines(lines, clients, ["stage1", "stage2"])
    assert (lines[-1]["bytes_up"] == 0) == (setting in ("gate=fixed", "share_adapter=false"))
    if setting == "gate=fixed":
        assert lines[-1]["gate_local_mean"] == 0.5


@pytest.mark.parametrize("order", ["deep_to_shallow", "shallow_to_deep", "random", "importance"])
def test_every_order(metrics, order):
    lines, clients = metrics(f"sal.order={order}", "sal.trigger=every", "sal.every=1", *SHORT)
    check_lines(lines, clients, ["stage1", "stage2"])
    first, then = (line["awake_blocks"] for line in lines)
    assert (len(first), len(then)) == (1, 2)
    assert set(first) < set(then)
    if order in ("deep_to_shallow", "shallow_to_deep"):
        assert first == ([3] if order == "deep_to_shallow" else [0])


@pytest.mark.parametrize(
    ("overrides", "awake"),
    [
        (["sal.trigger=all_at_once"], [[2, 3], [2, 3], [2, 3]]),
        (["sal.enabled=false"], [[2, 3], [2, 3], [2, 3]]),
        (["sal.trigger=every", "sal.every=2"], [[3], [3], [2, 3]]),
        (["sal.threshold=-2"], [[3], [3], [3]]),
        (["sal.threshold=2"], [[3], [3], [2, 3]]),
        (  # in stage 2 nobody wakes
            ["sal.trigger=every", "sal.every=1", "sal.max_blocks=4", "stage2.rounds=2"],
            [[3], [2, 3], [1, 2, 3], [1, 2, 3]],
        ),
    ],
)
def test_every_trigger(metrics, overrides, awake):
    lines, _ = metrics(*SHORT, "stage1.rounds=2", *overrides)
    assert [line["awake_blocks"] for line in lines] == awake


# Repetition ------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_seed_another(metrics):
    one = metrics("lora.dropout=0.1", name="one")
    torch.manual_seed(77)
    assert metrics("lora.dropout=0.1", name="two") == one
    other = metrics("lora.dropout=0.1", "seed=1", name="other")
    assert [line["train_loss"] for line in other[0]] != [line["train_loss"] for line in one[0]]


def test_a_run_does_not_depend_on_what_ran_in_the_same_world_before(metrics, config, quiet):
    """Methods that begin with the same first stage share it; that must not show in any line."""
    world = World(config(), quiet)
    for method in ("fedavg", "fedms", "local_only", "zero_shot", "fedavg_ft"):
        setting = f"method={method}"
        shared = metrics(*SHORT, setting, name=f"{method}-shared", world=world)
        assert shared == metrics(*SHORT, setting, name=f"{method}-alone"), method
    assert world.outcomes


def test_a_shared_first_stage_is_not_trained_twice(spied, config, quiet):
    world = World(config(), quiet)
    spied("method=fedavg", world=world)
    assert [order.round for order in spied("method=fedavg_ft", world=world).orders] == [3, 4]
    other = spied("method=fedavg_ft", "stage1.lr=0.02", world=world)
    assert [order.round for order in other.orders] == [1, 2, 3, 4]
