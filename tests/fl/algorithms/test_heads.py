"""FedPer, FedRep and FedRoD: whose head is trained on what, sent and asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from visits import a_view, one_visit

from fedms.fl.algorithms import stages_of
from fedms.fl.algorithms.fedrod import both_heads
from fedms.fl.algorithms.losses import BalancedSoftmax, CrossEntropy
from fedms.fl.client import learning, received
from fedms.fl.engines.world import load_model
from fedms.fl.model.view import View
from fedms.fl.types import ConfigError, select

HEAD, OWN = "global.head.weight", "personal.weight"


@pytest.mark.parametrize("head", ["names", "linear"])
@pytest.mark.parametrize("method", ["fedper", "fedrep"])
def test_lora_is_sent_and_the_head_stays(config, setting, method, head):
    stage, model, clients = setting(f"method={method}")
    if head == "linear":
        model.head = torch.zeros_like(model.head)
    server = {}
    first = one_visit(stage, model, clients[0], server)
    assert len(first.shared) == 2 * 2 * 3
    assert all(".lora_" in name for name in first.shared)
    assert first.kept.keys() == {HEAD}
    assert (first.kept[HEAD] - model.head).abs().max() > 1e-4
    # the next visit begins with the server's features and its own head
    server = {name: t + 1 for name, t in first.shared.items()}
    start = stage.start(received(model, stage, server), first.kept)
    assert all(torch.equal(start[n], t) for n, t in {**server, **first.kept}.items())
    newcomer = stage.start(received(model, stage, server), {})
    assert torch.equal(newcomer[HEAD], model.head)


def test_fedper_with_a_head_that_stands_still_is_fedavg(setting):
    stage, model, clients = setting("method=fedper", "stage1.head_lr=1e-300")
    plain = setting("method=fedavg")[0]
    one, other = (one_visit(s, model, clients[0]).shared for s in (stage, plain))
    assert one.keys() == other.keys()
    for name, t in one.items():
        torch.testing.assert_close(t, other[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("head", "own", "lr"),
    [("names", (), 0.001), ("linear", (), 0.01), ("linear", ("stage1.head_lr=0.1",), 0.1)],
)
def test_a_head_has_a_learning_rate_of_its_own(config, world, in_float64, head, own, lr):
    """A first step of AdamW is as long as the learning rate, in every parameter with a gradient."""
    one_step = ("method=fedper", "stage1.local_steps=1", f"task.head={head}")
    settings = config(in_float64, *one_step, *own)
    model = load_model(settings, world.federation)
    model.slots.set_awake((2, 3))
    model.prefix.keep([2])
    (stage, _), began = stages_of(settings), model.head
    left = one_visit(stage, model, world.federation.clients[0])
    assert (left.kept[HEAD] - began).abs().max().item() == pytest.approx(lr, rel=1e-3)
    if head == "names":  # under a head of zeros nothing reaches the features yet
        lora_B = [t for name, t in left.shared.items() if name.endswith("lora_B")]
        assert torch.stack(lora_B).abs().max().item() == pytest.approx(stage.settings.lr, rel=1e-3)


def test_heads_are_fitted_before_the_rest_of_a_visit(setting):
    """FedPer with these steps begins where FedRep's first phase ends; FedRep has no others."""
    per, model, clients = setting("method=fedper", "stage1.head_steps=4")
    rep = setting("method=fedrep", "fedrep.head_steps=4", "stage1.head_steps=9")[0]
    assert [phase.steps for phase in rep.phases] == [4, None]
    fitted = [one_visit(replace(s, phases=s.phases[:1]), model, clients[0]) for s in (per, rep)]
    assert fitted[0].kept.keys() == fitted[1].kept.keys() == {HEAD}
    assert torch.equal(fitted[0].kept[HEAD], fitted[1].kept[HEAD])
    whole = one_visit(per, model, clients[0])
    assert not torch.equal(whole.kept[HEAD], fitted[0].kept[HEAD])
    assert len(whole.shared) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("method", "steps"), [("fedavg", [6, None]), ("ditto", [6, None, 6, None]), ("zero_shot", [])]
)
def test_steps_of_heads_in_every_method(config, method, steps):
    stage = stages_of(config(f"method={method}", "stage1.head_steps=6", "task.head=linear"))[0]
    assert [phase.steps for phase in stage.phases] == steps


@pytest.mark.parametrize("asked", ["stage1.head_steps=6", "stage2.head_lr=0.01"])
def test_a_frozen_head_has_no_steps_and_no_rate(config, asked):
    with pytest.raises(ConfigError, match=rf"{asked[:6]}\.head_steps .* fedavg train none in"):
        config("method=fedavg", asked)
    config("method=fedavg", asked, "rivals=['fedper']")  # trains one of its own
    config("method=zero_shot", asked)  # trains nothing at all


