"""The knob between own data and everyone's: by hand, over every method, and as a method."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedms.fl.algorithms import ALGORITHMS, stages_of
from fedms.fl.client import class_counts, received
from fedms.fl.config import load_config
from fedms.fl.model.gate import mean_frequencies
from fedms.fl.model.view import View
from fedms.fl.runs.folder import start
from fedms.fl.runs.predict import predict
from fedms.fl.types import ConfigError


def test_everyones_label_frequencies_by_hand():
    """Counts 3, 0 and 0, 0 of two classes: (4/5, 1/5) and (1/2, 1/2); their mean."""
    found = mean_frequencies([np.array([3, 0]), np.array([0, 0])])
    torch.testing.assert_close(found, torch.tensor([0.65, 0.35], dtype=torch.double))


@pytest.fixture
def two_clients(config, world, in_float64):
    """Views of clients 0 and 1 side by side, and the model."""
    from fedms.fl.engines.world import load_model

    settings = config(in_float64)
    model = load_model(settings, world.federation)
    model.slots.set_awake((3,))
    clients = world.federation.clients[:2]
    stage = stages_of(settings.replace(method="fedavg"))[0]
    sent = received(model, stage, {})
    model.slots.load([stage.start(sent, {}), stage.start(sent, {})])
    return View(model, [c.test[:3] for c in clients], class_counts(model, clients)), model


def test_the_adjustment_by_hand(two_clients):
    """p * (pk / pbar) ** a, normalised, with each client's own pk."""
    view, model = two_clients
    view.counts = torch.tensor([[3, 0, 1, 0], [0, 0, 0, 6]])
    model.frequencies = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.double)
    own = torch.tensor([[4, 1, 2, 1], [1, 1, 1, 7]], dtype=torch.double)
    own = own / own.sum(-1, keepdim=True)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.double).expand(6, 4)
    for a in (-0.5, 0.25, 1.0):
        wanted = p * (own / model.frequencies)[[0, 0, 0, 1, 1, 1]] ** a
        wanted = wanted / wanted.sum(-1, keepdim=True)
        torch.testing.assert_close(view.adjusted(p.log(), a).exp(), wanted)
    assert torch.equal(view.adjusted(p.log(), 0.0), p.log())


def test_a_client_like_everyone_is_not_moved(two_clients):
    view, model = two_clients
    view.counts = torch.tensor([[9, 9, 9, 9], [4, 4, 4, 4]])
    model.frequencies = torch.full((4,), 0.25, dtype=torch.double)
    log_p = torch.randn(6, 4, dtype=torch.double).log_softmax(-1)
    torch.testing.assert_close(view.adjusted(log_p, 3.0), log_p)


@pytest.mark.parametrize("method", [m for m in ALGORITHMS if m != "zero_shot"])
def test_every_method_has_the_knob(config, method):
    for stage in stages_of(config(f"method={method}", "prior=0.5", "eval.priors=[-1.0, 2.0]")):
        assert stage.prior == 0.5
        assert stage.priors == (-1.0, 2.0)
        assert stage == replace(stage, priors=(-1.0, 2.0))


def test_the_knob_is_a_finite_number():
    with pytest.raises(ConfigError, match="prior must be a finite number"):
        load_config(None, ["prior=inf"])
    with pytest.raises(ConfigError, match=r"eval\.priors"):
        load_config(None, ["eval.priors=[nan]"])


def last_scores(folder):
    lines = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    return {c["client_id"]: c for c in lines if c["round"] == lines[-1]["round"]}


def test_scores_at_other_values_are_those_of_runs_with_them(config, execute, tmp_path, in_float64):
    """By fine-tuning, and by FedAvg, whose clients share one model only where the knob is 0."""
    for method in ("fedavg_ft", "fedavg"):
        common = (f"method={method}", in_float64, "stage1.rounds=1", "stage2.rounds=1")
        folders = {a: tmp_path / method / str(a) for a in (0.0, 0.7)}
        execute(config(*common, "eval.priors=[0.7]"), folders[0.0])
        execute(config(*common, "prior=0.7", "eval.priors=[0.0]"), folders[0.7])
        plain, moved = map(last_scores, folders.values())
        assert plain.keys() == moved.keys()
        assert len(plain) == 5
        for one, other in zip(plain.values(), moved.values(), strict=True):
            assert one["by_prior"] == {"0.7": [other["accuracy"], other["pooled_accuracy"]]}
            assert other["by_prior"] == {"0.0": [one["accuracy"], one["pooled_accuracy"]]}
        assert any(
            one["pooled_accuracy"] != other["pooled_accuracy"]
            for one, other in zip(plain.values(), moved.values(), strict=True)
        )


def test_the_prior_adjusted_global_expert_is_fedavg_with_the_knob(
    config, execute, tmp_path, in_float64
):
    short = (in_float64, "stage1.rounds=2", "stage2.rounds=1")
    execute(config(*short, "method=fedavg", "prior=1.5"), tmp_path / "knob")
    execute(config(*short, "method=fedavg_prior", "fedavg_prior.tau=1.5"), tmp_path / "method")
    execute(config(*short, "method=fedavg_prior", "fedavg_prior.tau=0.0"), tmp_path / "zero")
    execute(config(*short, "method=fedavg"), tmp_path / "plain")
    knob, method, zero, plain = (
        [(c["accuracy"], c["pooled_accuracy"]) for c in last_scores(tmp_path / name).values()]
        for name in ("knob", "method", "zero", "plain")
    )
    assert knob == method
    assert zero == plain
    assert knob != plain


def test_predict_moves_the_answer_as_the_scores_were_moved(config, quiet, tmp_path):
    """log of p(client's likeliest) changes by the shift of its class, up to normalisation."""
    answers = {}
    for a in (0.0, 5.0):
        folder = tmp_path / str(a)
        start(
            config("method=fedavg", "stage1.rounds=1", "stage2.rounds=0", f"prior={a}"),
            folder,
            quiet,
        )
        (answers[a],) = predict(folder, "client-00", ["cough old breath"], quiet)
    record = json.loads((folder / "label_counts.json").read_text())
    assert record["unseen"] == record["clients"][-1:]
    everyone = mean_frequencies(np.array(c) for c in record["counts"][:-1])
    own = np.array(record["counts"][0]) + 1.0
    shift = np.log(own / own.sum()) - everyone.log().numpy()
    assert answers[5.0].class_name == record["class_names"][int(shift.argmax())]
    assert answers[5.0].probability > 1 / 4
    assert math.isfinite(answers[0.0].bits)
