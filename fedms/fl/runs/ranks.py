"""A run under torchrun: rank 0 carries it out, the others work for it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fedms.fl.config import Config
from fedms.fl.engines.engine import Engine
from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.torchrun import Ranks, TorchrunEngine, obey, serve, started_by_torchrun
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.runs.method import MakeEngine
from fedms.fl.runs.origin import Origin, frozen_weights
from fedms.fl.types import FedMSError


def on_all_ranks(config: Config, carry_out: Callable[[MakeEngine], None]) -> bool:
    """Call ``carry_out`` with an engine that spans all ranks, on rank 0; on the others work for it.

    Args:
        config: of the run, the same on every rank.
        carry_out: is given what makes engines; alone that is the local one.

    Returns:
        whether this process carried the run out.
    """
    if not started_by_torchrun():
        carry_out(LocalEngine)
        return True
    ranks = Ranks()
    if ranks.rank:
        serve(ranks, _Worker(config))
        return False
    signal.signal(signal.SIGTERM, _stopped)
    try:
        carry_out(_Maker(ranks))
    finally:
        ranks.end()
    return True


def _stopped(*_: object) -> None:
    raise FedMSError(
        "torchrun stops all ranks, one of them has ended; what is done is kept, and `fedms resume` "
        "goes on from the last finished round under any number of ranks"
    )


class _Maker:
    """Makes rank 0's engine of a method, and tells the others to make theirs."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __call__(
        self, config: Config, world: World, states: ClientStates, progress: Progress
    ) -> Engine:
        message = {"method": config.method, "states": str(states.folder.absolute())}
        self._ranks.ask("method", [json.dumps(message).encode()] * (self._ranks.size - 1))
        origin = _origin(world)
        for rank, content in enumerate(self._ranks.answers(), start=1):
            if content != origin:
                raise FedMSError(f"rank {rank} has other data or another model than rank 0")
        local = LocalEngine(config, world, states, progress)
        return TorchrunEngine(config, local, self._ranks, progress.advance)


class _Worker:
    """What another rank does when it is asked. What was wrong from the start it says then."""

    def __init__(self, config: Config) -> None:
        self._config, self._progress = config, Progress(quiet=True)
        self._engine: LocalEngine | None = None
        self._wrong: Exception | None = None
        try:
            self._world = World(config, self._progress)
        except Exception as error:
            self._wrong = error

    def __call__(self, kind: str, content: bytes) -> bytes:
        if self._wrong is not None:
            raise self._wrong
        if kind == "method":
            message = json.loads(content)
            config = self._config.replace(method=message["method"], rivals=())
            states = ClientStates(Path(message["states"]))
            self._engine = LocalEngine(config, self._world, states, self._progress)
            return _origin(self._world)
        assert self._engine is not None, "rank 0 names the method first"
        return obey(self._engine, kind, content)


def _origin(world: World) -> bytes:
    origin = Origin.of(world.federation, frozen_weights(world.model.backbone.model))
    return json.dumps(asdict(origin)).encode()
