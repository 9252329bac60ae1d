"""One visit: what it trains, what it sends, what it keeps, and what it leaves as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedms.fl import client as module
from fedms.fl.algorithms import stages_of
from fedms.fl.client import fresh_gate, initial_kept, log_prior, visit
from fedms.fl.data.federation import ClientData
from fedms.fl.engines.world import World
from fedms.fl.types import ClientFailure


class Setup:
    """A world with two awake blocks, and what the server holds at the start."""

    def __init__(self, config, quiet) -> None:
        self.world = World(config, quiet)
        self.resident = self.world.resident
        self.resident.foundation.set_awake((2, 3))
        self.stages = stages_of(config)
        self.clients = self.world.federation.clients
        fresh = self.resident.foundation.fresh_expert("global")
        self.server = {**fresh, **fresh_gate(self.resident)}

    def live(self) -> dict[str, torch.Tensor]:
        """Every parameter there is: the base, all experts of all blocks, the gate."""
        model = self.resident.foundation.model.state_dict()
        gate = {f"gate.{k}": v for k, v in self.resident.gate.state_dict().items()}
        return {name: tensor.clone() for name, tensor in {**model, **gate}.items()}

    def visit(self, stage=0, client=0, blocks=(2, 3), round=1, kept=None, server=None):
        stage, client = self.stages[stage], self.clients[client]
        server = self.server if server is None else server
        kept = initial_kept(self.resident, stage, server) if kept is None else kept
        return visit(self.resident, stage, client, server, kept, blocks, round)


@pytest.fixture
def setup(config, quiet):
    return lambda *overrides: Setup(config(*overrides), quiet)


def differing(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_visit_of_stage_1_changes_the_global_expert_alone(setup):
    s = setup()
    s.resident.load(s.server)
    before = s.live()
    update = s.visit(0)
    changed = differing(before, s.live())
    assert len(changed) == 2 * 3 * 2
    assert all(".global." in n and ("layer.2" in n or "layer.3" in n) for n in changed)
    assert len(update.shared) == 2 * 3 * 2
    assert all(name.startswith("global.") for name in update.shared)
    assert update.kept == {}
    assert all(not torch.equal(t, s.server[n]) for n, t in update.shared.items())
    assert update.num_examples == len(s.clients[0].train)
    assert update.steps == 2


def test_a_visit_of_stage_2_changes_the_local_expert_and_the_gate_alone(setup):
    s = setup()
    s.resident.load({**s.server, **initial_kept(s.resident, s.stages[1], s.server)})
    before = s.live()
    update = s.visit(1)
    changed = differing(before, s.live())
    assert all(".local." in name or name.startswith("gate.") for name in changed)
    assert sum(".local." in name for name in changed) == 12
    assert set(update.shared) == {
        f"gate.adapter.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")
    }
    local = {name for name in update.kept if name.startswith("local.")}
    assert len(local) == 12
    assert set(update.kept) - local == {"gate.linear.weight", "gate.linear.bias"}


def test_nothing_asks_for_a_gradient_after_a_visit(setup):
    s = setup("mofm.combine=layer", "mofm.gate_input=base")
    for stage in (0, 1):
        s.visit(stage)
        parameters = [*s.resident.foundation.model.parameters(), *s.resident.gate.parameters()]
        assert not any(p.requires_grad or p.grad is not None for p in parameters)


def test_a_client_trains_no_blocks_beyond_its_budget(setup):
    s = setup()
    update = s.visit(0, blocks=(3,))
    assert {s.resident.foundation.block_of(name) for name in update.shared} == {3}
    kept = initial_kept(s.resident, s.stages[1], s.server)
    update = s.visit(1, blocks=(3,), kept=kept)
    for name in (n for n in update.kept if n.startswith("local.")):
        trained = s.resident.foundation.block_of(name) == 3
        assert torch.equal(update.kept[name], kept[name]) != trained


@pytest.mark.parametrize(
    ("overrides", "shared", "kept"),
    [
        (["method=fedms"], {"gate.adapter."}, {"local.", "gate.linear."}),
        (
            ["method=fedms", "mofm.share_adapter=false"],
            set(),
            {"local.", "gate.linear.", "gate.adapter."},
        ),
        (["method=fedms", "mofm.gate=fixed"], set(), {"local."}),
        (["method=fedavg"], {"global."}, set()),
        (["method=fedavg_ft"], set(), {"local."}),
        (["method=local_only"], set(), {"local."}),
    ],
)
def test_what_is_shared_and_what_is_kept_have_nothing_in_common(setup, overrides, shared, kept):
    s = setup(*overrides)
    update = s.visit(1)

    def kinds(state) -> set[str]:
        depth = lambda name: 2 if name.startswith("gate.") else 1  # noqa: E731
        return {".".join(name.split(".")[: depth(name)]) + "." for name in state}

    assert kinds(update.shared) == shared
    assert kinds(update.kept) == kept
    assert not update.shared.keys() & update.kept.keys()


def test_an_update_is_a_copy(setup):
    s = setup()
    first = s.visit(0)
    copy = {name: tensor.clone() for name, tensor in first.shared.items()}
    s.visit(0, client=1)
    assert not differing(copy, first.shared)


def test_a_visit_depends_on_what_was_given_and_on_nothing_else(setup):
    """Not on who was visited before, nor on torch's generator."""
    s = setup("lora.dropout=0.5")
    one = s.visit(1, client=2, round=3)
    s.visit(0, client=0)
    s.visit(1, client=1)
    torch.manual_seed(1234)
    two = s.visit(1, client=2, round=3)
    assert one.train_loss == two.train_loss
    assert not differing({**one.shared, **one.kept}, {**two.shared, **two.kept})
    assert s.visit(1, client=2, round=4).train_loss != one.train_loss


