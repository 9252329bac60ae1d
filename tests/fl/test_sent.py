"""What goes over the wire: who sends what, what is frozen, what is averaged, how many bytes."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from spy import servers

from fedms.fl.engines.world import World

METHODS = ("fedms", "fedavg", "fedavg_ft", "local_only", "zero_shot")
SHORT = ("stage1.rounds=1", "stage2.rounds=1", "stage1.local_steps=1", "stage2.local_steps=1")


def test_budgets_of_clients(spied):
    """Client k sends at most its b_k blocks, the deepest of those that are awake."""
    spy = spied(*SHORT, "sal.scope=client", "sal.trigger=all_at_once", "sal.max_blocks=4", "seed=1")
    block_of = spy.world.model.slots.block_of
    blocks = [{block_of(name) for name in shared} for (r, _), shared in spy.sent.items() if r == 1]
    assert len(blocks) == 4
    assert len({len(own) for own in blocks}) > 1
    assert all(own == set(range(4 - len(own), 4)) for own in blocks)
    assert [set(own) for own in spy.orders[0].clients.values()] == blocks


def test_stage_2_freezes_the_global_expert(spied):
    held = servers(spied("stage2.rounds=3").folder)
    assert not any(name.startswith("gate.linear.") for name in held[-1])
    for name, tensor in held[1].items():
        later = [torch.equal(server[name], tensor) for server in held[2:]]
        if name.startswith("global."):
            assert later == [True] * 3
        else:
            assert later == [False] * 3  # the gate adapter
    awake = [n for n in held[0] if n.startswith("global.") and "layer.3" in n]
    assert awake
    assert not any(torch.equal(held[0][name], held[1][name]) for name in awake)


@pytest.mark.parametrize("combine", ["probabilities", "layer"])
def test_the_local_expert_and_the_gate_linear_are_never_sent(spied, combine):
    gate_input = "base" if combine == "layer" else "experts"
    spy = spied(f"mofm.combine={combine}", f"mofm.gate_input={gate_input}")
    assert len(spy.sent) == 16
    for (round, _), shared in spy.sent.items():
        prefix = "global." if round <= 2 else "gate.adapter."
        assert shared
        assert all(name.startswith(prefix) for name in shared)
    for order in spy.orders:
        assert not any(name.startswith(("local.", "gate.linear.")) for name in order.received)
    assert not any(name.startswith("local.") for held in servers(spy.folder) for name in held)
    for client in spy.world.federation.clients:
        assert any(name.startswith("local.") for name in spy.states.read(client.client_id, 4))


def test_the_server_holds_the_weighted_mean_of_what_was_sent(spied):
    spy = spied()
    examples = {c.client_id: len(c.train) for c in spy.world.federation.clients}
    for round, held in enumerate(servers(spy.folder), start=1):
        for name in spy.sent[round, "client-00"]:
            total = sum(spy.sent[round, c][name].double() * n for c, n in examples.items())
            mean = total / sum(examples.values())
            assert torch.equal(held[name], mean.float())


def test_the_frozen_expert_goes_to_whoever_lacks_it(spied):
    spy = spied("server.fraction_train=0.5", "stage1.rounds=1", "stage2.rounds=4")
    met: set[str] = set()
    for order in spy.orders[1:]:
        assert order.frozen.keys() == spy.orders[0].sent.keys()
        assert order.lacking == set(order.clients) - met
        met |= set(order.clients)
    assert len(met) > 2
    assert not spy.orders[-1].lacking


def message_bytes(record: dict, shapes: dict[str, tuple[int, ...]]) -> int:
    """8 bytes of length, a JSON header padded to a multiple of 8, then 4 bytes a number."""
    header, at = {"__metadata__": {"json": json.dumps(record)}}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[f"values/{name}"] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
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
    record = {"round": 1, "codec": "none", "shapes": {}}
    one = message_bytes(record, dict(sorted(expert.items())))
    gate = {"0.bias": (4,), "0.weight": (4, 10), "2.bias": (10,), "2.weight": (10, 4)}
    two = message_bytes(record, {f"gate.adapter.{name}": shape for name, shape in gate.items()})
    for line, down in zip(lines, (one, two, two), strict=True):  # clients say who they are, too
        assert 4 * down + 4 * 70 < line["bytes_up"] < 4 * down + 4 * 170
    assert [line["bytes_down"] for line in lines] == [4 * one, 4 * (two + one), 4 * two]
    local, whole_gate = 6 * 2 * 32, 10 * 4 + 4 + 4 * 10 + 10 + 2 * 10 + 2
    assert [line["trainable_parameters"] for line in lines] == [local, *[local + whole_gate] * 2]


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
