"""FedNTD, RoLoRA and the cheap relatives of fine-tuning: what a visit does, and limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from visits import a_view, one_visit, together

from fedms.fl.client import received
from fedms.fl.config import load_config
from fedms.fl.model.view import View
from fedms.fl.types import ConfigError

B = "global.encoder.layer.3.attention.self.query.lora_B"
A = B.replace("lora_B", "lora_A")


def assert_alike(one, other, *, atol=1e-12):
    assert one.keys() == other.keys()
    for name, t in one.items():
        torch.testing.assert_close(t, other[name], rtol=0, atol=atol)


def test_fedntd_without_beta_is_fedavg(setting):
    ntd, model, clients = setting("method=fedntd", "fedntd.beta=0.0")
    one, other = (one_visit(s, model, clients[0]) for s in (ntd, setting("method=fedavg")[0]))
    assert_alike(one.shared, other.shared)
    assert one.kept == {}
    held = one_visit(setting("method=fedntd", "fedntd.beta=20.0")[0], model, clients[0])
    assert max((held.shared[n] - one.shared[n]).abs().max() for n in one.shared) > 1e-4


@pytest.mark.parametrize("method", ["not_true_ft", "balanced_ft"])
def test_the_fine_tuned_model_differs_by_its_loss_alone(setting, method):
    """Without beta, or where all classes are alike, it is plain fine-tuning."""
    overrides = ["not_true_ft.beta=0.0"] if method == "not_true_ft" else []
    stage, model, clients = setting(f"method={method}", *overrides, stage=1)
    plain = setting("method=fedavg_ft", stage=1)[0]
    server = one_visit(setting("method=fedavg")[0], model, clients[0]).shared
    one, other = (one_visit(s, model, clients[1], server) for s in (stage, plain))
    assert one.shared == {}
    assert one.kept.keys() == other.kept.keys()
    far = max((one.kept[n] - other.kept[n]).abs().max() for n in one.kept)
    assert far < 1e-12 if method == "not_true_ft" else far > 1e-4


def test_rolora_trains_and_sends_one_factor_a_round(setting):
    stage, model, clients = setting("method=rolora")
    odd = [one_visit(stage, model, client, round=1) for client in clients[:2]]
    assert all({n[-6:] for n in update.shared} == {"lora_B"} for update in odd)
    server = together(stage, odd)
    even = [one_visit(stage, model, client, server, round=2) for client in clients[:2]]
    assert all({n[-6:] for n in update.shared} == {"lora_A"} for update in even)
    assert all(update.kept == {} for update in (*odd, *even))
    after = together(stage, even, server)
    assert after[B] is server[B]  # even rounds freeze B
    start = received(model, stage, server)
    assert all((update.shared[A] - start[A]).abs().max() > 1e-3 for update in even)


def test_rolora_averages_exactly(setting):
    stage, model, clients = setting("method=rolora")
    server = together(stage, [one_visit(stage, model, c, round=1) for c in clients[:2]])
    updates = [one_visit(stage, model, c, server, round=2) for c in clients[:2]]
    n = [update.num_examples for update in updates]
    exact = sum(k * server[B] @ u.shared[A] for k, u in zip(n, updates, strict=True)) / sum(n)
    after = together(stage, updates, server)
    torch.testing.assert_close(after[B] @ after[A], exact, rtol=0, atol=1e-12)


def test_a_trained_head_starts_from_the_class_names(setting):
    """Before it is trained, the head says what the frozen one says."""
    stage, model, clients = setting("method=lp_ft", stage=1)
    view = a_view(stage, model, clients[0], {})
    assert view.live["local.head.weight"].shape == (1, 4, 32)
    torch.testing.assert_close(view.log_p("local"), view.log_p("global"))
    view.live["local.head.weight"].mul_(-1)
    view = View(model, [clients[0].train[:5]], view.counts)
    assert (view.log_p("local") - view.log_p("global")).abs().max() > 0.1


def test_probing_fits_the_head_alone_by_full_batches(setting):
    """The same steps of AdamW by hand, on features that do not change."""
    own = ("lp_ft.probe_steps=3", "stage2.head_lr=0.05")
    stage, model, clients = setting("method=lp_ft", *own, stage=1)
    client, start = clients[0], received(model, stage, {})
    left = one_visit(replace(stage, phases=stage.phases[:1]), model, client).kept
    model.slots.load([stage.start(start, {})])
    z = View(model, [client.own], torch.zeros(1, 4)).features("local")
    head = torch.nn.Parameter(start["local.head.weight"].clone())
    optimizer = torch.optim.AdamW([head], lr=0.05, weight_decay=0.0)
    targets = torch.from_numpy(model.task.targets(client.own))
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(20.0 * z @ head.T, targets).backward()
        optimizer.step()
    assert_alike(left, {"local.head.weight": head.detach()}, atol=1e-10)
    both = one_visit(stage, model, client)
    assert both.shared == {}
    assert len(both.kept) == 1 + 2 * 2 * 3  # the head, and A and B of three linears in two blocks


def test_a_head_without_a_place(setting):
    with pytest.raises(ConfigError, match="lp_ft trains a head of its own"):
        load_config(None, ["method=lp_ft", "task.kind=causal_lm", "rivals=[]"])
    with pytest.raises(ConfigError, match="lp_ft trains a head of its own"):
        load_config(None, ["rivals=['lp_ft']", "task.kind=causal_lm"])
    stage, model, _ = setting("method=lp_ft", stage=1)
    model.head = None
    with pytest.raises(ConfigError, match="has none to train"):
        received(model, stage, {})
