"""Whole runs, tiny: fast equals slow, nothing private leaves, one failure stops nobody."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch

from fedms.fl import round as engine
from fedms.fl.engines.world import World
from fedms.fl.model.prefix import Prefix
from fedms.fl.round import Run, encoded_size
from fedms.fl.runs.records import RoundRecord
from fedms.fl.types import QuorumError

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


@pytest.fixture
def metrics(config, execute, tmp_path, read_lines):
    """``metrics("key=value")``: the lines of a whole run, metrics and clients."""

    def run(*overrides: str, name: str = "run", world: World | None = None) -> tuple[list, list]:
        folder = tmp_path / name
        execute(config(*overrides), folder, world)
        return read_lines(folder / "metrics.jsonl"), read_lines(folder / "clients.jsonl")

    return run


# Fast equals slow ------------------------------------------------------------------------------


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
    ],
)
def test_what_makes_it_fast_changes_no_result(metrics, in_float64, base, names):
    base = (*base, in_float64)
    fast = metrics(*base, name="fast")
    for name in names:
        for found, wanted in zip(metrics(*base, *SLOW[name], name=name), fast, strict=True):
            assert len(found) == len(wanted)
            for line, line_fast in zip(found, wanted, strict=True):
                a, b = numbers(line), numbers(line_fast)
                assert a.keys() == b.keys()
                for key, value in b.items():
                    assert abs(a[key] - value) < 1e-9, (name, line["round"], key)
    losses = [line["train_loss"] for line in fast[0]]
    assert len(set(losses)) == 4


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
        (["data.train=0.6", "data.val=0", "sal.threshold=2"], [[3], [3], [3]]),  # nothing to score
    ],
)
def test_every_trigger(metrics, overrides, awake):
    lines, _ = metrics(*SHORT, "stage1.rounds=2", *overrides)
    assert [line["awake_blocks"] for line in lines] == awake


def test_budgets_of_clients(spied):
    """Client k sends at most its b_k blocks, the deepest of those that are awake."""
    run, sent, _ = spied(
        *SHORT, "sal.scope=client", "sal.trigger=all_at_once", "sal.max_blocks=4", "seed=1"
    )
    block_of = run.model.slots.block_of
    blocks = [{block_of(name) for name in sent[1, c]} for c in sorted(c for r, c in sent if r == 1)]
    assert len(blocks) == 4
    assert len({len(own) for own in blocks}) > 1
    assert all(own == set(range(4 - len(own), 4)) for own in blocks)


# What is frozen, what is sent ------------------------------------------------------------------


@pytest.fixture
def spied(config, execute, tmp_path, monkeypatch):
    """A run, what its clients sent by round and client, and the server's state after each round."""

    def run(*overrides: str):
        sent: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        servers: list[dict[str, torch.Tensor]] = []
        real, real_save = engine.visit, engine.save_checkpoint

        def visit(model, stage, visits, server, round, seed):
            answers = real(model, stage, visits, server, round, seed)
            sent.update({(round, each.client_id): each.shared for each in answers})
            return answers

        def save(folder, checkpoint, *rest):
            servers.append({name: tensor.clone() for name, tensor in checkpoint.server.items()})
            real_save(folder, checkpoint, *rest)

        monkeypatch.setattr(engine, "visit", visit)
        monkeypatch.setattr(engine, "save_checkpoint", save)
        return execute(config(*overrides), tmp_path), sent, servers

    return run


def test_stage_2_freezes_the_global_expert(spied):
    _, _, servers = spied("stage2.rounds=3")
    assert not any(name.startswith("gate.linear.") for name in servers[-1])
    for name, tensor in servers[1].items():
        later = [torch.equal(server[name], tensor) for server in servers[2:]]
        if name.startswith("global."):
            assert later == [True] * 3
        else:
            assert later == [False] * 3  # the gate adapter
    awake = [n for n in servers[0] if n.startswith("global.") and "layer.3" in n]
    assert awake
    assert not any(torch.equal(servers[0][name], servers[1][name]) for name in awake)