def test_fedrep_trains_the_features_under_the_head_that_it_has_fitted(setting):
    stage, model, clients = setting("method=fedrep", "fedrep.head_steps=4", "stage1.head_lr=0.05")
    whole = one_visit(stage, model, clients[0])
    fitted = one_visit(replace(stage, phases=stage.phases[:1]), model, clients[0]).kept
    assert torch.equal(whole.kept[HEAD], fitted[HEAD])
    # the second phase alone, from that head; its batches are those of a first phase
    last = replace(stage, phases=stage.phases[1:])
    under_it = one_visit(last, model, clients[0], kept=fitted)
    assert under_it.shared.keys() == whole.shared.keys()
    assert torch.equal(under_it.kept[HEAD], fitted[HEAD])
    under_names = one_visit(last, model, clients[0])
    far = max((under_it.shared[n] - under_names.shared[n]).abs().max() for n in whole.shared)
    assert far > 1e-3


@pytest.fixture
def rod(setting):
    stage, model, clients = setting("method=fedrod")
    view = a_view(stage, model, clients[0], {}, moved=0.2)
    return stage, view


def test_fedrod_by_hand(rod):
    """log p = log softmax(20 z G' + z O'), loss = balanced softmax of G + cross-entropy of both."""
    stage, view = rod
    generic, own = view.live[HEAD][0], view.live[OWN][0]
    own += torch.randn_like(own)
    z = view.features("global")
    both = F.log_softmax(20.0 * z @ generic.T + z @ own.T, dim=-1)
    torch.testing.assert_close(both_heads(view), both)
    balanced = F.log_softmax(20.0 * z @ generic.T + view.counts[0].log(), dim=-1)
    wanted = F.nll_loss(balanced, view.targets) + F.nll_loss(both, view.targets)
    torch.testing.assert_close(stage.phases[0].loss(view), wanted[None])


def test_fedrods_personal_loss_reaches_the_personal_head_alone(setting):
    stage, model, clients = setting("method=fedrod")
    grads = {}
    for name, loss in (("both", stage.phases[0].loss), ("generic", BalancedSoftmax("global"))):
        view = a_view(stage, model, clients[0], {}, moved=0.2)
        view.live[OWN] += torch.randn(4, 32)
        with learning(select(view.live, stage.trains).values()):
            view = View(model, [clients[0].train[:5]], view.counts)
            loss(view).sum().backward()
            grads[name] = {n: t.grad for n, t in view.live.items() if t.grad is not None}
    assert grads["both"].keys() == {*grads["generic"], OWN}
    for name, grad in grads["generic"].items():
        torch.testing.assert_close(grads["both"][name], grad)


def test_fedrod_begins_as_the_generic_model_and_keeps_its_own_head(setting):
    stage, model, clients = setting("method=fedrod")
    view = a_view(stage, model, clients[0], {})
    torch.testing.assert_close(both_heads(view), view.log_p("global"))
    update = one_visit(stage, model, clients[0])
    assert update.kept.keys() == {OWN}
    assert {HEAD} < update.shared.keys()
    assert update.kept[OWN].abs().max() > 1e-3


def test_a_head_phase_reads_features_that_do_not_change(setting):
    """The head alone is trained: features keep no graph, the loss does."""
    stage, model, clients = setting("method=fedrep")
    model.slots.load([stage.start(received(model, stage, {}), {})], stage.trains)
    with learning([model.slots.live[HEAD]]):
        view = View(model, [clients[0].train[:5]], torch.ones(1, 4))
        assert not view.features("global").requires_grad
        assert CrossEntropy("global")(view).requires_grad


def test_a_layer_mixture_answers_by_the_head_of_its_last_expert(setting):
    stage, model, clients = setting("mofm.combine=layer", "mofm.gate_input=base", stage=1)
    stage = replace(stage, heads=("global", "local"))
    view = a_view(stage, model, clients[0], {}, moved=0.2)
    view.live["local.head.weight"] += torch.randn(4, 32)
    gates = torch.rand(5, 2, dtype=torch.float64)
    z = view.features("global", "local", gates=gates)
    wanted = F.log_softmax(20.0 * z @ view.live["local.head.weight"][0].T, dim=-1)
    torch.testing.assert_close(view.log_p("global", "local", gates=gates), wanted)
    nll = F.nll_loss(wanted, view.targets, reduction="none")
    torch.testing.assert_close(view.nll("global", "local", gates=gates), nll)
