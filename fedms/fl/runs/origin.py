"""What a run began with: its settings, examples, clients and model.

``DIR/origin.json`` keeps digests of them. A resume goes on with the same or not at all: a table
that got rows in front would be split anew, and what was tested would be trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedms.fl.config import Config, load_config
from fedms.fl.data.federation import Dataset, Federation
from fedms.fl.journal.files import read_record, replace_file
from fedms.fl.settings import Section
from fedms.fl.types import ConfigError, FedMSError

FILE = "origin.json"
FREE = ("rivals", "server.quorum", "engine.")
"""Settings that may change between a run's start and its end: they decide no result."""
MAX_VALUES, MAX_IMAGES = 4096, 256
"""Values of a parameter, and images, that a digest reads: training changes nearly all values of a
model, and all labels are read. All of them would be gigabytes at every start."""


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's own parameters and buffers by name, without the experts on its layers."""
    return {
        name.replace("base_layer.", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def model_digest(weights: Mapping[str, Tensor]) -> str:
    """Of a model's frozen parameters, rounded to bfloat16: the same whatever they are held in."""
    return _digest(
        part
        for name in sorted(weights)
        for part in (
            f"{name} {list(weights[name].shape)}",
            _sample(weights[name]).to("cpu", torch.bfloat16).view(torch.int16).numpy(),
        )
    )


@dataclass(frozen=True)
class Origin:
    """Digests of what all methods of a run share; see :meth:`of`."""

    examples: int
    inputs: str
    labels: str
    clients: str
    model: str

    @staticmethod
    def of(federation: Federation, weights: Mapping[str, Tensor]) -> Origin:
        """Of the examples, their labels, who owns them in which split, and a frozen model."""
        dataset = federation.dataset
        owned = (
            part
            for client in (*federation.clients, *federation.unseen)
            for part in (client.client_id, client.train, client.gate, client.val, client.test)
        )
        return Origin(
            examples=len(dataset),
            inputs=_digest(dataset.inputs[i] for i in range(0, len(dataset), _step(dataset))),
            labels=_digest([*dataset.class_names, dataset.labels]),
            clients=_digest(owned),
            model=model_digest(weights),
        )

    def check(self, config: Config, folder: Path) -> None:
        """Let a method begin in its folder, or go on with what it began with.

        Raises:
            FedMSError: data, model or settings are others; a line for all that differs.
        """
        path, settings = folder / FILE, dict(flat_settings(config))
        if not path.exists():
            if (folder / "metrics.jsonl").exists():
                raise FedMSError(
                    f"{folder} has no {FILE}, which says what it was started with: another version "
                    "of fedms began it. It cannot go on"
                )
            record = {"settings": settings, **asdict(self)}
            replace_file(path, json.dumps(record, indent=1).encode())
            return
        names = [field.name for field in fields(self)]
        record = read_record(path, "settings", *names)
        differ = _changes(record["settings"], settings)
        differ += Origin(**{name: record[name] for name in names})._differences(self, config)
        if differ:
            raise FedMSError(
                f"{folder} was started with something else and does not go on:\n  "
                + "\n  ".join(differ)
                + "\nBring back what it was started with, or begin a new run"
            )

    def _differences(self, now: Origin, config: Config) -> Iterator[str]:
        source = config.data.source
        if self.examples != now.examples:
            yield f"{source} had {self.examples} examples, has {now.examples}"
        elif self.inputs != now.inputs:
            yield f"{source} has other examples, or has them in another order"
        elif self.labels != now.labels:
            yield f"{source} has other labels"
        elif self.clients != now.clients:
            yield "the examples are shared out to clients, or split, in another way"
        if self.model != now.model:
            yield f"the model {config.model.path} has other parameters"


def config_of(folder: Path) -> Config:
    """The settings of a run.

    Raises:
        FedMSError: there is none, or its settings are not ones of this version.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise FedMSError(f"{folder} holds no run: it has no config.toml")
    try:
        return load_config(path)
    except ConfigError as error:
        raise ConfigError(f"{path} is not of this version of fedms: {error}") from error


def check_model(folder: Path, weights: Mapping[str, Tensor], path: str) -> None:
    """Refuse to run a run's experts on another model than the one that they were trained on.

    Raises:
        FedMSError: it is another one.
    """
    if read_record(folder / FILE, "model")["model"] != model_digest(weights):
        raise FedMSError(f"the model in {path} is not the one that {folder} was trained on")


def changed_settings(then: Config, now: Config) -> list[str]:
    """A line for each setting that a run may not change on its way."""
    return _changes(dict(flat_settings(then)), dict(flat_settings(now)))


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {then[key]!r}, is {now[key]!r}"
        for key in then
        if key in now and then[key] != now[key] and not key.startswith(FREE)
    ]


def flat_settings(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name; lists for tuples, as in TOML."""
    for name, value in section:
        if isinstance(value, Section):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def _digest(parts: Iterable[Any]) -> str:
    """Of texts, arrays and what can be made one (images)."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            content = part.encode(errors="surrogatepass")
        else:
            content = np.ascontiguousarray(part).tobytes()
        found.update(len(content).to_bytes(8, "little"))
        found.update(content)
    return found.hexdigest()


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // MAX_VALUES)]


def _step(dataset: Dataset) -> int:
    """1 for texts and tokens, more for images, which are decoded when they are asked for."""
    quick = len(dataset) and isinstance(dataset.inputs[0], str | np.ndarray)
    return 1 if quick else max(1, len(dataset) // MAX_IMAGES)
