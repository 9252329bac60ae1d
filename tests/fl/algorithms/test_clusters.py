"""A middle expert a cluster: the clustering by hand, and runs of clients that contradict."""

from __future__ import annotations

import csv
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from spy import servers
from visits import a_view, one_visit

from fedms.fl.algorithms.clusters import ByCluster, affinity, cluster_of, spectral
from fedms.fl.algorithms.stage import of_group
from fedms.fl.config import load_config
from fedms.fl.engines.world import load_federation
from fedms.fl.runs.export import export_clients
from fedms.fl.runs.folder import start
from fedms.fl.runs.predict import predict
from fedms.fl.types import ConfigError, QuorumError, select


def b_of(*columns: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """An expert of one linear whose B [6, r] has these unit vectors as columns."""
    return {
        "cluster.q.lora_A": torch.ones(2, 3),
        "cluster.q.lora_B": scale * torch.eye(6)[:, columns],
    }


# The mathematics ----------------------------------------------------------------------------------


def test_affinity_by_hand():
    """Planes that share a line have half of what equal ones have, whatever their bases."""
    turned = b_of(0, 1, scale=3.0)
    turned["cluster.q.lora_B"] = turned["cluster.q.lora_B"] @ torch.tensor(
        [[1.0, 2.0], [0.5, -1.0]]
    )
    found = affinity([b_of(0, 1), turned, b_of(1, 2), b_of(3, 4)])
    wanted = [[1, 1, 0.5, 0], [1, 1, 0.5, 0], [0.5, 0.5, 1, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(found, torch.tensor(wanted).double())
    torch.testing.assert_close(
        affinity([b_of(0, 1)], [b_of(3, 4), b_of(0, 1)])[0].round(),
        torch.tensor([0.0, 1.0]).double(),
    )
    both = [{**b_of(0, 1), "cluster.v.lora_B": torch.eye(4)[:, [0, k]]} for k in (1, 2)]
    assert affinity(both)[0, 1].item() == pytest.approx((1 + 0.5) / 2)


def planted(groups: list[int], noise: float) -> torch.Tensor:
    """The affinity of clients whose B [40, 3] is their group's own and noise."""
    draw = torch.Generator().manual_seed(0)
    own = torch.randn(max(groups) + 1, 40, 3, generator=draw)
    clients = [own[g] + noise * torch.randn(40, 3, generator=draw) for g in groups]
    return affinity([{"cluster.q.lora_B": B} for B in clients])


@pytest.mark.parametrize("groups", [[0, 1] * 4, [0, 0, 0, 1, 1, 2, 1, 2, 2], [0, 1, 1, 1, 1, 1]])
def test_planted_subspaces_are_found(groups):
    noisy = planted(groups, noise=0.7)
    assert spectral(noisy, max(groups) + 1) == groups
    assert spectral(noisy, 6, eigengap=True) == groups
    assert len({*spectral(noisy, 2, eigengap=True)}) == 2


def test_limits_of_the_clustering():
    like = planted([0, 0, 0, 0], noise=0.5)
    assert spectral(like, 1) == spectral(like, 1, eigengap=True) == [0, 0, 0, 0]
    assert spectral(like, 4) == [0, 1, 2, 3]
    assert spectral(like[:2, :2], 9, eigengap=True) == [0, 1]
    assert spectral(like[:1, :1], 3, eigengap=True) == [0]


def test_the_servers_end_by_hand():
    """Weighted by examples; who comes later joins, and counts from its next update on."""
    finish = ByCluster(2, eigengap=False)
    sent = {"a": b_of(0, 1), "b": b_of(2, 3), "c": b_of(0, 1, scale=4.0)}
    server = finish({"global.x": torch.ones(1)}, sent, {"a": 2.0, "b": 5.0, "c": 1.0})
    assert [cluster_of(server, c) for c in ("a", "b", "c", "d")] == ["0", "1", "0", ""]
    torch.testing.assert_close(server["cluster-0.q.lora_B"], 2.0 * torch.eye(6)[:, :2])
    assert torch.equal(server["cluster-1.q.lora_B"], torch.eye(6)[:, 2:4])
    after = finish(server, {"b": b_of(2, 5), "d": b_of(1, 0, scale=9.0)}, {"b": 1.0, "d": 1.0})
    assert cluster_of(after, "d") == "0"
    assert after["cluster-0.q.lora_B"] is server["cluster-0.q.lora_B"]
    assert torch.equal(after["cluster-1.q.lora_B"], torch.eye(6)[:, [2, 5]])
    assert cluster_of(after, "a") == "0"
    assert finish(server, {}, {}) == server  # the very tensors
    with pytest.raises(QuorumError, match=r"2 updates at least .* mofm.clusters = 2, 1 came"):
        finish({}, {"a": sent["a"]}, {"a": 1.0})


def test_who_is_shown_what():
    server = {
        "cluster-1.q": torch.ones(1),
        "cluster-11.q": torch.zeros(1),
        "clusters.a-1": torch.ones(1),
    }
    assert of_group(server, "1")["cluster.q"] is server["cluster-1.q"]
    assert "cluster.q" not in of_group(server, "")
    assert set(of_group(server, "1")) == {*server, "cluster.q"}


# FedMS with them ----------------------------------------------------------------------------------

TWO = ("mofm.clusters=2", "mofm.cluster_rounds=1")


@pytest.mark.parametrize("local_from", ["global", "zero", "residual"])
def test_the_mixture_is_of_the_sum_and_the_local_expert(setting, local_from):
    stage, model, clients = setting(
        *TWO, f"mofm.local_from={local_from}", "mofm.gate=fixed", stage=2
    )
    first = one_visit(setting("method=fedavg")[0], model, clients[1]).shared
    middle = one_visit(setting(*TWO, stage=1)[0], model, clients[1], first).shared
    fresh = a_view(stage, model, clients[0], {**first, **middle})
    shared = fresh.log_p("global", "cluster")
    assert (shared - fresh.log_p("global")).abs().max() > 1e-3
    if local_from != "zero":  # the local expert begins where the sum stands
        torch.testing.assert_close(stage.predict(fresh), shared)
    view = a_view(stage, model, clients[0], {**first, **middle}, moved=0.1)
    under = {"global": ("cluster",), "zero": (), "residual": ("global", "cluster")}[local_from]
    wanted = (view.log_p("global", "cluster").exp() + view.log_p(*under, "local").exp()) / 2
    torch.testing.assert_close(stage.predict(view).exp(), wanted)


def test_who_is_in_no_cluster_has_the_global_expert(setting):
    for number in (1, 2):
        stage, model, clients = setting(*TWO, "mofm.gate=fixed", stage=number)
        first = one_visit(setting("method=fedavg")[0], model, clients[1]).shared
        view = a_view(stage, model, clients[0], first)
        torch.testing.assert_close(stage.predict(view), view.log_p("global"))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("mofm.combine=layer", "mofm.gate_input=base"), "three"),
        (("stage1.rounds=0",), r"the last of stage1.rounds = 0, got 1"),
        (("sal.scope=client",), "fedms needs every block of every client"),
    ],
)
def test_what_cannot_be_with_clusters(overrides, reason):
    load_config(None, TWO)
    with pytest.raises(ConfigError, match=reason):
        load_config(None, [*TWO, *overrides])


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("channel.aggregate=median", "channel.hostile=0.2"), "has no median"),
        (
            ("channel.privacy.clip=1.0", "channel.privacy.epsilon=inf", "sal.trigger=every"),
            "epsilon",
        ),
        (("mofm.clusters=5",), "needs a cohort of 5 clients, got 4"),
        (("server.fraction_train=0.25",), "needs a cohort of 2 clients, got 1"),
    ],
)
def test_what_a_federation_cannot_have_with_clusters(config, tmp_path, quiet, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        start(config(*TWO, *overrides), tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "config.toml").exists()


# Whole runs ---------------------------------------------------------------------------------------


WORDS = {
    "lung": ["cough", "breath", "wheeze", "sputum", "chest"],
    "heart": ["pulse", "beat", "murmur", "valve", "pressure"],
    "bone": ["fracture", "joint", "spine", "knee", "hip"],
    "skin": ["rash", "itch", "burn", "blister", "wound"],
}


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """Settings of six wards; for the odd ones each class has the next one's name."""
    draw, names = random.Random(0), list(WORDS)
    path = tmp_path_factory.mktemp("divided") / "notes.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "ward"])
        for ward in range(6):
            for i in range(40):
                words = draw.choices(WORDS[names[i % 4]], k=4)
                writer.writerow([" ".join(words), names[(i + ward % 2) % 4], f"ward-{ward}"])
    return [
        f"data.source={path}", "data.partitioner=column", "data.client_column=ward",
        "data.unseen_clients=0", "stage1.rounds=4", "stage1.local_steps=10", "stage2.rounds=1",
        "sal.trigger=all_at_once", "engine.cohort=3", "eval.every=2", "mofm.gate=fixed",
    ]  # fmt: skip


WARDS = [f"ward-{i}" for i in range(6)]


def test_clients_that_contradict_each_other_part_and_gain(spied, read_lines, divided):
    engine = spied(*divided, "mofm.clusters=6", "mofm.eigengap=true")
    plain = spied(*divided)
    last = servers(engine.folder)[-1]
    assert [cluster_of(last, ward) for ward in WARDS] == ["0", "1"] * 3
    lines, plainly = (read_lines(run.folder / "metrics.jsonl") for run in (engine, plain))
    assert [line["stage"] for line in lines] == ["stage1"] * 2 + ["clusters"] * 2 + ["stage2"]
    found, plainly = (
        [line["personalized_accuracy"]["mean"] for line in each[3:]] for each in (lines, plainly)
    )
    assert plainly[0] < 0.5  # one model cannot be right for both
    assert found[0] > plainly[0] + 0.1
    assert found[1] > plainly[1] + 0.1


def test_a_client_is_sent_its_own_clusters_expert_alone(spied, divided):
    engine = spied(*divided, "mofm.clusters=2")
    held = servers(engine.folder)
    orders = {(o.round, min(o.clients)): o for o in engine.orders}
    assert [o.round for o in engine.orders] == [1, 2, 3, 4, 4, 5, 5]
    for round in (4, 5):
        for number in (0, 1):
            order = orders[round, f"ward-{number}"]
            assert sorted(order.clients) == WARDS[number::2]
            assert {n.partition(".")[0] for n in order.received} == {"global", "cluster"}
            for name, tensor in select(order.received, ("cluster.*",)).items():
                wanted = held[round - 2][name.replace("cluster.", f"cluster-{number}.", 1)]
                assert torch.equal(tensor, wanted)
    fresh = select(orders[3, "ward-0"].received, ("cluster.*.lora_B",))
    assert fresh
    assert not any(tensor.any() for tensor in fresh.values())
    for name, tensor in select(held[1], ("global.*",)).items():
        assert torch.equal(held[-1][name], tensor)  # frozen since
    kept = engine.world.model.outputs  # by path and example: two clusters would share it
    assert kept.missing(("cluster",), np.array([0])) is None


def test_one_cluster_is_a_second_global_expert_and_one_each_is_local(spied, divided):
    """The mean of all, weighted by their examples; and each client's own, of nobody else."""
    one = spied(*divided, "mofm.clusters=1", "stage2.rounds=0")
    examples = {c.client_id: len(c.own) for c in one.world.federation.clients}
    own = spied(*divided, "mofm.clusters=6", "stage2.rounds=0")
    together, apart = servers(one.folder)[-1], servers(own.folder)[-1]
    for name, tensor in select(together, ("cluster-0.*",)).items():
        sent = [one.sent[4, c][name.replace("-0", "", 1)].double() * examples[c] for c in WARDS]
        torch.testing.assert_close(tensor, (sum(sent) / sum(examples.values())).float())
    for ward in WARDS:
        for name, tensor in own.sent[4, ward].items():
            place = name.replace("cluster.", f"cluster-{cluster_of(apart, ward)}.", 1)
            assert torch.equal(apart[place], tensor)


def test_predict_and_export_take_the_clients_own_cluster(
    config, divided, tmp_path, quiet, read_lines
):
    folder = tmp_path / "run"
    settings = config(*divided, "mofm.clusters=2")
    start(settings, folder, quiet)
    federation = load_federation(settings)
    scores = {
        line["client_id"]: line["accuracy"]
        for line in read_lines(folder / "clients.jsonl")
        if line["round"] == 5
    }
    for ward in WARDS[:2]:
        test, dataset = federation.client(ward).test, federation.dataset
        said = predict(folder, ward, [dataset.inputs[i] for i in test], quiet)
        right = [dataset.class_names[dataset.labels[i]] for i in test]
        hits = [each.class_name == name for each, name in zip(said, right, strict=True)]
        assert sum(hits) / len(hits) == pytest.approx(scores[ward])
    experts = {path.name for path in (folder / "adapters").iterdir()}
    assert experts == {"global", "cluster-0", "cluster-1"}
    table = {name: int(t) for name, t in load_file(folder / "clusters.safetensors").items()}
    assert table == {f"clusters.{ward}": i % 2 for i, ward in enumerate(WARDS)}
    assert len([*export_clients(folder, WARDS[:1], quiet)]) == 1
    assert json.loads((folder / "adapters/cluster-1/adapter_config.json").read_text())["r"] == 2
