"""Whole runs through the channel: codecs, privacy and robust rules change what they should."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from fedms.fl.channel.channel import Channel
from fedms.fl.channel.link import RESIDUAL, Link
from fedms.fl.channel.privacy import Guarantee
from fedms.fl.channel.settings import ChannelConfig
from fedms.fl.engines.engine import Order, Reply
from fedms.fl.engines.local import LocalEngine
from fedms.fl.server import Sent, Totals
from fedms.fl.types import ConfigError

SHORT = ("stage1.local_steps=1", "stage2.local_steps=1", "sal.trigger=all_at_once")
PRIVATE = ("channel.privacy.clip=0.5", "channel.privacy.delta=0.01", "server.quorum=0.01")


accounted = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason='pip install "fedms[privacy]"'
)


@pytest.fixture
def metrics(config, execute, tmp_path, read_lines):
    def run(*overrides: str, name: str = "run") -> list[dict]:
        execute(config(*SHORT, *overrides), tmp_path / name)
        return read_lines(tmp_path / name / "metrics.jsonl")

    return run


# Codecs ----------------------------------------------------------------------------------------


def test_codecs_send_less_and_learn_the_same(metrics):
    lines = {c: metrics(f"channel.codec={c}", name=c) for c in ("none", "fp16", "int8", "topk")}
    up = {codec: sum(line["bytes_up"] for line in found) for codec, found in lines.items()}
    assert up["topk"] < up["int8"] < up["fp16"] < up["none"]
    for codec, within in (("fp16", 1e-3), ("int8", 2e-2), ("topk", 0.5)):
        for line, plain in zip(lines[codec], lines["none"], strict=True):
            assert line["failed"] == []
            assert line["bytes_down"] == plain["bytes_down"]
            assert line["train_loss"] == pytest.approx(plain["train_loss"], abs=within)
        assert lines[codec][1]["train_loss"] != lines["none"][1]["train_loss"]


@pytest.mark.parametrize("method", ["fedms", "rolora", "fedsa_lora", "ditto"])
def test_what_is_not_sent_yet_is_no_part_of_a_model(metrics, config, execute, tmp_path, method):
    run = execute(config(*SHORT, f"method={method}", "channel.codec=int8"), tmp_path)
    held = run.journal.states.read("client-00", run.done)
    late = {name for name in held if name.startswith(RESIDUAL)}
    assert late
    assert any(held[name].abs().max() > 0 for name in late)
    names = {name.removeprefix(RESIDUAL) for name in late}
    if method == "rolora":
        assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B"}
    if method == "fedms":
        assert all(name.startswith("gate.adapter.") for name in names)  # stage 1's is gone
    assert not any(name.startswith(RESIDUAL) for name in run.server.state)


def test_what_is_not_sent_yet_is_committed(config, execute, tmp_path):
    """FedAvg's clients keep nothing else; a resume must find it whole."""
    execute(config(*SHORT, "method=fedavg", "channel.codec=int8"), tmp_path)
    states = sorted(tmp_path.glob("checkpoints/*/state.json"))
    written = [json.loads(path.read_bytes())["written"] for path in states]
    assert written == [[f"client-0{i}" for i in range(4)]] * 2


def test_clients_begin_with_what_arrives(spied):
    """They train at a rate that changes nothing, and send what they began with."""
    one = ("stage1.rounds=1", "stage2.rounds=0", "stage1.lr=1e-30")
    spy = spied(*SHORT, *one, "channel.codec_down=int8")
    state, link = spy.orders[0].sent, Link(ChannelConfig(codec_down="int8"))
    arrived = link.receive(link.send(1, state), 1, state)
    for name, tensor in spy.sent[1, "client-00"].items():
        assert (tensor - arrived[name]).abs().max() < 1e-20
    assert max((arrived[name] - tensor).abs().max() for name, tensor in state.items()) > 1e-4


def test_the_way_down_is_encoded_too(metrics):
    plain = metrics(name="plain")
    for codec in ("fp16", "int8"):
        lines = metrics(f"channel.codec_down={codec}", name=codec)
        assert sum(line["bytes_down"] for line in lines) < 0.75 * sum(
            line["bytes_down"] for line in plain
        )
        assert [line["bytes_up"] for line in lines] == [line["bytes_up"] for line in plain]


# Privacy ---------------------------------------------------------------------------------------


@accounted
def test_privacy_spends_its_budget_round_by_round(metrics):
    lines = metrics(*PRIVATE, "channel.privacy.epsilon=4.0", "server.fraction_train=0.6")
    spent = [line["epsilon"] for line in lines]
    assert spent == sorted(spent)
    assert 3.9 < spent[-1] <= 4
    assert all(line["train_loss"] is None for line in lines)


@accounted
def test_what_is_not_shared_costs_nothing(metrics):
    lines = metrics(*PRIVATE, "mofm.share_adapter=false", "channel.privacy.epsilon=4.0")
    spent = [line["epsilon"] for line in lines]
    assert spent[1] == spent[2] == spent[3]
    assert 3.9 < spent[1] <= 4


