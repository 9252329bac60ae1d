"""The rivals' mathematics by hand: what each adds to federated averaging."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from visits import a_view, one_visit

from fedms.fl.algorithms import ALGORITHMS, fedex_lora, flexlora, stages_of, title
from fedms.fl.cli import main
from fedms.fl.client import received
from fedms.fl.server import Totals
from fedms.fl.types import Update, renamed, select

RIVALS = sorted(ALGORITHMS.keys() - {"zero_shot", "fedms"})
B_IN_BLOCK_3 = "global.encoder.layer.3.attention.self.query.lora_B"


def test_fedprox_adds_half_mu_times_the_squared_distance(setting):
    """Every number of two blocks' three linears is 0.5 away: 2 * 3 * 2 * 2 * 32 of them."""
    stage, model, clients = setting("method=fedprox", "fedprox.mu=0.2")
    view = a_view(stage, model, clients[0], {}, moved=0.5)
    distance = 2 * 3 * (2 * 32 + 32 * 2) * 0.25
    plain = view.mean(view.nll("global"))
    torch.testing.assert_close(stage.phases[0].loss(view), plain + 0.1 * distance)


def test_fedprox_without_mu_is_fedavg(setting):
    proximal, model, clients = setting("method=fedprox", "fedprox.mu=0.0")
    plain, _, _ = setting("method=fedavg")
    one, other = (one_visit(stage, model, clients[0]) for stage in (proximal, plain))
    for name, tensor in one.shared.items():
        torch.testing.assert_close(tensor, other.shared[name], rtol=0, atol=1e-12)
    strong = setting("method=fedprox", "fedprox.mu=1000.0")[0]
    held = one_visit(strong, model, clients[0])
    start = received(model, strong, {})
    far = [sum((u.shared[n] - start[n]).square().sum() for n in u.shared) for u in (held, one)]
    assert far[0] < 0.7 * far[1]


def test_ffa_lora_trains_and_sends_b_alone_so_the_mean_is_exact(setting):
    stage, model, clients = setting("method=ffa_lora")
    updates = [one_visit(stage, model, client) for client in clients[:2]]
    for update in updates:
        assert len(update.shared) == 2 * 3
        assert all(name.endswith("lora_B") for name in update.shared)
        assert update.kept == {}
    totals = Totals(stage.aggregate)
    for update in updates:
        totals.add(update)
    server = totals.finish({})
    a, b = (update.num_examples for update in updates)
    A = received(model, stage, server)[B_IN_BLOCK_3.replace("lora_B", "lora_A")]
    B1, B2 = (update.shared[B_IN_BLOCK_3] for update in updates)
    exact = (a * B1 @ A + b * B2 @ A) / (a + b)
    torch.testing.assert_close(server[B_IN_BLOCK_3] @ A, exact, rtol=0, atol=1e-12)


def test_fedsa_lora_sends_a_and_keeps_b(setting):
    stage, model, clients = setting("method=fedsa_lora")
    first = one_visit(stage, model, clients[0])
    assert {name[-6:] for name in first.shared} == {"lora_A"}
    assert {name[-6:] for name in first.kept} == {"lora_B"}
    assert len(first.shared) == len(first.kept) == 2 * 3
    # the next visit begins with the server's A and its own B
    server = {name: torch.ones_like(tensor) for name, tensor in first.shared.items()}
    start = stage.start(received(model, stage, server), first.kept)
    assert all(
        torch.equal(start[name], tensor) for name, tensor in {**server, **first.kept}.items()
    )
    assert stage.common is None


def test_fedex_lora_makes_the_mean_of_the_products_exact():
    """Two clients of 1 and 3 examples, A and B of one number each: (1, 2) and (5, 6)."""
    stage_aggregate = fedex_lora.Aggregate(fedex_lora.with_products, fedex_lora.finish)

    def update(n: int, A: float, B: float) -> Update:
        shared = {"global.x.lora_A": torch.tensor([[A]]), "global.x.lora_B": torch.tensor([[B]])}
        return Update("c", n, shared, {}, train_loss=0.0, steps=1)

    totals = Totals(stage_aggregate)
    totals.add(update(1, 1.0, 2.0))
    totals.add(update(3, 5.0, 6.0))
    server = totals.finish({"base.x": torch.tensor([[10.0]])})
    # mean A 4, mean B 5, mean B A (2 + 3 * 30) / 4 = 23; the base takes 23 - 20 = 3
    assert {name: tensor.item() for name, tensor in server.items()} == {
        "global.x.lora_A": 4.0,
        "global.x.lora_B": 5.0,
        "base.x": 13.0,
    }


