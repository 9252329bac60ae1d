"""One client that fails stops nobody, and too many of them stop the round."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from spy import servers

from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.server import Sent
from fedms.fl.types import Failure, QuorumError


def spoiled(found: Sent) -> Sent:
    """A client's answer with one value that is no number."""
    shared = {name: tensor.clone() for name, tensor in found.shared.items()}
    next(iter(shared.values())).view(-1)[0] = float("nan")
    return replace(found, shared=shared)


@pytest.fixture
def broken(config, quiet) -> World:
    """A world in which client-01 has an example that there is not."""
    world = World(config(), quiet)
    clients = world.federation.clients
    wrong = replace(clients[1], train=np.append(clients[1].train, 10**6))
    world.federation = replace(world.federation, clients=(clients[0], wrong, *clients[2:]))
    return world


@pytest.mark.parametrize("cohort", [1, 4])
def test_a_client_that_fails_is_noted_and_left_out(spied, broken, read_lines, cohort):
    """client-01 raises, in the middle of a batch with others; client-02 sends what is no number."""

    def change(order, found):
        return spoiled(found) if found.client_id == "client-02" else found

    settings = (f"engine.cohort={cohort}", "stage1.rounds=3", "stage2.rounds=0")
    spy = spied(*settings, world=broken, change=change)
    for line in read_lines(spy.folder / "metrics.jsonl"):
        assert line["participants"] == ["client-00", "client-03"]
        assert [failure["client_id"] for failure in line["failed"]] == ["client-01", "client-02"]
        assert line["failed"][0]["reason"].startswith("IndexError: index 1000000 is out of bounds")
        assert line["failed"][1]["reason"].startswith("ClientFailure: its global.")
        assert line["failed"][1]["reason"].endswith(" is not finite")
    examples = {c.client_id: len(c.train) for c in broken.federation.clients}
    a, b = examples["client-00"], examples["client-03"]
    for round, held in enumerate(servers(spy.folder), start=1):
        for name, tensor in spy.sent[round, "client-00"].items():
            mean = (tensor.double() * a + spy.sent[round, "client-03"][name].double() * b) / (a + b)
            assert torch.equal(held[name], mean.float())


def test_a_failure_changes_nothing_for_the_others(spied, broken):
    """In the first round the others send what they send without a failure."""
    short = ("stage1.rounds=1", "stage2.rounds=0")
    whole, partly = spied(*short).sent, spied(*short, world=broken).sent
    assert [client for _, client in partly] == ["client-00", "client-02", "client-03"]
    for place, shared in partly.items():
        for name, tensor in shared.items():
            assert torch.equal(tensor, whole[place][name])


def test_below_quorum_the_round_does_not_count(spied, config, execute, tmp_path, read_lines):
    settings = config("server.quorum=0.6")
    whole = tmp_path / "whole"
    execute(settings, whole)

    def change(order, found):
        away = order.round == 2 and found.client_id in ("client-00", "client-03")
        return Failure(found.client_id, "away") if away else found

    folder = tmp_path / "stopped"
    with pytest.raises(QuorumError, match=r"2 of 4 clients came back, .*server\.quorum = 0\.6"):
        spied("server.quorum=0.6", change=change, folder=folder)
    assert len(read_lines(folder / "metrics.jsonl")) == 1
    execute(settings, folder)
    for name in ("metrics.jsonl", "clients.jsonl"):
        assert read_lines(folder / name) == read_lines(whole / name)


def test_a_probe_that_fails_is_left_out_of_the_blocks_importance(broken, config, tmp_path, capsys):
    engine = LocalEngine(config(), broken, ClientStates(tmp_path), Progress(quiet=True))
    each = [engine.importance([f"client-0{i}"]) for i in (0, 2, 3)]
    found = engine.importance([f"client-0{i}" for i in range(4)])
    assert len(found) == 4
    assert found == pytest.approx([sum(block) for block in zip(*each, strict=True)])
    (warning,) = capsys.readouterr().err.splitlines()
    assert "no importance of client-01, IndexError: index 1000000 is out of bounds" in warning


def test_an_importance_that_is_not_finite_is_none(config, world, tmp_path, capsys):
    with torch.no_grad():
        world.model.backbone.model.get_input_embeddings().weight.fill_(float("nan"))
    engine = LocalEngine(config(), world, ClientStates(tmp_path), Progress(quiet=True))
    assert engine.importance(["client-00"]) == []
    reason = "ClientFailure: the gradient of its loss is not finite"
    assert f"no importance of client-00, {reason}" in capsys.readouterr().err
