"""fedms on Flower: the apps for real sites, and Flower's simulation of the same.

The round loop is the one of :mod:`fedms.fl.round`. The ServerApp runs it with an engine that
reaches the clients through Flower's Grid, the ClientApp hands what arrives to a
:class:`fedms.fl.runs.site.Site`.
"""

# Flower is an extra:
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from fedms.fl.algorithms import stages_of
from fedms.fl.config import Config, load_config
from fedms.fl.engines.answers import EVALUATE, HELLO, IMPORTANCE, TRAIN, VALIDATE, say_why_not
from fedms.fl.engines.engine import Engine
from fedms.fl.engines.flower import RECORD, FlowerEngine, Sites
from fedms.fl.engines.world import World, load_federation, server_federation, site_federation
from fedms.fl.journal.files import replace_file
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.runs.folder import from_anywhere, resume, start
from fedms.fl.runs.origin import changed_settings, config_of, frozen_weights, model_digest
from fedms.fl.runs.site import Site
from fedms.fl.types import ConfigError, FedMSError

Find = Callable[[Context], tuple[Site, str]]
"""A node's site and its client."""


# A site -------------------------------------------------------------------------------------------


def client_app(config: Path) -> ClientApp:
    """The app of a site, for the settings in a file.

    Its SuperNode's ``--node-config`` has ``client-id``, ``data``, ``folder``, and where they are
    wanted ``model`` and ``unseen``.
    """

    def find(context: Context) -> tuple[Site, str]:
        return _site(str(config), Node.of(context.node_config))

    return _answering(find, load_config(config).engine.deadline)


@dataclass(frozen=True)
class Node:
    """A SuperNode's ``--node-config``."""

    client_id: str
    data: str
    folder: str
    model: str = ""
    unseen: bool = False

    @classmethod
    def of(cls, config: Any) -> Node:
        """ConfigError names what is missing, unknown or of another type."""
        found = {key.replace("-", "_"): value for key, value in config.items()}
        for name, kind in cls.__annotations__.items():
            if name not in found and name in ("client_id", "data", "folder"):
                raise ConfigError(f"--node-config lacks {name.replace('_', '-')}")
            if name in found and type(found[name]).__name__ != kind:
                raise ConfigError(
                    f"--node-config: {name.replace('_', '-')} must be of type {kind}, "
                    f"got {found[name]!r}"
                )
        unknown = sorted(set(found) - set(cls.__annotations__))
        if unknown:
            raise ConfigError(f"--node-config: unknown {', '.join(unknown)}")
        return cls(**found)


@cache
def _site(config_file: str, node: Node) -> tuple[Site, str]:
    config = load_config(Path(config_file))
    if node.model:
        config = config.replace(model=config.model.replace(path=node.model))
    federation = site_federation(config, node.client_id, node.data, node.unseen)
    world = World(config, Progress(quiet=True), federation)
    world.model.frequencies = None  # of everyone's labels, which a site does not know
    return Site(config, world, Path(node.folder).absolute(), alone=True), node.client_id


def _answering(find: Find, deadline: float = 0.0) -> ClientApp:
    """The app that answers whatever it is asked.

    Args:
        deadline: seconds after which nobody waits for an answer any more. The process ends then:
            its SuperNode is free for the next round.
    """
    app = ClientApp()

    def answers(what: str) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            with _no_longer_than(deadline):
                try:
                    site, client_id = find(context)
                    content = message.content.config_records[RECORD]
                    said = site.answer(what, client_id, content)
                except Exception as error:
                    traceback.print_exc()
                    said = say_why_not(error)
            return Message(RecordDict({RECORD: ConfigRecord({"answer": said})}), reply_to=message)

        return answer

    for what in (HELLO, TRAIN, VALIDATE, EVALUATE, IMPORTANCE):
        category, _, action = what.partition(".")
        getattr(app, category)(*([action] if action else []))(answers(what))
    return app


class _no_longer_than:
    """Ends the process, whatever it does, if the block takes longer; 0 lets it."""

    def __init__(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, lambda: os._exit(1)) if seconds else None

    def __enter__(self) -> None:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


# The server ---------------------------------------------------------------------------------------


def server_app(config: Path) -> ServerApp:
    """The app of the server, for the settings in a file.

    The run config has ``out``, the run's folder, and ``wait``, seconds in which the sites must have
    come. A folder that holds this run is gone on with.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        out, wait = str(context.run_config["out"]), float(context.run_config["wait"])
        with Progress() as progress:
            try:
                serve(load_config(config), Path(out).absolute(), grid, wait, progress)
            except FedMSError as error:
                progress.warn(str(error))
                raise

    return app


@dataclass(frozen=True)
class Members:
    """Who takes part, decided when a run begins; ``run`` names it on the sites' disks."""

    run: str
    clients: tuple[str, ...]
    unseen: tuple[str, ...]


