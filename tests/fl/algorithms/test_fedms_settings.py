"""What FedMS can be set to, by hand: weights, the local expert's loss and place, orthogonality."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from visits import a_view, one_visit

from fedms.fl.algorithms import stages_of
from fedms.fl.algorithms.fedms import overlap
from fedms.fl.algorithms.losses import BalancedSoftmax, CrossEntropy, NotTrue
from fedms.fl.client import received
from fedms.fl.config import load_config
from fedms.fl.engines.world import load_model
from fedms.fl.types import ConfigError, select


@pytest.fixture
def stage2(setting):
    """``stage2("mofm.weight=0.3")``: the second stage and a view whose experts differ."""

    def choose(*overrides: str):
        stage, model, clients = setting(*overrides, stage=1)
        draw = torch.Generator().manual_seed(0)
        server = {
            name: t + 0.2 * torch.randn(t.shape, generator=draw, dtype=t.dtype)
            for name, t in received(model, stage, {}).items()
            if name.startswith("global.")
        }
        view = a_view(stage, model, clients[0], server, moved=0.1)
        assert (view.log_p("global") - view.log_p("local")).abs().max() > 1e-3
        return stage, view

    return choose


def test_a_fixed_weight(stage2):
    stage, view = stage2("mofm.gate=fixed", "mofm.weight=0.3")
    wanted = 0.7 * view.log_p("global").exp() + 0.3 * view.log_p("local").exp()
    torch.testing.assert_close(stage.predict(view).exp(), wanted)
    for weight, expert in ((0.0, "global"), (1.0, "local")):
        stage, view = stage2("mofm.gate=fixed", f"mofm.weight={weight}")
        torch.testing.assert_close(stage.predict(view), view.log_p(expert))


def test_a_learned_gate_is_anchored_to_the_weight(stage2):
    """Fresh it says about one half: KL(1/4, 3/4 || w)."""
    losses = {}
    for anchor in ("0.0", "2.0"):
        stage, view = stage2("mofm.weight=0.75", f"mofm.anchor={anchor}")
        losses[anchor] = stage.phases[1].loss(view)
    w = stage.weights(view)
    kl = (0.25 * (0.25 / w[:, 0]).log() + 0.75 * (0.75 / w[:, 1]).log()).mean()
    torch.testing.assert_close(losses["2.0"], losses["0.0"] + 2.0 * kl)


def test_a_head_of_the_local_experts_own_is_trained_as_lp_ft_trains_it(setting):
    probed, model, clients = setting("mofm.gate=fixed", "mofm.head_steps=3", stage=1)
    expert = one_visit(probed, model, clients[0])
    lp_ft = one_visit(setting("method=lp_ft", "lp_ft.probe_steps=3", stage=1)[0], model, clients[0])
    assert "local.head.weight" in expert.kept
    assert expert.kept.keys() == lp_ft.kept.keys()
    assert all(torch.equal(expert.kept[name], t) for name, t in lp_ft.kept.items())
    plain = one_visit(setting("mofm.gate=fixed", stage=1)[0], model, clients[0])
    assert "local.head.weight" not in plain.kept


def test_a_head_of_the_local_experts_own_stays_with_its_client(setting):
    stage, model, clients = setting("mofm.head_steps=3", stage=1)
    left = one_visit(stage, model, clients[0])
    assert all(name.startswith("gate.adapter.") for name in left.shared)
    view = a_view(stage, model, clients[0], {}, left.kept)
    torch.testing.assert_close(view.live["local.head.weight"][0], left.kept["local.head.weight"])


def test_losses_of_the_local_expert(stage2):
    for name, loss in (
        ("own", CrossEntropy("local")),
        ("balanced", BalancedSoftmax("local")),
        ("not_true", NotTrue("local", "global", 0.4, 1.0)),
    ):
        stage, view = stage2(f"mofm.local_loss={name}", "mofm.distill=0.4")
        torch.testing.assert_close(stage.phases[0].loss(view), loss(view))


def test_overlap_by_hand(stage2):
    """Column j of B_local is column 2 of every B_global, times j + 1."""
    _, view = stage2()
    for name, local in select(view.live, ("local.*.lora_B",)).items():
        shared = view.live[name.replace("local.", "global.", 1)]
        shared.copy_(torch.linalg.qr(torch.randn_like(shared[0]))[0][None])
        local.copy_(shared[..., 1:] * torch.tensor([1.0, 2.0]))
    assert view.live[name].shape == (1, 32, 2)
    torch.testing.assert_close(overlap(view), torch.tensor([6 * (1.0 + 4.0)]).double())
    stage, _ = stage2("mofm.orthogonal=0.5")
    assert stage.phases[0].loss(view) == pytest.approx(
        (CrossEntropy("local")(view) + 0.5 * 30).item()
    )


def test_an_orthogonal_expert_writes_apart(setting):
    left = []
    for weight in (0.0, 100.0):
        overrides = ("mofm.local_from=residual", f"mofm.orthogonal={weight}")
        stage, model, clients = setting(*overrides, "stage2.local_steps=6", stage=1)
        server = one_visit(setting("method=fedavg")[0], model, clients[1]).shared
        update = one_visit(stage, model, clients[0], server)
        left.append(overlap(a_view(stage, model, clients[0], server, update.kept)).item())
    assert left[1] < 0.7 * left[0]


def test_a_residual_is_on_top_of_the_global_expert(setting):
    stage, model, clients = setting("mofm.local_from=residual", "mofm.gate=fixed", stage=1)
    server = one_visit(setting("method=fedavg")[0], model, clients[1]).shared
    fresh = a_view(stage, model, clients[0], server)
    torch.testing.assert_close(stage.predict(fresh), fresh.log_p("global"))  # B is zero
    view = a_view(stage, model, clients[0], server, moved=0.1)
    both = view.log_p("global", "local")
    torch.testing.assert_close(
        stage.predict(view).exp(), (view.log_p("global").exp() + both.exp()) / 2
    )
    torch.testing.assert_close(stage.phases[0].loss(view), F.nll_loss(both, view.targets)[None])


def test_no_residual_within_a_layer():
    with pytest.raises(ConfigError, match='local_from must not be "residual"'):
        load_config(
            None, ["mofm.combine=layer", "mofm.gate_input=base", "mofm.local_from=residual"]
        )


@pytest.mark.parametrize("start", ["global", "zero", "residual"])
def test_a_newcomer_answers_by_the_head_that_it_was_sent(config, world, start):
    """Not by a head of zeros; the expert under it is the global one, or fresh."""
    settings = config("task.head=linear", f"mofm.local_from={start}")
    model, stage = load_model(settings, world.federation), stages_of(settings)[1]
    sent = {n: torch.randn_like(t) for n, t in received(model, stage, {}).items()}
    sent = select(sent, ("global.*",))
    begun = stage.start(received(model, stage, sent), {})
    local = {name: t for name, t in begun.items() if name.startswith("local.")}
    assert torch.equal(begun["local.head.weight"], sent["global.head.weight"])
    fresh = [not t.any() for name, t in local.items() if name.endswith("lora_B")]
    assert fresh == [start != "global"] * len(fresh)


LAYER = ("mofm.combine=layer", "mofm.gate_input=base")


@pytest.mark.parametrize("loss", ["balanced", "not_true"])
def test_a_layer_mixture_has_no_loss_of_another(loss):
    with pytest.raises(ConfigError, match=f'local_loss must not be "{loss}"'):
        load_config(None, [*LAYER, f"mofm.local_loss={loss}"])
    load_config(None, [*LAYER, "mofm.local_loss=mixture"])


def test_a_layer_mixture_trains_on_all_of_a_clients_examples(config):
    stages = stages_of(config(*LAYER))
    assert [phase.examples for stage in stages for phase in stage.phases] == ["own", "own"]
    apart = stages_of(config())
    assert [p.examples for stage in apart for p in stage.phases] == ["train", "train", "gate"]
