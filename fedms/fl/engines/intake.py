"""The server's end of a round: read what clients send, refuse what is no update, add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from fedms.fl.algorithms import Stage
from fedms.fl.algorithms.stage import Aggregate
from fedms.fl.channel.channel import Channel
from fedms.fl.channel.link import Link
from fedms.fl.engines.engine import Message, Order, Reply, Visited
from fedms.fl.model.model import Model
from fedms.fl.server import Totals, check_values, expected, owed
from fedms.fl.types import ClientFailure, Failure, State


class Intake:
    """What comes back of an order, one by one and in any order.

    Args:
        order: what was asked.
        aggregate: how updates become one.
        link: reads messages.
        owed: (client's id) -> what its update is to hold, see :func:`fedms.fl.server.expected`.
        warn: hears of every client that is dropped.
    """

    def __init__(
        self,
        order: Order,
        aggregate: Aggregate,
        link: Link,
        owed: Callable[[str], State],
        warn: Callable[[str], None],
    ) -> None:
        self._order, self._link, self._owed, self._warn = order, link, owed, warn
        self._totals = Totals(aggregate)
        self._visited: dict[str, Visited] = {}
        self._failed: dict[str, Failure] = {}

    @classmethod
    def of(
        cls,
        order: Order,
        stage: Stage,
        model: Model,
        channel: Channel,
        warn: Callable[[str], None],
    ) -> Self:
        """The intake of an order to which the model was brought."""
        shared = expected(model, stage.in_round(order.round), order.received)
        aggregate = channel.aggregate(stage, shared, order.round)

        def owed_by(client_id: str) -> State:
            return owed(model, shared, order.clients[client_id])

        return cls(order, aggregate, channel.link, owed_by, warn)

    def take(self, found: Message | Failure) -> None:
        """Add what a client sent, or note why there is nothing to add."""
        if isinstance(found, Failure):
            self._drop(found)
            return
        try:
            self._check_sender(found.client_id)
            owes = self._owed(found.client_id)
            sent = self._link.accept(found.content, found.client_id, self._order.round, owes)
            check_values(sent)
            self._totals.add(sent)
        except Exception as error:  # what one client sends must not stop the federation
            self._drop(Failure(found.client_id, f"{type(error).__name__}: {error}"))
            return
        self._failed.pop(sent.client_id, None)
        size = len(found.content) if owes else 0  # who owes nothing need not send that
        self._visited[sent.client_id] = Visited(
            sent.client_id, sent.num_examples, sent.train_loss, size, sent.kept
        )

    def reply(self, bytes_down: int) -> Reply:
        """All that came; clients of whom nothing was heard have failed.

        Args:
            bytes_down: of all that was sent to the order's clients.
        """
        clients = self._order.clients
        for client in clients:
            if client not in self._visited and client not in self._failed:
                self._drop(Failure(client, "it did not answer"))
        return Reply(
            tuple(self._visited[c] for c in clients if c in self._visited),
            tuple(self._failed[c] for c in clients if c in self._failed),
            self._totals,
            bytes_down,
        )

    def _check_sender(self, client_id: str) -> None:
        if client_id not in self._order.clients:
            raise ClientFailure("it was not asked")
        if client_id in self._visited:
            raise ClientFailure("it has answered already")

    def _drop(self, failure: Failure) -> None:
        reason = failure.reason.removeprefix(f"{ClientFailure.__name__}: ")
        self._warn(f"round {self._order.round}: {failure.client_id} dropped, {reason}")
        if failure.client_id not in self._visited:
            self._failed[failure.client_id] = failure