def test_fedex_lora_clients_receive_the_exact_mean(setting):
    """The common model's linear is W + alpha / r * mean(B A), whatever the factors."""
    stage, model, clients = setting("method=fedex_lora")
    updates = [one_visit(stage, model, client) for client in clients[:3]]
    totals = Totals(stage.aggregate)
    for update in updates:
        totals.add(update)
    server = totals.finish({})
    layer = B_IN_BLOCK_3.removeprefix("global.").removesuffix(".lora_B")
    n = sum(update.num_examples for update in updates)
    pairs = [[u.shared[f"global.{layer}.lora_{x}"] for x in "BA"] for u in updates]
    exact = sum(u.num_examples / n * B @ A for u, (B, A) in zip(updates, pairs, strict=True))
    model.slots.load([stage.start(received(model, stage, server), {})])
    linear, x = model.slots.layers[layer], torch.randn(1, 7, 32, dtype=torch.double)
    with model.slots.routed(("global",), (1,)):
        found = linear(x)
    wanted = linear.base_layer(x) + model.slots.alpha / model.slots.r * x @ exact.T
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    factors = server[f"global.{layer}.lora_B"] @ server[f"global.{layer}.lora_A"]
    assert (factors - exact).abs().max() > 1e-6  # which the factors alone would have missed


def test_ditto_pulls_the_personal_model_to_what_was_received(setting):
    """Every number 0.25 away from the received global model, which itself has moved since."""
    stage, model, clients = setting("method=ditto", "ditto.pull=0.4")
    server = {
        n: torch.randn_like(t) for n, t in received(model, stage, {}).items() if "global" in n
    }
    kept = {n: t + 0.25 for n, t in renamed(server, "global.", "local.").items()}
    view = a_view(stage, model, clients[0], server, kept)
    for leaf in select(model.slots.live, ("global.*",)).values():
        leaf += 7
    distance = 2 * 3 * (2 * 32 + 32 * 2) * 0.0625
    plain = view.mean(view.nll("local"))
    torch.testing.assert_close(stage.phases[1].loss(view), plain + 0.2 * distance)


def test_ditto_sends_the_global_model_of_fedavg(setting):
    ditto, model, clients = setting("method=ditto")
    plain, _, _ = setting("method=fedavg")
    one, other = (one_visit(stage, model, clients[0]) for stage in (ditto, plain))
    assert one.shared.keys() == other.shared.keys()
    for name, tensor in one.shared.items():
        torch.testing.assert_close(tensor, other.shared[name], rtol=0, atol=1e-12)
    assert len(one.kept) == 2 * 3 * 2
    assert all(name.startswith("local.") for name in one.kept)


