"""One visit: what it trains, what it sends, what it keeps, and what it leaves as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from fedms.fl.algorithms import stages_of
from fedms.fl.client import Visit, class_counts, received, visit
from fedms.fl.data.federation import ClientData
from fedms.fl.engines.world import World
from fedms.fl.model.view import View
from fedms.fl.types import ClientFailure, Update, renamed, select


class Setup:
    """A world with two awake blocks and a server that has nothing yet."""

    def __init__(self, config, quiet) -> None:
        self.world, self.config = World(config, quiet), config
        self.model = self.world.model
        self.model.slots.set_awake((2, 3))
        self.model.prefix.keep([2, 3])
        self.stages = stages_of(config)
        self.clients = self.world.federation.clients

    def start(self, stage=0, kept=None, server=None):
        """What a visit of a stage begins with."""
        stage = self.stages[stage]
        self.model.build(dict(stage.modules))
        return stage.start(received(self.model, stage, server or {}), kept or {})

    def visits(self, *clients, stage=0, blocks=(2, 3), round=1, kept=None, server=None):
        """What each of these clients, visited side by side, answers."""
        self.model.build(dict(self.stages[stage].modules))
        chosen = [c if isinstance(c, ClientData) else self.clients[c] for c in clients]
        each = [Visit(client, (kept or {}), blocks) for client in chosen]
        return visit(self.model, self.stages[stage], each, server or {}, round, self.config.seed)

    def visit(self, stage=0, client=0, **more) -> Update:
        (answer,) = self.visits(client, stage=stage, **more)
        assert isinstance(answer, Update), answer
        return answer


@pytest.fixture
def setup(config, quiet):
    return lambda *overrides: Setup(config(*overrides), quiet)


def differing(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_visit_of_stage_1_leaves_the_global_expert_alone(setup):
    s = setup()
    base = {name: p.clone() for name, p in s.model.backbone.model.named_parameters()}
    start, update = s.start(0), s.visit(0)
    assert len(update.shared) == 2 * 3 * 2
    assert all(
        n.startswith("global.") and ("layer.2" in n or "layer.3" in n) for n in update.shared
    )
    assert not any(torch.equal(t, start[n]) for n, t in update.shared.items())
    assert update.kept == {}
    assert update.num_examples == len(s.clients[0].train)
    assert update.steps == 2
    assert not differing(base, dict(s.model.backbone.model.named_parameters()))


def test_a_visit_of_stage_2_leaves_the_local_expert_and_the_gate(setup):
    s = setup()
    update = s.visit(1)
    assert set(update.shared) == {
        f"gate.adapter.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")
    }
    local = {name for name in update.kept if name.startswith("local.")}
    assert len(local) == 12
    assert set(update.kept) - local == {"gate.linear.weight", "gate.linear.bias"}
    assert len(differing(s.start(1), {**s.start(1), **update.shared, **update.kept})) == 12 + 6


def test_nothing_asks_for_a_gradient_after_a_visit(setup):
    s = setup("mofm.combine=layer", "mofm.gate_input=base")
    for stage in (0, 1):
        s.visit(stage)
        gate = [p for module in s.model.modules.values() for p in module.parameters()]
        leaves = [*s.model.backbone.model.parameters(), *s.model.slots.live.values(), *gate]
        assert not any(leaf.requires_grad or leaf.grad is not None for leaf in leaves)


def test_a_client_trains_no_blocks_beyond_its_budget(setup):
    """AdamW would move the other's slot by weight decay alone."""
    s = setup("stage1.weight_decay=0.5", "stage2.weight_decay=0.5")
    for stage, expert in ((0, "global"), (1, "local")):
        update = s.visit(stage, blocks=(3,))
        left = {**update.shared, **update.kept}
        blocks = {s.model.slots.block_of(n) for n in left if n.startswith(expert)}
        assert blocks == {3}
        assert not torch.equal(
            left[f"{expert}.encoder.layer.3.attention.self.query.lora_B"],
            s.start(stage)[f"{expert}.encoder.layer.3.attention.self.query.lora_B"],
        )


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


@pytest.mark.parametrize("mixture", [[], ["mofm.combine=layer", "mofm.gate_input=base"]])
def test_clients_side_by_side_are_clients_one_by_one(setup, in_float64, mixture):
    """With dropout and budgets, clients without gate examples among them."""
    s = setup(in_float64, "lora.dropout=0.3", *mixture)
    none = np.zeros(0, dtype=np.int64)
    no_gate = replace(s.clients[1], gate=none)
    chosen = [s.clients[0], no_gate, s.clients[2], s.clients[3]]
    for stage in (0, 1):
        together = s.visits(*chosen, stage=stage)
        alone = [s.visits(client, stage=stage)[0] for client in chosen]
        for one, other in zip(together, alone, strict=True):
            assert one.client_id == other.client_id
            assert one.train_loss == pytest.approx(other.train_loss, abs=1e-9)
            for name, tensor in {**one.shared, **one.kept}.items():
                wanted = {**other.shared, **other.kept}[name]
                torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-9)
        # what would show if a row had gone through its neighbour's slot
        name = next(iter({**together[0].shared, **together[0].kept}))
        values = [{**update.shared, **update.kept}[name] for update in together]
        assert min((values[0] - other).abs().max() for other in values[1:]) > 1e-4


