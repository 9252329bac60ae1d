"""What all methods of a run share: the clients, the model, and first stages that are equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedms.fl.config import Config
from fedms.fl.data.dataset import load_dataset
from fedms.fl.data.duplicates import repeated_texts
from fedms.fl.data.federation import Federation
from fedms.fl.data.partition import Fractions, make_federation
from fedms.fl.model.backbone import load_foundation
from fedms.fl.model.resident import Resident
from fedms.fl.runs.checkpoint import Checkpoint
from fedms.fl.runs.progress import Progress


@dataclass(frozen=True)
class Outcome:
    """A first stage's end, its checkpoint and lines, for a method that begins with the same."""

    checkpoint: Checkpoint
    lines: dict[str, str]


class World:
    """What all methods of a run share: clients, resident model, cached prefix, equal first stages.

    Attributes:
        outcomes: of first stages, by all that decides them.
    """

    def __init__(self, config: Config, progress: Progress) -> None:
        self.outcomes: dict[object, Outcome] = {}
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        with progress.phase("data"):
            self.federation = load_federation(config)
            if note := repeated_texts(self.federation.dataset):
                progress.say(note)
        with progress.phase("model"):
            self.resident = Resident(
                load_foundation(config.model, config.lora), self.federation.dataset, config
            )


def load_federation(config: Config) -> Federation:
    """The clients of a configuration."""
    data = config.data
    dataset = load_dataset(
        data.source,
        text_column=data.text_column,
        label_column=data.label_column,
        client_column=data.client_column,
        split_column=data.split_column,
        max_per_category=data.max_per_category,
        seed=config.seed,
    )
    return make_federation(
        dataset,
        partitioner=data.partitioner,
        num_clients=data.num_clients,
        alpha=data.alpha,
        classes_per_client=data.classes_per_client,
        min_partition_size=data.min_partition_size,
        unseen_clients=data.unseen_clients,
        fractions=Fractions(train=data.train, gate=data.gate, val=data.val, test=data.test),
        seed=config.seed,
    )
