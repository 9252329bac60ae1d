"""Values that pass between the parts of the federated loop. Imports nothing else of fedms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

State = dict[str, torch.Tensor]
"""Parameters by name: what is trained, sent and averaged.

For example ``global.layer.5.attention.self.query.lora_A``.
"""


class FedMSError(Exception):
    """A mistake that the user can mend: the message says what was expected and what came."""


class ConfigError(FedMSError):
    """A setting that does not exist, has the wrong type, or contradicts another one."""


class DataError(FedMSError):
    """Data that cannot be used as asked: a missing column, an unknown label, an empty client."""


class CheckpointError(FedMSError):
    """No checkpoint of a run can be read, or it cannot be written."""


class QuorumError(FedMSError):
    """Too few clients of a cohort came back for the round to count."""


class ClientFailure(Exception):
    """One client's visit failed; the round goes on without it. The message is the reason."""


@dataclass(frozen=True)
class TextDataset:
    """Labelled texts, in one order that every index below refers to.

    Attributes:
        texts: N texts.
        labels: int64 [N], indices into ``class_names``.
        class_names: C names in words; the zero-shot head encodes them.
        groups: int64 [N] or None. Examples of one group never stand on both sides of a split.
        clients: N client names, or None where the data has no natural clients.
        splits: N of "train" / "test", or None where the data does not say.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    clients: tuple[str, ...] | None = None
    splits: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class ClientData:
    """One client's examples: int64 indices into the dataset, disjoint and sorted.

    ``gate`` is kept out of both experts' training; ``val`` scores the global expert for SAL.
    """

    client_id: str
    train: np.ndarray
    gate: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Federation:
    """A dataset shared out to clients. ``unseen`` clients take part in no round."""

    dataset: TextDataset
    clients: tuple[ClientData, ...]
    unseen: tuple[ClientData, ...] = ()

    def client(self, client_id: str) -> ClientData:
        """The client of that name; KeyError where there is none."""
        for client in (*self.clients, *self.unseen):
            if client.client_id == client_id:
                return client
        raise KeyError(client_id)


@dataclass(frozen=True)
class Failure:
    """A client that was dropped from a round, and why."""

    client_id: str
    reason: str


@dataclass(frozen=True)
class Update:
    """A client's visit: what it sends (``shared``) and what stays with the client (``kept``)."""

    client_id: str
    num_examples: int
    shared: State
    kept: State
    train_loss: float
    steps: int


@dataclass(frozen=True)
class Spread:
    """A score over clients: mean, standard deviation, mean of the worst tenth, minimum."""

    mean: float
    std: float
    worst10: float
    min: float


@dataclass(frozen=True)
class RoundRecord:
    """One line of ``metrics.jsonl``.

    Accuracies are shares in [0, 1], sizes are bytes; None: not measured.
    """

    round: int
    stage: str
    seconds: float
    participants: list[str]
    failed: list[Failure]
    awake_blocks: list[int]
    trainable_parameters: int
    trainable_share: float
    bytes_up: int
    bytes_down: int
    train_loss: float | None
    global_accuracy: float | None
    personalized_accuracy: Spread | None
    pooled_accuracy: Spread | None
    unseen_accuracy: Spread | None
    gate_local_mean: float | None
    peak_memory_mb: float
