"""What all methods of a run share: the clients, the model, and first stages that are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedms.fl.config import Config
from fedms.fl.data.dataset import in_order, load_dataset
from fedms.fl.data.duplicates import repeated_examples
from fedms.fl.data.federation import ClientData, Dataset, Federation
from fedms.fl.data.images import Images
from fedms.fl.data.partition import Fractions, make_federation
from fedms.fl.engines.texts import causal_lm_task, text_task, windows_of
from fedms.fl.engines.vision import image_task
from fedms.fl.journal.journal import Outcome
from fedms.fl.journal.progress import Progress
from fedms.fl.model.gate import mean_frequencies
from fedms.fl.model.model import Model
from fedms.fl.model.prefix import Outputs, Prefix
from fedms.fl.model.slots import Slots
from fedms.fl.types import DataError


class World:
    """What all methods of a run share: clients, model, what is kept of it, equal first stages.

    Args:
        source: of the data, in place of what ``data.source`` names; or the clients themselves.

    Attributes:
        outcomes: of first stages, by all that decides them.
    """

    def __init__(self, config: Config, progress: Progress, source: Any = None) -> None:
        self.outcomes: dict[object, Outcome] = {}
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        with progress.phase("data"):
            given = isinstance(source, Federation)
            self.federation = source if given else load_federation(config, source)
            if note := repeated_examples(self.federation.dataset):
                progress.say(note)
        with progress.phase("model"):
            self.model = load_model(config, self.federation)


def load_federation(config: Config, source: Any = None) -> Federation:
    """The clients of a configuration.

    Args:
        source: in place of ``data.source``, e.g. a ``datasets.Dataset``.
    """
    data = config.data
    federation = make_federation(
        read_dataset(config, source),
        partitioner=data.partitioner,
        num_clients=data.num_clients,
        alpha=data.alpha,
        classes_per_client=data.classes_per_client,
        min_partition_size=data.min_partition_size,
        unseen_clients=data.unseen_clients,
        fractions=_fractions(config),
        seed=config.seed,
    )
    return federation if config.eval.split == "test" else _scored_on_validation(federation)


def site_federation(config: Config, client_id: str, source: str, unseen: bool) -> Federation:
    """One client alone, with its own data; split as it would be as a client of a column."""
    data = config.data.replace(client_column=None)
    dataset = read_dataset(config.replace(data=data), source, every_class=True)
    alone = make_federation(
        replace(dataset, clients=(client_id,) * len(dataset)),
        partitioner="column",
        fractions=_fractions(config),
        seed=config.seed,
    )
    if config.eval.split != "test":
        alone = _scored_on_validation(alone)
    return Federation(alone.dataset, (), alone.clients) if unseen else alone


def server_federation(config: Config, clients: Sequence[str], unseen: Sequence[str]) -> Federation:
    """Clients by name, whose data are elsewhere; to load a model some text must be there."""
    names, nothing = config.data.class_names, np.zeros(0, dtype=np.int64)
    classes = tuple(names[label] for label in in_order(names)) or ("all",)
    if config.task.kind == "images":
        dataset = Dataset(Images(str, str, 0), nothing, classes)
    else:
        dataset = Dataset(("nobody's text",), np.zeros(1, dtype=np.int64), classes)
    if config.task.kind == "causal_lm":
        dataset = windows_of(config, dataset)
    by_name = [ClientData(name, *([nothing] * 4)) for name in (*clients, *unseen)]
    return Federation(dataset, tuple(by_name[: len(clients)]), tuple(by_name[len(clients) :]))


def read_dataset(config: Config, source: Any = None, every_class: bool = False) -> Dataset:
    """The examples of a configuration, for its task.

    Args:
        source: in place of ``data.source``.
        every_class: of :func:`fedms.fl.data.dataset.load_dataset`.
    """
    data, kind = config.data, config.task.kind
    dataset = load_dataset(
        data.source if source is None else source,
        text_column=data.text_column,
        image_column=data.image_column if kind == "images" else None,
        label_column=None if kind == "causal_lm" else data.label_column,
        client_column=data.client_column,
        split_column=data.split_column,
        group_column=data.group_column,
        class_names=data.class_names or None,
        every_class=every_class,
        max_per_category=data.max_per_category,
        seed=config.seed,
    )
    return windows_of(config, dataset) if kind == "causal_lm" else dataset


def _fractions(config: Config) -> Fractions:
    data = config.data
    return Fractions(train=data.train, gate=data.gate, val=data.val, test=data.test)


def _scored_on_validation(federation: Federation) -> Federation:
    """The same clients without their test examples, so that no setting is chosen on them.

    Raises:
        DataError: a client has no validation example.
    """
    for client in federation.everyone.values():
        if not len(client.val):
            raise DataError(
                'eval.split = "val" needs a validation example of every client, got none of '
                f"{client.client_id}; data.val must be larger"
            )
    groups = (federation.clients, federation.unseen)
    return Federation(
        federation.dataset,
        *(tuple(replace(client, test=client.val) for client in group) for group in groups),
    )


def load_model(config: Config, federation: Federation) -> Model:
    """The model of a configuration, for the examples of a federation."""
    load = {"text": text_task, "images": image_task, "causal_lm": causal_lm_task}[config.task.kind]
    backbone, task = load(config, federation.dataset)
    task.prepare(lambda batch: backbone.hidden(batch.to(backbone.device)))
    lora = config.lora
    slots = Slots(
        backbone,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        head=task.fresh_head(backbone.width),
    )
    own = [
        np.unique(np.concatenate([client.own, client.val, client.test]))
        for client in federation.everyone.values()
    ]
    prefix = Prefix(backbone, task, own, config.engine.prefix_cache_mb * 2**20)
    outputs = Outputs(config.engine.cache_global, config.engine.prefix_cache_mb * 2**20)
    model = Model(task, backbone, slots, prefix, outputs, config.eval.batch_size)
    head = task.trainable_head(backbone.width)
    model.head = None if head is None else head.to(backbone.device, backbone.master)
    if federation.clients:
        counts = (
            np.bincount(task.targets(client.own), minlength=task.num_classes)
            for client in federation.clients
        )
        model.frequencies = mean_frequencies(counts).to(backbone.device)
    return model
