"""One method of a run in its folder: engine, journal and loop, put together and carried out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedms.fl.algorithms import stages_of
from fedms.fl.channel.channel import Channel
from fedms.fl.config import Config
from fedms.fl.engines.engine import Engine
from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.world import World
from fedms.fl.journal.journal import Journal
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.round import Run, sal_of
from fedms.fl.server import Server

MakeEngine = Callable[[Config, World, ClientStates, Progress], Engine]
"""(settings of one method, world, the clients' own states, who is told) -> where clients run."""


def run_method(
    config: Config,
    world: World,
    folder: Path,
    progress: Progress,
    engine: MakeEngine = LocalEngine,
) -> Run:
    """Carry out what is left of ``config.method`` in a folder that exists.

    A method whose first stage another method of the same world has been through begins at its end.
    """
    engines, first = config.engine, stages_of(config)[0]
    promise = Channel.of(config, len(world.federation.clients)).promise
    same = first, sal_of(config), config.seed, config.server, config.eval, config.channel, promise
    with Journal(folder, engines.keep_checkpoints, progress.warn, engines.tensorboard) as journal:
        if journal.newest is None and same in world.outcomes:
            journal.adopt(world.outcomes[same])
        run = Run(
            config,
            [client.client_id for client in world.federation.clients],
            [client.client_id for client in world.federation.unseen],
            Server(world.model),
            engine(config, world, journal.states, progress),
            journal,
            progress,
        )
        for number in range(len(run.stages)):
            run.run_stage(number)
            if run.done == first.settings.rounds and (outcome := journal.outcome()) is not None:
                world.outcomes[same] = outcome
    return run
