"""Values that pass between the rooms of the federated part. Imports nothing else of fedms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch

State = dict[str, torch.Tensor]
"""Parameters by name: what is trained, sent, kept and averaged.

For example ``global.layer.5.attention.self.query.lora_A`` [r, K], ``global.head.weight`` [C, D],
``gate.adapter.0.weight``. Stacked over S clients the names stay and every shape begins with S.
"""

Patterns = tuple[str, ...]
"""Names as shell patterns: ``("global.*", "gate.adapter.*")``, ``("global.*.lora_A",)``."""

T = TypeVar("T")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def select(state: dict[str, T], patterns: Iterable[str]) -> dict[str, T]:
    """The entries whose names fit one of the patterns, in the order of ``state``."""
    patterns = tuple(patterns)
    return {name: value for name, value in state.items() if matches(name, patterns)}


def renamed(state: dict[str, T], old: str, new: str) -> dict[str, T]:
    """The entries whose names begin with ``old``, with ``new`` in its place."""
    return {
        new + name.removeprefix(old): value for name, value in state.items() if name.startswith(old)
    }


Advance = Callable[[int], object]
"""Hears how many more units of work are done."""


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
