"""What a client of a finished run says about texts: its class, and how much each expert weighed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedms.fl.algorithms import stages_of
from fedms.fl.client import received
from fedms.fl.config import load_config
from fedms.fl.data.federation import Dataset, Federation
from fedms.fl.engines.world import load_model
from fedms.fl.model.view import View
from fedms.fl.runs.checkpoint import load_checkpoint
from fedms.fl.runs.origin import check_model, frozen_weights
from fedms.fl.runs.progress import Progress
from fedms.fl.sal import Activation
from fedms.fl.types import FedMSError


@dataclass(frozen=True)
class Prediction:
    """A text's class name and probability; the experts' weights, or None without a mixture."""

    text: str
    class_name: str
    probability: float
    weight_global: float | None
    weight_local: float | None


@torch.no_grad()
def predict(
    folder: Path, client_id: str, texts: Sequence[str], progress: Progress
) -> list[Prediction]:
    """Predict with the model that ``client_id`` had after the last round of the run in ``folder``.

    Raises:
        FedMSError: no such run or client, or no round of it has ended.
    """
    if not (folder / "config.toml").is_file():
        raise FedMSError(f"{folder} holds no run: it has no config.toml")
    config = load_config(folder / "config.toml")
    checkpoint = load_checkpoint(folder / "checkpoints", progress.warn)
    if checkpoint is None:
        raise FedMSError(f"no round of {folder} has ended yet; there is nothing to predict with")
    record = json.loads((folder / "label_counts.json").read_bytes())
    if client_id not in record["clients"]:
        raise FedMSError(
            f"{folder} has no client {client_id!r}; "
            f"its clients are {', '.join(record['clients'][:8])} ..."
        )
    counts = torch.tensor(record["counts"][record["clients"].index(client_id)])

    everyone = np.arange(len(texts))
    dataset = Dataset(
        tuple(texts), np.zeros(len(texts), dtype=np.int64), tuple(record["class_names"])
    )
    model = load_model(config, Federation(dataset, ()))
    check_model(folder, frozen_weights(model.backbone.model), config.model.path)
    activation = Activation(config.sal, checkpoint.sal["order"])
    activation.restore(checkpoint.sal)
    model.slots.set_awake(activation.awake)
    stages, ended = stages_of(config), 0
    stage = stages[-1]
    for stage in stages:
        ended += stage.settings.rounds
        if checkpoint.round <= ended:
            break
    model.build(dict(stage.modules))
    kept = checkpoint.kept.get(client_id, {})
    model.slots.load([stage.start(received(model, stage, checkpoint.server), kept)])
    view = View(model, [everyone], counts[None])
    answer = stage.predict or stage.common
    assert answer is not None
    best = answer(view).exp().max(dim=-1)
    shares = [(None, None)] * len(texts) if stage.weights is None else stage.weights(view).tolist()
    return [
        Prediction(text, dataset.class_names[int(label)], float(p), w_g, w_l)
        for text, label, p, (w_g, w_l) in zip(texts, best.indices, best.values, shares, strict=True)
    ]
