"""A run and its folder: the method, then its rivals on the same clients, each in its own folder.

DIR/config.toml           the resolved configuration
DIR/origin.json           digests of what it was started with
DIR/label_counts.json     classes, clients, which of these are unseen, and each client's number of
                          training examples per class
DIR/metrics.jsonl         one RoundRecord a round
DIR/clients.jsonl         one line per client per evaluation
DIR/checkpoints/          see fedms.fl.journal.checkpoint
DIR/clients/              see fedms.fl.journal.states
DIR/adapters/             the server's experts in peft's format; DIR/gate.safetensors
DIR/adapters/clients/<id>/   a client's own, written by `fedms export`
DIR/rivals/<method>/      the same for each rival
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedms.fl.channel.channel import Channel
from fedms.fl.config import Config, to_toml
from fedms.fl.data.federation import Federation
from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.world import World
from fedms.fl.fetch import RECIPES
from fedms.fl.journal.files import locked, replace_file
from fedms.fl.journal.progress import Progress
from fedms.fl.round import Run
from fedms.fl.runs.export import export_common
from fedms.fl.runs.method import MakeEngine, run_method
from fedms.fl.runs.origin import Origin, config_of, frozen_weights
from fedms.fl.types import FedMSError, select


def start(
    config: Config,
    folder: Path,
    progress: Progress,
    source: Any = None,
    engine: MakeEngine = LocalEngine,
) -> None:
    """Begin a run in a new folder and carry it to its end.

    Args:
        source: a ``datasets.Dataset`` in place of what ``data.source`` names, or the clients.
        engine: where clients run.

    Raises:
        FedMSError: the folder holds something already, or cannot be written.
    """
    _refuse_what_is_there(folder)
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, progress.warn):
        _refuse_what_is_there(folder)  # another process may have begun in it
        _carry_on(from_anywhere(config), folder, progress, source, engine)


def resume(
    folder: Path, progress: Progress, source: Any = None, engine: MakeEngine = LocalEngine
) -> None:
    """Carry a run on from its newest whole checkpoints to its end; a finished run stays as it is.

    Args:
        source, engine: as it was started with.

    Raises:
        FedMSError: the folder holds no run, another process works on it, or the data, the model or
            the settings are not those that it was started with.
    """
    config = config_of(folder)
    with locked(folder, progress.warn):
        _carry_on(config, folder, progress, source, engine)


def _refuse_what_is_there(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FedMSError(
            f"{folder} exists; go on with it by `fedms resume {folder}`, "
            "or name another folder with --out"
        )


def from_anywhere(config: Config) -> Config:
    """The configuration with its files named so that a resume finds them from any folder."""
    names = {"icd10", "minilm", *RECIPES}

    def absolute(path: str) -> str:
        return path if path in names or not Path(path).exists() else str(Path(path).absolute())

    return config.replace(
        data=config.data.replace(source=absolute(config.data.source)),
        model=config.model.replace(path=absolute(config.model.path)),
        task=config.task.replace(text_model=absolute(config.task.text_model)),
    )


def _carry_on(
    config: Config, folder: Path, progress: Progress, source: Any, engine: MakeEngine
) -> None:
    """Do what is left.

    Nothing is written before data and model are there: after a mistake in them the folder is
    still free for a second try.
    """
    methods = {folder: config}
    for rival in config.rivals:
        if rival != config.method:
            methods[folder / "rivals" / rival] = config.replace(method=rival, rivals=())
    left = {
        place: settings for place, settings in methods.items() if not (place / "finished").exists()
    }
    if not left:
        return
    with _disk_errors(folder):
        world = World(config, progress, source)
        for settings in left.values():  # a rival's mistake should not wait for the others' end
            Channel.of(settings, len(world.federation.clients))
        began = Origin.of(world.federation, frozen_weights(world.model.backbone.model))
        for place, settings in left.items():
            _prepare(settings, place)
            began.check(settings, place)
            _write_label_counts(world.federation, place / "label_counts.json")
            _export(run_method(settings, world, place, progress, engine), world, place)
            replace_file(place / "finished", b"")


def _export(run: Run, world: World, folder: Path) -> None:
    """Write what everybody shares; clients' own parts wait until they are asked for."""
    slots, state = world.model.slots, dict(run.server.state)
    slots.set_awake(run.awake)
    for expert in {name for stage in run.stages for name in stage.experts}:
        if select(state, (f"{expert}.*",)):  # what nobody trains belongs to an adapter, too
            state = {**slots.fresh(expert), **state}
    export_common(slots, state, folder, run.config.model.path)


def _prepare(config: Config, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.toml").exists():
        replace_file(folder / "config.toml", to_toml(config).encode())


def _write_label_counts(federation: Federation, path: Path) -> None:
    classes = federation.dataset.class_names
    clients = (*federation.clients, *federation.unseen)
    own = [
        federation.dataset.labels[np.concatenate([client.train, client.gate])] for client in clients
    ]
    record = {
        "class_names": list(classes),
        "clients": [client.client_id for client in clients],
        "unseen": [client.client_id for client in federation.unseen],
        "counts": [np.bincount(labels, minlength=len(classes)).tolist() for labels in own],
    }
    replace_file(path, json.dumps(record).encode())


class _disk_errors:
    """Turns what the disk refuses into one sentence with the folder's name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            raise FedMSError(
                f"the run's folder {self._folder} cannot be written: {error.strerror}"
            ) from error