@pytest.mark.parametrize("method", RIVALS)
def test_a_whole_run_side_by_side_and_one_by_one(
    config, execute, tmp_path, read_lines, in_float64, method
):
    short = ("stage1.rounds=2", "stage2.rounds=1", f"method={method}", in_float64)
    losses = []
    for cohort in (1, 4):
        folder = tmp_path / str(cohort)
        execute(config(*short, f"engine.cohort={cohort}"), folder)
        lines = read_lines(folder / "metrics.jsonl")
        assert [line["failed"] for line in lines] == [[], [], []]
        losses.append([line["train_loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    assert len(set(losses[0])) == 3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_a_file_of_its_name_with_a_card(name):
    module, _ = ALGORITHMS[name]
    assert module.__name__ == f"fedms.fl.algorithms.{name}"
    said = [line.partition(":")[0] for line in module.__doc__.splitlines() if ":" in line]
    assert said[0] == title(name)
    assert said[-4:] == ["Trained", "Sent", "Kept", "Predicted"]


def test_the_cards_are_printed_with_settings(capsys):
    assert main(["run", "--methods", "ditto.pull=0.25"]) == 0
    found = capsys.readouterr().out
    assert all(f"\n{name}\n  {title(name)}:" in "\n" + found for name in ALGORITHMS)
    assert "  [ditto]\n  # The paper's lambda" in found
    assert "  pull = 0.25\n" in found


def test_equal_stages_are_equal_values(config):
    """By which a rival begins where another method ended the same first stage."""
    for method in ALGORITHMS:
        settings = config(f"method={method}")
        assert stages_of(settings) == stages_of(settings)
        assert hash(stages_of(settings)[0].phases) is not None
    avg, ft = (stages_of(config(f"method={method}"))[0] for method in ("fedavg", "fedavg_ft"))
    assert avg == ft
    assert avg != stages_of(config("method=fedprox"))[0]
    assert avg != replace(avg, settings=avg.settings.replace(lr=0.5))


def test_flexlora_of_full_rank_is_fedex_lora():
    """B A and what FedEx adds to the base are the mean of the products; here r is their rank."""
    draw = torch.Generator().manual_seed(1)

    def update(n: int) -> Update:
        shared = {
            "global.x.lora_A": torch.randn(3, 4, generator=draw, dtype=torch.double),
            "global.x.lora_B": torch.randn(3, 3, generator=draw, dtype=torch.double),
            "global.head.weight": torch.full((2, 4), float(n), dtype=torch.double),
        }
        return Update("c", n, shared, {}, train_loss=0.0, steps=1)

    updates = [update(1), update(3)]
    servers = []
    for module in (fedex_lora, flexlora):
        totals = Totals(module.Aggregate(fedex_lora.with_products, module.finish))
        for each in updates:
            totals.add(each)
        servers.append(totals.finish({}))
    fedex, flex = servers
    exact = fedex["global.x.lora_B"] @ fedex["global.x.lora_A"] + fedex["base.x"]
    torch.testing.assert_close(flex["global.x.lora_B"] @ flex["global.x.lora_A"], exact)
    assert flex.keys() == {"global.x.lora_A", "global.x.lora_B", "global.head.weight"}
    assert (flex["global.head.weight"] == (1 + 9) / 4).all()


def test_flexlora_cuts_to_the_largest_singular_values(config):
    """Two clients of rank 1: B A = diag(3, 0) and diag(0, 1), mean diag(1.5, 0.5)."""
    totals = Totals(stages_of(config("method=flexlora"))[0].aggregate)
    for row, size in ((0, 3.0), (1, 1.0)):
        A, B = torch.zeros(1, 2), torch.zeros(2, 1)
        A[0, row], B[row, 0] = 1.0, size
        shared = {"global.x.lora_A": A, "global.x.lora_B": B}
        totals.add(Update("c", 2, shared, {}, train_loss=0.0, steps=1))
    server = totals.finish({})
    product = server["global.x.lora_B"] @ server["global.x.lora_A"]
    torch.testing.assert_close(product, torch.tensor([[1.5, 0.0], [0.0, 0.0]]))
    assert server["global.x.lora_A"].shape == (1, 2)


def test_centralised_is_one_visit_to_everybodys_examples(setting, config, execute, tmp_path, world):
    """A round's server is what one client with all examples leaves after clients * steps."""
    short = ("stage1.rounds=1", "stage2.rounds=0", "centralised.clients=3", "stage1.local_steps=2")
    overrides = ("method=centralised", "model.dtype=float64", "sal.enabled=false", *short)
    run = execute(config(*overrides), tmp_path)
    stage, model, clients = setting(*overrides)
    everyone = world.federation.pooled
    assert everyone.own.tolist() == sorted(i for client in clients for i in client.own)
    update = one_visit(stage, model, everyone)
    assert update.steps == 6
    assert update.num_examples == sum(len(client.own) for client in clients)
    assert update.shared.keys() == run.server.state.keys()
    for name, tensor in update.shared.items():
        torch.testing.assert_close(run.server.state[name], tensor, rtol=0, atol=1e-12)
