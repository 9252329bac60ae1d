"""What a run writes down: one RoundRecord a round, one ClientScore per client and evaluation."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field

from fedms.fl.types import Failure


@dataclass(frozen=True)
class Spread:
    """A score over ``clients``, their number: mean, deviation, mean of the worst tenth, minimum."""

    mean: float
    std: float
    worst10: float
    min: float
    clients: int


@dataclass(frozen=True)
class ClientScore:
    """A client's scores, accuracies in [0, 1].

    ``pooled_accuracy`` is None where nobody has everyone's examples. ``gate_local`` is the mean
    weight of the local expert or None. ``by_prior`` has ``accuracy`` and ``pooled_accuracy`` at
    each of ``eval.priors``, by that number as text.
    """

    client_id: str
    seen: bool
    num_test: int
    accuracy: float
    pooled_accuracy: float | None
    gate_local: float | None
    by_prior: dict[str, tuple[float, float]] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class ClientRecord(ClientScore):
    """One line of ``clients.jsonl``: a client's scores after a round."""

    round: int
    stage: str


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
    epsilon: float | None = None
    """Spent of the privacy budget so far; None: no privacy, or no noise."""
    unscored: list[Failure] = field(default_factory=list)
    """Who should have been scored, or have said how good the common model is, and could not."""


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in units of 2**20 bytes."""
    return mebibytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.platform)


def mebibytes(max_rss: int, platform: str) -> float:
    """``ru_maxrss`` in units of 2**20 bytes: macOS counts bytes in it, Linux 1024 of them."""
    return max_rss / (2**20 if platform == "darwin" else 2**10)
