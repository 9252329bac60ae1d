"""A client's end of a federation whose server shares no memory with it: orders in, answers out.

A site proper is alone with its data, its model and its disk: ``<folder>/<run>/`` holds what its
client keeps, digests of what it began with, and after the last round its experts as peft adapters.
In a simulation the clients have one federation and one folder, the run's.
"""

from __future__ import annotations

import hashlib
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedms.fl.algorithms import stages_of
from fedms.fl.channel.link import split_late
from fedms.fl.client import received
from fedms.fl.config import Config
from fedms.fl.engines.answers import (
    EVALUATE,
    HELLO,
    TRAIN,
    VALIDATE,
    Introduction,
    say,
    say_why_not,
)  # fmt: skip
from fedms.fl.engines.engine import Order
from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.world import World
from fedms.fl.evaluate import Scores
from fedms.fl.journal.files import write_synced
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.runs.export import write_client
from fedms.fl.runs.origin import Origin, frozen_weights, model_digest
from fedms.fl.types import ClientFailure, Failure, State
from fedms.fl.wire import unpack


@dataclass(frozen=True)
class Asked:
    """One order and what belongs to it.

    Attributes:
        run: the run's name.
        model: digest of the server's model.
    """

    run: str
    model: str
    order: Order


class Site:
    """Answers orders for clients of one world.

    Args:
        config: of the run.
        world: clients and model.
        folder: where its files go.
        alone: whether it is a site proper, with one client.
    """

    def __init__(self, config: Config, world: World, folder: Path, alone: bool) -> None:
        self._config, self._world, self._folder, self._alone = config, world, folder, alone
        self._progress = Progress(quiet=not alone)  # a site's operator reads its SuperNode's log
        self._engines: dict[Path, tuple[LocalEngine, ClientStates]] = {}

    def answer(self, what: str, client_id: str, content: Mapping[str, Any]) -> bytes:
        """What a client says to a message, whatever happens to it.

        Args:
            what: of :mod:`fedms.fl.engines.answers`.
            content: see :func:`fedms.fl.engines.flower.FlowerEngine`.
        """
        try:
            if what == HELLO:
                unseen = {client.client_id for client in self._world.federation.unseen}
                return say(Introduction(client_id, client_id in unseen))
            asked = _asked(content, self._folder)
            engine, states = self._enter(asked)
            order = asked.order.share([client_id])
            if what == TRAIN:
                return self._train(engine, states, client_id, order)
            if what == EVALUATE:
                return self._evaluate(engine, states, client_id, order, self._place(asked))
            if what == VALIDATE:
                return say(_own(engine.validate(order), client_id))
            if found := engine.importance([client_id]):
                return say(found)
            raise ClientFailure("its examples give no importance of blocks; its log says why")
        except Exception as error:
            traceback.print_exc()
            return say_why_not(error)

    def _train(
        self, engine: LocalEngine, states: ClientStates, client_id: str, order: Order
    ) -> bytes:
        if self._alone:
            # of visits whose answers were lost, and of a server that goes on from an earlier round
            states.forget_after(order.counted.get(client_id, 0))
        self._progress.say(f"round {order.round}: {client_id} trains")
        (found,) = engine.visits(order)
        if isinstance(found, Failure):
            raise ClientFailure(found.reason)
        states.sync()
        if self._alone:
            states.forget_older(client_id, order.round - self._config.engine.keep_checkpoints)
        return found.content

    def _evaluate(
        self, engine: LocalEngine, states: ClientStates, client_id: str, order: Order, place: Path
    ) -> bytes:
        """The scores; a site proper exports its client after the last round."""
        scores = _own(engine.evaluate(order), client_id)
        stages = stages_of(self._method(order.method))
        if self._alone and order.round == sum(stage.settings.rounds for stage in stages):
            stage, model = stages[order.stage], self._world.model
            kept, _ = split_late(states.read(client_id, order.counted.get(client_id, 0)) or {})
            state = stage.start(received(model, stage, engine.received(order)), kept)
            write_client(model, state, stage.experts, place / "adapters", self._config.model.path)
        return say(scores)

    def _enter(self, asked: Asked) -> tuple[LocalEngine, ClientStates]:
        """The engine of an order's method.

        Raises:
            ClientFailure, FedMSError: the site has other data, another model or other settings than
                it began with.
        """
        place = self._place(asked)
        if place not in self._engines:
            config = self._method(asked.order.method)
            if self._alone:
                self._check(config, place, asked.model)
            states = ClientStates(place / "clients")
            engine = LocalEngine(
                config, self._world, states, self._progress, everyone=not self._alone
            )
            self._engines[place] = engine, states
        return self._engines[place]

    def _check(self, config: Config, place: Path, digest: str) -> None:
        weights = frozen_weights(self._world.model.backbone.model)
        if digest != model_digest(weights):
            raise ClientFailure(f"its model {config.model.path} is not the server's")
        place.mkdir(parents=True, exist_ok=True)
        Origin.of(self._world.federation, weights).check(config, place)

    def _method(self, method: str) -> Config:
        own = {} if method == self._config.method else {"method": method, "rivals": ()}
        return self._config.replace(**own)

    def _place(self, asked: Asked) -> Path:
        """Where a method's files are, as in a run's own folder."""
        top = self._folder / asked.run if self._alone else self._folder
        method = asked.order.method
        return top if method == self._config.method else top / "rivals" / method


def _own(scores: Scores, client_id: str) -> Scores:
    """What a client says of itself alone; in a simulation it meets others' examples.

    Raises:
        ClientFailure: it could not be scored.
    """
    for each in scores.failed:
        if each.client_id == client_id:
            raise ClientFailure(each.reason)
    return replace(scores, failed=())


def _asked(content: Mapping[str, Any], folder: Path) -> Asked:
    """What a message asks for; a frozen part that comes with it is kept in ``folder``.

    Raises:
        ValueError: it is something else.
        ClientFailure: the frozen part is not here and did not come along.
    """
    order = Order.from_bytes(content["order"])
    return Asked(content["run"], content["model"], replace(order, frozen=_frozen(content, folder)))


def _frozen(content: Mapping[str, Any], folder: Path) -> State:
    digest, found = content["frozen"], content["frozen bytes"]
    if not digest:
        return {}
    path = folder / f"frozen-{digest[:32]}.safetensors"
    if not found:
        if not path.is_file():
            raise ClientFailure("it lacks the frozen part that it was sent; it will get it again")
        found = path.read_bytes()
    if hashlib.sha256(found).hexdigest() != digest:
        raise ClientFailure("the frozen part is not what the server sent; it will get it again")
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{path.name}.{os.getpid()}"  # others may be writing it, too
        write_synced(temporary, found)
        temporary.replace(path)
    return unpack(found)[1]["frozen"]
