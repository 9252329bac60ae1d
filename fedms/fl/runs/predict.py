"""What a client of a finished run says about texts: its class, and how much each expert weighed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedms.fl.algorithms import stages_of
from fedms.fl.client import initial_kept
from fedms.fl.config import load_config
from fedms.fl.data.federation import Dataset
from fedms.fl.model.backbone import load_foundation
from fedms.fl.model.gate import log_prior_of_counts
from fedms.fl.model.resident import Resident
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

    config = config.replace(engine=config.engine.replace(prefix_cache_mb=0, cache_global=False))
    dataset = Dataset(
        tuple(texts), np.zeros(len(texts), dtype=np.int64), tuple(record["class_names"])
    )
    foundation = load_foundation(config.model, config.lora)
    check_model(folder, frozen_weights(foundation.model), config.model.path)
    resident = Resident(foundation, dataset, config)
    activation = Activation(config.sal, checkpoint.sal["order"])
    activation.restore(checkpoint.sal)
    resident.foundation.set_awake(activation.awake)
    stages, ended = stages_of(config), 0
    stage = stages[-1]
    for stage in stages:
        ended += stage.settings.rounds
        if checkpoint.round <= ended:
            break
    resident.load(
        {
            **checkpoint.server,
            **initial_kept(resident, stage, checkpoint.server),
            **checkpoint.kept.get(client_id, {}),
        }
    )

    indices = np.arange(len(texts))
    if stage.predicts == "mixture":
        log_p, weights = resident.mixture(indices, log_prior_of_counts(counts))
        shares = weights.tolist()
    else:
        path = () if stage.predicts == "base" else (stage.predicts,)
        log_p, shares = (
            resident.log_probs(resident.features(indices, path)),
            [(None, None)] * len(texts),
        )
    best = log_p.exp().max(dim=-1)
    return [
        Prediction(text, dataset.class_names[int(label)], float(p), w_g, w_l)
        for text, label, p, (w_g, w_l) in zip(texts, best.indices, best.values, shares, strict=True)
    ]