def test_a_loss_that_is_not_finite_drops_its_client_alone(setup):
    s = setup()
    name = "local.encoder.layer.3.attention.self.query.lora_A"
    bad = {name: torch.full_like(s.start(1)[name], float("nan"))}
    whole = s.visits(0, 1, 2, stage=1)
    s.model.build(dict(s.stages[1].modules))
    visits = [Visit(s.clients[i], bad if i == 1 else {}, (2, 3)) for i in range(3)]
    answers = visit(s.model, s.stages[1], visits, {}, 1, 0)
    assert isinstance(answers[1], ClientFailure)
    assert str(answers[1]) == "its training loss became nan at local step 1 of 2"
    for i in (0, 2):
        assert not differing(
            {**whole[i].shared, **whole[i].kept}, {**answers[i].shared, **answers[i].kept}
        )
    assert not any(leaf.requires_grad for leaf in s.model.slots.live.values())


def test_a_client_without_training_examples(setup):
    s = setup()
    none = np.zeros(0, dtype=np.int64)
    empty = ClientData("empty", none, s.clients[0].gate, none, s.clients[0].test)
    first, failed, last = s.visits(0, empty, 1)
    assert str(failed) == "it has no training examples"
    assert (first.client_id, last.client_id) == ("client-00", s.clients[1].client_id)
    assert [str(each) for each in s.visits(empty)] == ["it has no training examples"]


def test_a_client_without_gate_examples_keeps_the_gate_it_received(setup):
    s = setup()
    client = replace(s.clients[0], gate=np.zeros(0, dtype=np.int64))
    start = s.start(1)
    (update,) = s.visits(client, stage=1)
    gate = select({**update.shared, **update.kept}, ("gate.*",))
    assert len(gate) == 6
    assert not differing(gate, start)


@dataclass(frozen=True)
class Recorded:
    """A loss, and the examples that it was asked about."""

    loss: Callable
    seen: set = field(default_factory=set)

    def __call__(self, view):
        self.seen.update(view.indices.tolist())
        return self.loss(view)


@pytest.mark.parametrize(("gate_data", "gate_too"), [("held_out", False), ("train", True)])
def test_which_examples_the_experts_see(setup, gate_data, gate_too):
    s = setup(f"mofm.gate_data={gate_data}")
    client = s.clients[0]
    s.stages = [
        replace(stage, phases=tuple(replace(p, loss=Recorded(p.loss)) for p in stage.phases))
        for stage in s.stages
    ]
    for round in range(1, 6):
        s.visit(0, round=round)
        s.visit(1, round=round)
    train, held = set(client.train.tolist()), set(client.gate.tolist())
    (stage1,), (expert, gate) = (stage.phases for stage in s.stages)
    assert stage1.loss.seen | expert.loss.seen == (train | held if gate_too else train)
    assert gate.loss.seen == (train | held if gate_too else held)


def test_a_local_expert_starts_from_the_global_one_or_from_nothing(setup):
    s = setup()
    server = {n: torch.full_like(t, 0.5) for n, t in s.start(0).items()}
    start = s.start(1, server=server)
    assert all((start[n] == 0.5).all() for n in renamed(server, "global.", "local."))
    zero = setup("mofm.local_from=zero")
    local = select(zero.start(1, server=server), ("local.*",))
    assert len(local) == 4 * 3 * 2
    assert all((tensor == 0).all() == name.endswith("lora_B") for name, tensor in local.items())
    # what a client keeps comes before both
    mine = {name: torch.ones_like(t) for name, t in local.items()}
    assert not differing(mine, s.start(1, kept=mine, server=server))
    # the gate's own part starts as everybody's, never as the server's
    other = {"gate.linear.weight": torch.ones(2, 10)}
    assert not (s.start(1, server=other)["gate.linear.weight"] == 1).any()


def test_the_counts_are_of_train_and_gate_examples(setup):
    s = setup()
    counts = class_counts(s.model, s.clients[:2])
    for client, found in zip(s.clients, counts, strict=False):
        labels = s.world.federation.dataset.labels[np.concatenate([client.train, client.gate])]
        assert found.tolist() == np.bincount(labels, minlength=4).tolist()


def test_training_lowers_the_loss(setup):
    s = setup("stage1.local_steps=20")
    losses, server = [], {}
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
        client = s.clients[0]
        with torch.no_grad():
            view = View(s.model, [client.gate], class_counts(s.model, [client]))
            weights = s.stages[1].weights(view)
        away[anchor] = (weights - 0.5).abs().max().item()
    assert away[100.0] < 0.05 < away[0.0]