@pytest.mark.parametrize("combine", ["probabilities", "layer"])
def test_the_local_expert_and_the_gate_linear_are_never_sent(spied, combine):
    gate_input = "base" if combine == "layer" else "experts"
    run, sent, servers = spied(f"mofm.combine={combine}", f"mofm.gate_input={gate_input}")
    assert len(sent) == 16
    for (round, _), shared in sent.items():
        prefix = "global." if round <= 2 else "gate.adapter."
        assert shared
        assert all(name.startswith(prefix) for name in shared)
    assert not any(name.startswith("local.") for server in servers for name in server)
    for client in run.federation.clients:
        assert any(name.startswith("local.") for name in run.clients.read(client.client_id, 4))


def test_the_server_holds_the_weighted_mean_of_what_was_sent(spied):
    run, sent, servers = spied()
    examples = {c.client_id: len(c.train) for c in run.federation.clients}
    for round in range(1, 5):
        for name in sent[round, "client-00"]:
            total = sum(sent[round, c][name].double() * n for c, n in examples.items())
            mean = total / sum(examples.values())
            torch.testing.assert_close(servers[round - 1][name].double(), mean, rtol=0, atol=1e-6)


def safetensors_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """8 bytes of length, a JSON header padded to a multiple of 8, then 4 bytes a number."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"))
    return struct.calcsize("<Q") + -(-len(text) // 8) * 8 + at


def test_bytes_by_hand(metrics):
    """One awake block: query, value and output, r = 2; the gate adapter 10 -> 4 -> 10."""
    lines, _ = metrics("stage1.rounds=1", "sal.threshold=-2")
    linears = ("attention.self.query", "attention.self.value", "attention.output.dense")
    names = [f"global.encoder.layer.3.{linear}.lora_" for linear in linears]
    expert = {f"{n}{part}": (2, 32) if part == "A" else (32, 2) for n in names for part in "AB"}
    # safetensors puts them in order of name
    one = safetensors_bytes(dict(sorted(expert.items())))
    gate = {"0.bias": (4,), "0.weight": (4, 10), "2.bias": (10,), "2.weight": (10, 4)}
    two = safetensors_bytes({f"gate.adapter.{name}": shape for name, shape in gate.items()})
    assert [line["bytes_up"] for line in lines] == [4 * one, 4 * two, 4 * two]
    assert [line["bytes_down"] for line in lines] == [4 * one, 4 * (two + one), 4 * two]
    local, whole_gate = 6 * 2 * 32, 10 * 4 + 4 + 4 * 10 + 10 + 2 * 10 + 2
    assert [line["trainable_parameters"] for line in lines] == [local, *[local + whole_gate] * 2]


def test_nothing_to_send_costs_nothing():
    assert encoded_size({}) == 0
    assert encoded_size({"x": torch.zeros(3)}) == safetensors_bytes({"x": (3,)})


def test_unseen_clients_take_part_in_no_round(metrics, config, quiet):
    world = World(config(), quiet)
    unseen = [client.client_id for client in world.federation.unseen]
    assert len(unseen) == 1
    for method in METHODS:
        lines, clients = metrics(f"method={method}", *SHORT, name=method)
        taken = {name for line in lines for name in line["participants"]}
        assert not taken & set(unseen)
        assert [c["client_id"] for c in clients if not c["seen"]] == unseen * len(lines)


def test_a_cohort_is_a_part_of_the_clients(metrics):
    lines, clients = metrics("server.fraction_train=0.5", "stage1.rounds=3")
    cohorts = [tuple(line["participants"]) for line in lines]
    assert all(len(cohort) == 2 for cohort in cohorts)
    assert len(set(cohorts)) > 1
    assert len(clients) == 5 * 5  # also those who were not drawn are scored
    down = [line["bytes_down"] for line in lines[3:]]
    new = set(cohorts[4]) - set(cohorts[3])
    assert down[0] > down[1] or new == set(cohorts[4])  # the frozen expert goes once to each


def test_rounds_between_evaluations(metrics):
    lines, clients = metrics("eval.every=3", "stage1.rounds=4", "stage2.rounds=3")
    scored = [line["round"] for line in lines if line["personalized_accuracy"] is not None]
    assert scored == [3, 4, 6, 7]
    assert sorted({client["round"] for client in clients}) == scored


# Failures --------------------------------------------------------------------------------------


def failing(monkeypatch, who: dict[str, object]) -> None:
    real = engine.visit

    def visit(model, stage, visits, server, round, seed):
        (answer,) = real(model, stage, visits, server, round, seed)
        how = who.get(visits[0].client.client_id)
        if isinstance(how, Exception):
            raise how
        if how is not None:
            next(iter(answer.shared.values())).view(-1)[0] = how
        return [answer]

    monkeypatch.setattr(engine, "visit", visit)


def test_a_client_that_fails_is_noted_and_left_out(spied, monkeypatch, read_lines):
    failing(monkeypatch, {"client-01": MemoryError("out of memory"), "client-02": float("nan")})
    run, sent, servers = spied()
    lines = read_lines(run.folder / "metrics.jsonl")
    for line in lines:
        assert line["participants"] == ["client-00", "client-03"]
        assert [failure["client_id"] for failure in line["failed"]] == ["client-01", "client-02"]
        assert line["failed"][0]["reason"] == "MemoryError: out of memory"
        assert line["failed"][1]["reason"].startswith("ClientFailure: its g")
        assert line["failed"][1]["reason"].endswith(" is not finite")
    examples = {c.client_id: len(c.train) for c in run.federation.clients}
    a, b = examples["client-00"], examples["client-03"]
    for round, server in enumerate(servers, start=1):
        for name, tensor in sent[round, "client-00"].items():
            mean = (tensor.double() * a + sent[round, "client-03"][name].double() * b) / (a + b)
            torch.testing.assert_close(server[name].double(), mean, rtol=0, atol=1e-6)
        assert all(torch.isfinite(tensor).all() for tensor in server.values())
    kept = [client_id for client_id in run.ids if run.clients.read(client_id, run.done)]
    assert kept == ["client-00", "client-03"]


def test_a_failure_changes_nothing_for_the_others(config, execute, tmp_path, monkeypatch):
    """In the first round the others send what they send without a failure."""
    sent: list[dict] = []
    real = engine.check_update
    monkeypatch.setattr(engine, "check_update", lambda u, e: (sent.append(u), real(u, e)))
    settings = config("stage1.rounds=1", "stage2.rounds=0")
    execute(settings, tmp_path / "whole")
    whole = {update.client_id: update.shared for update in sent}
    sent.clear()
    failing(monkeypatch, {"client-01": RuntimeError("broken")})
    execute(settings, tmp_path / "broken")
    assert [update.client_id for update in sent] == ["client-00", "client-02", "client-03"]
    for update in sent:
        for name, tensor in update.shared.items():
            assert torch.equal(tensor, whole[update.client_id][name])


def test_below_quorum_the_round_does_not_count(
    config, execute, tmp_path, monkeypatch, quiet, read_lines
):
    settings = config("server.quorum=0.6")
    whole = execute(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        real = engine.visit

        def visit(model, stage, visits, server, round, seed):
            if round == 2 and visits[0].client.client_id in ("client-00", "client-03"):
                raise RuntimeError("away")
            return real(model, stage, visits, server, round, seed)

        patch.setattr(engine, "visit", visit)
        with pytest.raises(QuorumError, match=r"2 of 4 clients came back, .*server\.quorum = 0\.6"):
            execute(settings, tmp_path / "broken")
    assert len(read_lines(tmp_path / "broken" / "metrics.jsonl")) == 1
    run = Run(settings, World(settings, quiet), tmp_path / "broken", quiet)
    assert run.done == 1
    run.execute()
    for name in ("metrics.jsonl", "clients.jsonl"):
        assert read_lines(run.folder / name) == read_lines(whole.folder / name)


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


def test_a_shared_first_stage_is_not_trained_twice(config, execute, tmp_path, monkeypatch, quiet):
    world = World(config(), quiet)
    execute(config("method=fedavg"), tmp_path / "fedavg", world)
    rounds = []
    real = engine.visit

    def visit(model, stage, visits, server, round, seed):
        rounds.append(round)
        return real(model, stage, visits, server, round, seed)

    monkeypatch.setattr(engine, "visit", visit)
    execute(config("method=fedavg_ft"), tmp_path / "ft", world)
    assert sorted(set(rounds)) == [3, 4]
    rounds.clear()
    other = config("method=fedavg_ft", "stage1.lr=0.02")
    execute(other, tmp_path / "other", world)
    assert sorted(set(rounds)) == [1, 2, 3, 4]
