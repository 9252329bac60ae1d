"""What a client of a finished run says: of a text or an image its class, of a text its bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedms.fl.algorithms import Stage
from fedms.fl.data.federation import Dataset
from fedms.fl.engines.world import load_federation
from fedms.fl.journal.progress import Progress
from fedms.fl.model.gate import mean_frequencies
from fedms.fl.model.view import View
from fedms.fl.runs.opened import Opened, open_run
from fedms.fl.tasks.causal_lm import predicted_tokens


@dataclass(frozen=True)
class Prediction:
    """What is said about an example; the experts' weights, or None without a mixture.

    Attributes:
        example: the text, or the name of the image's file.
        class_name, probability: of the likeliest class; of a language model None and 2 to the mean
            log2 of the tokens' probabilities.
    """

    example: str
    class_name: str | None
    probability: float
    weight_global: float | None
    weight_local: float | None

    @property
    def bits(self) -> float:
        """Bits per token, or of the likeliest class."""
        return -math.log2(self.probability)


@torch.no_grad()
def predict(
    folder: Path, client_id: str, examples: Sequence[str], progress: Progress
) -> list[Prediction]:
    """Predict with the model that ``client_id`` had after the last round of the run in ``folder``.

    Args:
        examples: texts, or files of images. Of a run of ``task.kind = "causal_lm"`` the run's data
            are read again: the gate goes by the client's own tokens.

    Raises:
        FedMSError: no such run or client, or no round of it has ended.
    """
    run = open_run(folder, [client_id], progress, examples)
    model, stage, dataset = run.model, run.stage, run.dataset
    model.slots.load([run.client(client_id)])
    counts_of, took_part = _counts(run)
    model.frequencies = mean_frequencies(map(counts_of, took_part)).to(model.backbone.device)
    counts = torch.from_numpy(counts_of(client_id)).to(model.backbone.device)
    views = [View(model, [np.array([i])], counts[None]) for i in range(len(dataset))]
    if run.config.task.kind == "causal_lm":
        return _bits(stage, views, examples, dataset)
    return [
        _class_of(stage, view, example, dataset.class_names)
        for view, example in zip(views, examples, strict=True)
    ]


def _counts(run: Opened) -> tuple[Callable[[str], np.ndarray], Sequence[str]]:
    """How often each client has each answer among its own examples [C]; and who took part."""
    if run.config.task.kind != "causal_lm":
        return (lambda client_id: np.array(run.counts[client_id])), run.took_part
    own, size = load_federation(run.config), run.model.task.num_classes

    def of_tokens(client_id: str) -> np.ndarray:
        tokens = predicted_tokens(own.dataset.inputs, own.client(client_id).own)
        return np.bincount(tokens, minlength=size)

    return of_tokens, run.took_part


def _class_of(stage: Stage, view: View, example: str, names: Sequence[str]) -> Prediction:
    log_p = view.adjusted(stage.answer(view), stage.prior)
    probability, label = log_p.exp().max(dim=-1)
    return Prediction(example, names[int(label)], float(probability), *_weights(stage, [view]))


def _bits(
    stage: Stage, views: Sequence[View], texts: Sequence[str], dataset: Dataset
) -> list[Prediction]:
    """One prediction a text, over all of its windows."""
    assert dataset.groups is not None
    log_p = [
        view.adjusted(stage.answer(view), stage.prior)
        .gather(-1, view.targets[:, None])
        .squeeze(-1)
        .double()
        for view in views
    ]
    found = []
    for number, text in enumerate(texts):
        own = np.flatnonzero(dataset.groups == number)
        mean = torch.cat([log_p[i] for i in own]).mean()
        weights = _weights(stage, [views[int(i)] for i in own])
        found.append(Prediction(text, None, float(mean.exp()), *weights))
    return found


def _weights(stage: Stage, views: Sequence[View]) -> tuple[float | None, float | None]:
    """The experts' mean weights over answers."""
    if stage.weights is None:
        return None, None
    weights = torch.cat([stage.weights(view) for view in views]).mean(0).tolist()
    return weights[0], weights[1]