def test_the_seed_decides_the_batches(setup):
    one, two = (setup(f"seed={seed}", "data.partitioner=iid") for seed in (0, 0))
    assert one.visit(0).train_loss == two.visit(0).train_loss
    losses = {one.visit(0, round=round).train_loss for round in (1, 2, 3)}
    assert len(losses) == 3


def test_a_loss_that_is_not_finite_ends_the_visit(setup):
    s = setup()
    bad = {n: torch.full_like(t, float("nan")) for n, t in s.server.items() if "layer.3" in n}
    with pytest.raises(ClientFailure, match="its training loss became nan at local step 1 of 2"):
        s.visit(0, server={**s.server, **bad})
    assert not any(p.requires_grad for p in s.resident.foundation.model.parameters())
    assert np.isfinite(s.visit(0).train_loss)  # the next client does not suffer


def test_a_client_without_training_examples(setup):
    s = setup()
    none = np.zeros(0, dtype=np.int64)
    empty = ClientData("empty", none, s.clients[0].gate, none, s.clients[0].test)
    kept = initial_kept(s.resident, s.stages[0], s.server)
    with pytest.raises(ClientFailure, match="it has no training examples"):
        visit(s.resident, s.stages[0], empty, s.server, kept, (3,), 1)


def test_a_client_without_gate_examples_keeps_the_gate_it_received(setup):
    s = setup()
    whole = s.clients[0]
    none = np.zeros(0, dtype=np.int64)
    client = ClientData("no-gate", whole.train, none, none, whole.test)
    stage = s.stages[1]
    kept = initial_kept(s.resident, stage, s.server)
    update = visit(s.resident, stage, client, s.server, kept, (2, 3), 1)
    for name, tensor in {**update.shared, **update.kept}.items():
        if name.startswith("gate."):
            assert torch.equal(tensor, s.server[name])


@pytest.mark.parametrize(("gate_data", "gate_too"), [("held_out", False), ("train", True)])
def test_which_examples_the_experts_see(setup, monkeypatch, gate_data, gate_too):
    s = setup(f"mofm.gate_data={gate_data}")
    client = s.clients[0]
    seen: dict[str, set[int]] = {"experts": set(), "gate": set()}
    real_loss, real_gate = module._expert_loss, module._train_gate

    def loss(resident, stage, batch, prior):
        seen["experts"].update(batch.tolist())
        return real_loss(resident, stage, batch, prior)

    def gate(resident, examples, parameters, prior):
        seen["gate"].update(examples.tolist())
        return real_gate(resident, examples, parameters, prior)

    monkeypatch.setattr(module, "_expert_loss", loss)
    monkeypatch.setattr(module, "_train_gate", gate)
    for round in range(1, 6):
        s.visit(0, round=round)
        s.visit(1, round=round)
    train, held = set(client.train.tolist()), set(client.gate.tolist())
    assert seen["experts"] == (train | held if gate_too else train)
    assert seen["gate"] == (train | held if gate_too else held)


def test_a_local_expert_starts_from_the_global_one_or_from_nothing(setup):
    s = setup()
    server = {n: torch.full_like(t, 0.5) for n, t in s.server.items()}
    kept = initial_kept(s.resident, s.stages[1], server)
    local = {name: tensor for name, tensor in kept.items() if name.startswith("local.")}
    assert len(local) == 12
    assert all((tensor == 0.5).all() for tensor in local.values())
    zero = setup("mofm.local_from=zero")
    kept = initial_kept(zero.resident, zero.stages[1], server)
    assert all((kept[name] == 0).all() == name.endswith("lora_B") for name in local)
    # The gate's own part starts as everybody's, never as the server's.
    assert torch.equal(kept["gate.linear.weight"], fresh_gate(s.resident)["gate.linear.weight"])


def test_the_prior_counts_train_and_gate_examples(setup):
    s = setup()
    client = s.clients[1]
    labels = s.world.federation.dataset.labels[np.concatenate([client.train, client.gate])]
    counts = np.bincount(labels, minlength=4) + 1
    wanted = torch.from_numpy(np.log(counts / counts.sum())).float()
    torch.testing.assert_close(log_prior(s.resident, client), wanted)


def test_training_lowers_the_loss(setup):
    s = setup("stage1.local_steps=20")
    losses = []
    server = s.server
    for round in range(1, 4):
        update = s.visit(0, server=server, round=round)
        losses.append(update.train_loss)
        server = {**server, **update.shared}
    assert losses[2] < 0.8 * losses[0]


def test_the_anchor_holds_the_gate_near_one_half(setup):
    away = {}
    for anchor in (0.0, 100.0):
        s = setup(f"mofm.anchor={anchor}", "mofm.gate_steps=40", "mofm.balance=0")
        s.visit(1)
        indices = s.clients[0].gate
        with torch.no_grad():
            weights = s.resident.mixture(indices, log_prior(s.resident, s.clients[0]))[1]
        away[anchor] = (weights - 0.5).abs().max().item()
    assert away[100.0] < 0.05 < away[0.0]
