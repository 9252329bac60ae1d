"""A run's folder, opened to ask it something: its model as it was after the last finished round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from fedms.fl.algorithms import Stage, stages_of
from fedms.fl.channel.link import Link, split_late
from fedms.fl.client import received
from fedms.fl.config import Config
from fedms.fl.data.federation import Dataset, Federation
from fedms.fl.data.images import Images
from fedms.fl.data.table import is_unicode
from fedms.fl.engines.texts import windows_of
from fedms.fl.engines.world import load_model
from fedms.fl.journal.checkpoint import load_checkpoint
from fedms.fl.journal.files import read_record
from fedms.fl.journal.journal import last_counted
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.model.model import Model
from fedms.fl.runs.origin import check_model, config_of, frozen_weights
from fedms.fl.sal import Activation
from fedms.fl.server import Server
from fedms.fl.types import FedMSError, State


@dataclass(frozen=True)
class Opened:
    """A run between its rounds.

    Attributes:
        stage: the stage of the last finished round.
        model: at its awake blocks, with the stage's small networks, on the given examples.
        dataset: the examples, with the task's class names.
        counts: by client id, its training examples by class.
        took_part: the clients that are not unseen.
    """

    config: Config
    stage: Stage
    model: Model
    dataset: Dataset
    counts: dict[str, list[int]]
    took_part: tuple[str, ...]
    _received: Callable[[str], State]
    _states: ClientStates
    _counted: dict[str, int]

    def client(self, client_id: str) -> State:
        """Everything that a client's model is made of, also where it was never visited.

        Raises:
            CheckpointError: its file is damaged.
        """
        kept, _ = split_late(self._states.read(client_id, self._counted.get(client_id, 0)) or {})
        return self.stage.start(self._received(client_id), kept)


def open_run(
    folder: Path, clients: Sequence[str], progress: Progress, examples: Sequence[str] = ()
) -> Opened:
    """Open a run for some of its clients, on ``examples``: texts, or files of images.

    Raises:
        FedMSError: no such run or client, no round of it has ended, its model is another one, or an
            example is no text.
    """
    config = config_of(folder)
    states = ClientStates(folder / "clients")
    checkpoint = load_checkpoint(folder / "checkpoints", states, progress.warn)
    if checkpoint is None:
        raise FedMSError(f"no round of {folder} has ended yet; there is nothing to ask")
    record = read_record(folder / "label_counts.json", "class_names", "clients", "unseen", "counts")
    counts = dict(zip(record["clients"], record["counts"], strict=True))
    for client_id in clients:
        if client_id not in counts:
            known = ", ".join(record["clients"][:8])
            raise FedMSError(f"{folder} has no client {client_id!r}; its clients are {known} ...")
    dataset = _dataset(config, examples, tuple(record["class_names"]))
    model = load_model(config, Federation(dataset, ()))
    check_model(folder, frozen_weights(model.backbone.model), config.model.path)
    activation = Activation(config.sal, checkpoint.sal["order"])
    activation.restore(checkpoint.sal)
    stage = _stage_of(config, checkpoint.round)
    server, link = Server(model), Link(config.channel)
    server.state = checkpoint.server

    @cache
    def at(group: str) -> State:
        sent, frozen = (
            link.as_received(checkpoint.round, state)
            for state in server.sends(stage, activation.awake, group)
        )
        return received(model, stage, {**frozen, **sent})

    took_part = tuple(client_id for client_id in counts if client_id not in record["unseen"])
    return Opened(
        config,
        stage,
        model,
        dataset,
        counts,
        took_part,
        lambda client_id: at(server.group(stage, client_id)),
        states,
        last_counted(folder, checkpoint.round),
    )


def _dataset(config: Config, examples: Sequence[str], class_names: tuple[str, ...]) -> Dataset:
    if config.task.kind == "images":
        labels = np.zeros(len(examples), dtype=np.int64)
        images = Images(lambda i: Path(examples[i]), lambda i: examples[i], len(examples))
        return Dataset(images, labels, class_names)
    for text in examples:
        if not is_unicode(text):
            raise FedMSError(f"a text must be UTF-8, got other bytes: {text[:40]!r}")
    texts = tuple(examples) or ("no example is asked for",)  # tokenizers take no empty list
    dataset = Dataset(texts, np.zeros(len(texts), dtype=np.int64), class_names)
    return windows_of(config, dataset) if config.task.kind == "causal_lm" else dataset


def _stage_of(config: Config, round: int) -> Stage:
    """The stage whose rounds hold this one."""
    stages, ended = stages_of(config), 0
    for stage in stages:
        ended += stage.settings.rounds
        if round <= ended:
            return stage
    return stages[-1]