@accounted
def test_the_server_moves_by_the_clipped_mean_and_the_noise(config, execute, tmp_path):
    """Without noise four clients of norm 0.001 move it by 0.001 at most; with it by much more."""

    def moved(name: str, epsilon: str) -> float:
        settings = (*PRIVATE, "method=fedavg", "stage1.rounds=1", "stage2.rounds=0")
        small = ("channel.privacy.clip=0.001", f"channel.privacy.epsilon={epsilon}")
        run = execute(config(*SHORT, *settings, *small), tmp_path / name)
        began = run.server._model.slots.fresh("global")
        change = [(t - began[n]).double().pow(2).sum() for n, t in run.server.state.items()]
        return float(torch.stack(change).sum().sqrt())

    assert 0.0002 < moved("clipped", "inf") <= 0.001 * (1 + 1e-4)
    assert moved("noised", "1.0") > 0.01


def test_a_sum_is_divided_by_the_clients_that_are_expected(config):
    """Whoever came: of eight clients a half is drawn."""
    half = (*PRIVATE, "channel.privacy.epsilon=inf", "server.fraction_train=0.5")
    channel, began = Channel.of(config(*SHORT, *half), 8), {"w": torch.zeros(2)}
    totals = Totals(channel.aggregate(channel.stages[0], began, 1))
    totals.add(Sent("a", 1, 9, {"w": torch.tensor([0.3, 0.4])}, False, None))
    assert totals.finish(began)["w"].tolist() == pytest.approx([0.3 / 4, 0.4 / 4])


def test_every_round_has_noise_and_a_cohort_of_its_own(config):
    """Noise that came twice could be taken out; sizes of cohorts drawn client by client differ."""
    half = (*PRIVATE, "channel.privacy.epsilon=inf", "server.fraction_train=0.5")
    channel, began = Channel.of(config(*SHORT, *half), 8), {"w": torch.zeros(3)}
    channel = replace(channel, promise=Guarantee(1.0, 0.5, 0.01))
    noise = [
        Totals(channel.aggregate(channel.stages[0], began, round)).finish(began)["w"]
        for round in (1, 2, 1)
    ]
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert len({len(channel.cohort("abcdefgh", round)) for round in range(20)}) > 1


def test_an_infinite_budget_is_no_epsilon_and_valid_json(metrics, tmp_path):
    lines = metrics(*PRIVATE, "channel.privacy.epsilon=inf")
    assert [line["epsilon"] for line in lines] == [None] * 4
    assert "Infinity" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=fedex_lora"], "fedex_lora aggregates by a rule of its own, which has no bound"),
        (["prior=0.5"], "tell clients everyone's label frequencies without noise"),
        (["eval.priors=[1.0]"], "tell clients everyone's label frequencies without noise"),
        (["method=fedavg_prior"], "tell clients everyone's label frequencies without noise"),
        (["sal.trigger=capability_queue"], "lets scores on the clients' data decide"),
        (["sal.order=importance"], "reads gradients of the clients' data"),
        (["sal.order=importance", "method=fedavg"], "reads gradients of the clients' data"),
        (["sal.order=importance", "sal.enabled=false"], "reads gradients of the clients' data"),
        (["method=centralised"], "centralised trains on all clients' examples in one place: none"),
        (["channel.privacy.delta=0.25"], "must be less than 1 / 4 clients"),
    ],
)
def test_what_voids_the_guarantee_is_refused(config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        Channel.of(config(*SHORT, *PRIVATE, *overrides), 4)


def test_what_a_robust_rule_cannot_do_is_refused(config):
    with pytest.raises(ConfigError, match="no epsilon would hold"):
        config(*PRIVATE, "channel.aggregate=median")
    rule = "channel.aggregate=multi_krum"
    with pytest.raises(ConfigError, match="fedex_lora aggregates by a rule of its own, which has"):
        Channel.of(config(rule, "method=fedex_lora"), 4)
    with pytest.raises(ConfigError, match="centralised trains on all clients' examples in one pla"):
        Channel.of(config(rule, "method=centralised"), 20)
    with pytest.raises(ConfigError, match=r"1 hostile clients needs a cohort of 5, got 4"):
        Channel.of(config(rule), 4)
    with pytest.raises(ConfigError, match=r'with sal.scope = "client" they hold different blocks'):
        Channel.of(config(rule, "sal.scope=client"), 20)


# Robust rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "multi_krum", "bipartition"])
def test_robust_rules_run(metrics, rule):
    lines = metrics(f"channel.aggregate={rule}", "channel.hostile=0.24")
    assert all(line["failed"] == [] for line in lines)


# Resuming --------------------------------------------------------------------------------------


class Stops(LocalEngine):
    """Is killed in the third round."""

    def train(self, order: Order) -> Reply:
        if order.round == 3:
            raise InterruptedError
        return super().train(order)


@pytest.mark.parametrize(
    "overrides",
    [
        ("channel.codec=int8",),
        (*PRIVATE, "channel.privacy.epsilon=inf", "server.fraction_train=0.6"),
    ],
)
def test_a_resumed_run_is_the_run(config, execute, tmp_path, read_lines, overrides):
    """What was lost, the cohorts and the noise come again as they were."""
    chosen = config(*SHORT, *overrides)
    execute(chosen, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        execute(chosen, tmp_path / "again", engine=Stops)
    execute(chosen, tmp_path / "again")
    for file in ("metrics.jsonl", "clients.jsonl"):
        assert read_lines(tmp_path / "again" / file) == read_lines(tmp_path / "whole" / file)
