"""What the federation's data are: examples with labels, and which client owns which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Dataset:
    """Labelled examples, in one order that every index elsewhere refers to.

    Attributes:
        inputs: N examples as the task reads them: texts, images, windows of tokens.
        labels: int64 [N], indices into ``class_names``. The partitioners share out by them; a task
            without classes has one class.
        class_names: C names in words.
        groups: int64 [N] or None. Examples of one group never stand on both sides of a split.
        clients: N client names, or None where the data has no natural clients.
        splits: N of "train" / "test", or None where the data does not say.
        class_labels: the C classes as the data writes them, or None where they are ``class_names``.
    """

    inputs: Sequence[Any]
    labels: np.ndarray
    class_names: tuple[str, ...]
    groups: np.ndarray | None = None
    clients: tuple[str, ...] | None = None
    splits: tuple[str, ...] | None = None
    class_labels: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.inputs)


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

    @property
    def own(self) -> np.ndarray:
        """The examples that it may train on: ``train`` and ``gate``, sorted."""
        return np.union1d(self.train, self.gate)


EVERYONE = " everyone"
"""The client that stands for all of them together. Names in data have no blanks around them."""


@dataclass(frozen=True)
class Federation:
    """A dataset shared out to clients. ``unseen`` clients take part in no round."""

    dataset: Dataset
    clients: tuple[ClientData, ...]
    unseen: tuple[ClientData, ...] = ()

    @cached_property
    def everyone(self) -> dict[str, ClientData]:
        """All clients by id: those that take part, then the unseen ones."""
        return {client.client_id: client for client in (*self.clients, *self.unseen)}

    def client(self, client_id: str) -> ClientData:
        """The client of that name; KeyError where there is none. ``EVERYONE``: see ``pooled``."""
        return self.pooled if client_id == EVERYONE else self.everyone[client_id]

    @cached_property
    def pooled(self) -> ClientData:
        """All that the clients have that take part, as if one client had it."""
        parts = (
            np.sort(np.concatenate([getattr(client, part) for client in self.clients]))
            for part in ("train", "gate", "val", "test")
        )
        return ClientData(EVERYONE, *parts)