def serve(config: Config, out: Path, grid: Grid, wait: float, progress: Progress) -> None:
    """Begin a run in ``out``, or go on with it, with the sites that a grid reaches.

    Args:
        wait: seconds in which ``data.num_clients`` sites and ``data.unseen_clients`` others come.
            A run that goes on waits as long for those that it has, and then for nobody.

    Raises:
        ConfigError: the method or a rival needs what real sites do not tell.
    """
    _refuse_what_needs_everyone(config)
    sites = Sites(grid, config.engine.deadline, progress)
    config, known = from_anywhere(config), out / "sites.json"
    if known.is_file():
        record = json.loads(known.read_bytes())
        members = Members(record["run"], tuple(record["clients"]), tuple(record["unseen"]))
        sites.wait_for((*members.clients, *members.unseen), wait)
    else:
        members = _gather(config, sites, wait, progress)
    progress.say(f"{out}: {', '.join(members.clients)}; unseen: {', '.join(members.unseen) or '-'}")

    def engine(config: Config, world: World, _: ClientStates, progress: Progress) -> Engine:
        if not known.is_file():
            replace_file(known, json.dumps(asdict(members)).encode())
        digest = model_digest(frozen_weights(world.model.backbone.model))
        name, count = members.run, len(members.clients)
        return FlowerEngine(config, world.model, sites, name, digest, False, count, progress)

    federation = server_federation(config, members.clients, members.unseen)
    if not (out / "config.toml").is_file():
        start(config, out, progress, federation, engine)
        return
    if differ := changed_settings(config_of(out), config):
        raise FedMSError(
            f"{out} was started with other settings:\n  " + "\n  ".join(differ)
            + "\nBring back what it was started with, or name another out"
        )  # fmt: skip
    resume(out, progress, federation, engine)


def _refuse_what_needs_everyone(config: Config) -> None:
    methods = (config.method, *config.rivals)
    if config.prior or config.eval.priors or "fedavg_prior" in methods:
        raise ConfigError(
            "prior, eval.priors and fedavg_prior read everyone's label frequencies, which real "
            "sites do not tell; they can be simulated"
        )
    _refuse_what_is_pooled(config)


def _refuse_what_is_pooled(config: Config) -> None:
    for method in (config.method, *config.rivals):
        if any(stage.pooled for stage in stages_of(config, method)):
            raise ConfigError(
                f"{method} trains on all clients' examples in one place, and Flower's clients keep "
                'theirs: leave it out, or run it with engine.kind = "local"'
            )


def _gather(config: Config, sites: Sites, wait: float, progress: Progress) -> Members:
    until, wanted = time.monotonic() + wait, (config.data.num_clients, config.data.unseen_clients)
    while True:
        sites.find()
        unseen = sorted(c for c, who in sites.introduced.items() if who.unseen)
        clients = sorted(set(sites.introduced) - set(unseen))
        if (len(clients), len(unseen)) >= wanted and len(unseen) >= wanted[1]:
            return Members(secrets.token_hex(8), tuple(clients), tuple(unseen))
        if time.monotonic() > until:
            raise FedMSError(
                f"{len(clients)} sites and {len(unseen)} unseen ones have come within {wait:g} s, "
                f"data.num_clients = {wanted[0]} and data.unseen_clients = {wanted[1]} are wanted: "
                f"{', '.join(sites.introduced) or 'nobody'}"
            )
        time.sleep(1.0)


# A simulation -------------------------------------------------------------------------------------


def simulate(
    config: Config, folder: Path, progress: Progress, carry_on: Callable[..., None]
) -> None:
    """Carry a run out in Flower's simulation: a worker a core, messages by Ray.

    Args:
        folder: of the run; the clients write there, too.
        carry_on: starts or resumes it, given ``source`` and ``engine``.

    Raises:
        ConfigError: a method trains on all clients' examples in one place.
    """
    _refuse_what_is_pooled(config)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # of rounds our own progress tells
    with progress.phase("clients"):
        federation = load_federation(config)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, _: Context) -> None:
        sites = Sites(grid, config.engine.deadline, progress)

        def engine(config: Config, world: World, _: ClientStates, progress: Progress) -> Engine:
            count = len(world.federation.clients)
            return FlowerEngine(config, world.model, sites, "", "", True, count, progress)

        carry_on(source=federation, engine=engine)

    on_gpu = config.model.device != "cpu" and torch.cuda.is_available()
    run_simulation(
        app,
        _answering(_Simulated(str(folder.absolute()))),
        num_supernodes=len(federation.everyone),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": float(on_gpu)}},
    )


@dataclass(frozen=True)
class _Simulated:
    """Finds the client of a node of the simulation, in whatever process it is asked."""

    folder: str

    def __call__(self, context: Context) -> tuple[Site, str]:
        site, clients = _simulated(self.folder)
        return site, clients[int(context.node_config["partition-id"])]


@cache
def _simulated(folder: str) -> tuple[Site, tuple[str, ...]]:
    config = load_config(Path(folder) / "config.toml")
    world = World(config, Progress(quiet=True))
    return Site(config, world, Path(folder), alone=False), tuple(world.federation.everyone)
