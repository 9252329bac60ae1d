"""The local engine: all clients in this process, on one resident model, S side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from fedms.fl.algorithms import Stage, stages_of
from fedms.fl.channel.channel import Channel
from fedms.fl.channel.link import Link, split_late, with_late
from fedms.fl.client import Visit, prepare, visit
from fedms.fl.config import Config
from fedms.fl.data.federation import ClientData
from fedms.fl.engines.cohort import side_by_side
from fedms.fl.engines.engine import Message, Order, Reply
from fedms.fl.engines.intake import Intake
from fedms.fl.engines.world import World
from fedms.fl.evaluate import (
    Scores,
    common_score,
    evaluate,
    leaving_out,
    pooled_sample,
    val_sample,
)
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.sal import block_importance
from fedms.fl.server import Sent, expected
from fedms.fl.types import CheckpointError, Failure, State, Update, matches, select


class LocalEngine:
    """Visits clients here and adds up what they send.

    Args:
        config: of one method.
        world: clients and model; other engines may work on it, too.
        states: what the clients hold of their own.
        progress: hears of every client.
        everyone: whether the world's clients are all that there are; else nobody is scored on
            everyone's examples.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        states: ClientStates,
        progress: Progress,
        *,
        everyone: bool = True,
    ) -> None:
        self._everyone = everyone
        self._config, self._progress, self._states = config, progress, states
        self._stages = stages_of(config)
        self._federation, self._model = world.federation, world.model
        self._link = Link(config.channel)

    def train(self, order: Order) -> Reply:
        stage = self._enter(order)
        intake = Intake.of(order, stage, self._model, self._channel, self._progress.warn)
        for found in self.visits(order):
            intake.take(found)
            self._progress.advance(1)
        self._states.sync()
        every, once = (len(self._link.send(order.round, s)) for s in (order.sent, order.frozen))
        return intake.reply(every * len(order.clients) + once * len(order.lacking))

    def visits(self, order: Order) -> Iterator[Message | Failure]:
        """The clients' end of :meth:`train`: visit them, keep what is theirs, send the rest."""
        stage, clients = self._enter(order), list(order.clients)
        received = self.received(order)
        began = expected(self._model, stage.in_round(order.round), received)
        size = self._side_by_side(stage)
        for start in range(0, len(clients), size):
            some = clients[start : start + size]
            held = [self._held(client_id, order) for client_id in some]
            visits = [
                Visit(self._federation.client(client_id), kept, order.clients[client_id])
                for client_id, (kept, _) in zip(some, held, strict=True)
            ]
            found = self.visit(stage, visits, received, order.round)
            for client_id, update, (_, late) in zip(some, found, held, strict=True):
                if isinstance(update, Exception):
                    yield Failure(client_id, f"{type(update).__name__}: {update}")
                else:
                    late = select(late, stage.shares)
                    yield self._leave(update, began, late, order.round)

    def validate(self, order: Order) -> Scores:
        stage, received = self._enter(order), self.received(order)
        clients = [self._federation.client(client_id) for client_id in order.clients]
        none = np.array([], dtype=np.int64)
        own = np.concatenate([none, *(client.val for client in clients)])

        def score(_: Sequence[ClientData], examples: np.ndarray) -> Scores:
            common = common_score(self._model, stage, received, self._federation, examples)
            return Scores(common, ())

        examples = np.intersect1d(self._validation, own)
        found = leaving_out(score, clients, examples, clients, lambda client: client.val)
        return self._told(order, found)

    def evaluate(self, order: Order) -> Scores:
        stage, received = self._enter(order), self.received(order)
        clients = [self._federation.client(client_id) for client_id in order.clients]

        def score(some: Sequence[ClientData], pooled: np.ndarray) -> Scores:
            return evaluate(
                self._model,
                stage,
                received,
                lambda client_id: self._held(client_id, order)[0],
                self._federation,
                some,
                pooled,
                self._side_by_side(stage),
                self._progress.advance,
            )

        everyone = self._federation.everyone.values()
        found = leaving_out(score, clients, self._pooled, everyone, lambda client: client.test)
        return self._told(order, found)

    def importance(self, clients: Sequence[str]) -> list[float]:
        found: list[list[float]] = []
        for client_id in clients:
            try:
                client = self._federation.client(client_id)
                found.append(block_importance(self._model, client))
            except Exception as error:  # one client must not stop everybody
                self._progress.warn(
                    f"no importance of {client_id}, {type(error).__name__}: {error}"
                )
        return [sum(scores) for scores in zip(*found, strict=True)]

    # Inside ---------------------------------------------------------------------------------------

    def visit(
        self, stage: Stage, visits: list[Visit], server: State, round: int
    ) -> Sequence[Update | Exception]:
        """Visit clients side by side; each by itself where one of them stops all."""
        try:
            return visit(self._model, stage, visits, server, round, self._config.seed)
        except Exception as error:
            if len(visits) == 1:
                return [error]
            return [self.visit(stage, [each], server, round)[0] for each in visits]

    def received(self, order: Order) -> State:
        """What the clients make of what the server sends."""
        link, round = self._link, order.round
        frozen, sent = link.as_received(round, order.frozen), link.as_received(round, order.sent)
        return {**frozen, **sent}

    def _told(self, order: Order, scores: Scores) -> Scores:
        """The scores, after a warning of everybody who has none."""
        for each in scores.failed:
            self._progress.warn(f"round {order.round}: {each.client_id} not scored, {each.reason}")
        return scores

    def _leave(self, update: Update, began: State, late: State, round: int) -> Message:
        """Write what stays with the client, and return what it sends."""
        sent = Sent(
            update.client_id,
            round,
            update.num_examples,
            update.shared,
            bool(update.kept or (update.shared and self._link.holds_back)),
            update.train_loss,
        )
        content, late = self._link.reply(sent, began, late)
        if held := with_late(update.kept, late):
            self._states.write(update.client_id, round, held)
        return Message(update.client_id, content)

    def _enter(self, order: Order) -> Stage:
        """Bring the model and what is kept of its frozen parts to where an order wants them."""
        stage = self._stages[order.stage]
        prepare(self._model, stage, order.awake)
        self._model.prefix.keep([*order.depths, self._model.slots.depth])
        frozen = [(expert,) for expert in stage.experts if matches(f"{expert}.", stage.frozen)]
        frozen = frozen if stage.group is None else []  # what is frozen is not alike for everybody
        self._model.outputs.keep([(), *frozen], (self, order.stage))
        return stage

    def _held(self, client_id: str, order: Order) -> tuple[State, State]:
        """What a client's algorithm keeps, and what its codec has not sent yet.

        After its last visit that counted; nothing before the first.
        """
        try:
            return split_late(self._states.read(client_id, order.counted.get(client_id, 0)) or {})
        except CheckpointError as error:  # one damaged file must not stop everybody
            self._progress.warn(f"{error}; the client begins anew")
            return {}, {}

    def _side_by_side(self, stage: Stage) -> int:
        return side_by_side(self._model, self._config.engine.cohort, stage.settings.batch_size)

    @cached_property
    def _channel(self) -> Channel:
        """The server's end; a process that has some of the clients alone never asks for it."""
        return Channel.of(self._config, len(self._federation.clients))

    @cached_property
    def _pooled(self) -> np.ndarray:
        if not self._everyone:
            return np.zeros(0, dtype=np.int64)
        return pooled_sample(self._federation, self._config.eval.pooled_examples, self._config.seed)

    @cached_property
    def _validation(self) -> np.ndarray:
        return val_sample(self._federation, self._config.eval.val_examples, self._config.seed)
