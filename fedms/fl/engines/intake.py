"""The server's end of a round: refuse what is no update, add up the rest."""

from __future__ import annotations

from collections.abc import Callable

from fedms.fl.algorithms import Stage
from fedms.fl.engines.engine import Order, Reply, Visited
from fedms.fl.server import Sent, Totals, check_update
from fedms.fl.types import ClientFailure, Failure, State
from fedms.fl.wire import encoded_size


class Intake:
    """What comes back of an order, one by one and in any order.

    Args:
        order: what was asked.
        stage: the order's.
        expected: what an update may hold, by name and shape.
        warn: hears of every client that is dropped.
    """

    def __init__(
        self, order: Order, stage: Stage, expected: State, warn: Callable[[str], None]
    ) -> None:
        self._order, self._expected, self._warn = order, expected, warn
        self._totals = Totals(stage.aggregate)
        self._visited: dict[str, Visited] = {}
        self._failed: dict[str, Failure] = {}

    def take(self, found: Sent | Failure) -> None:
        """Add what a client sent, or note why there is nothing to add."""
        if isinstance(found, Failure):
            self._drop(found)
            return
        size = encoded_size(found.shared)
        try:
            self._check_sender(found)
            check_update(found, self._expected)
            self._totals.add(found)
        except Exception as error:  # what one client sends must not stop the federation
            self._drop(Failure(found.client_id, f"{type(error).__name__}: {error}"))
            return
        self._failed.pop(found.client_id, None)
        self._visited[found.client_id] = Visited(
            found.client_id, found.num_examples, found.train_loss, size, found.kept
        )

    def reply(self) -> Reply:
        """All that came; clients of whom nothing was heard have failed."""
        clients = self._order.clients
        for client in clients:
            if client not in self._visited and client not in self._failed:
                self._drop(Failure(client, "it did not answer"))
        return Reply(
            tuple(self._visited[c] for c in clients if c in self._visited),
            tuple(self._failed[c] for c in clients if c in self._failed),
            self._totals,
            self._order.bytes_down,
        )

    def _check_sender(self, found: Sent) -> None:
        order = self._order
        if found.client_id not in order.clients:
            raise ClientFailure("it was not asked")
        if found.round != order.round:
            raise ClientFailure(f"it answers round {found.round}, asked was {order.round}")
        if found.client_id in self._visited:
            raise ClientFailure("it has answered already")

    def _drop(self, failure: Failure) -> None:
        reason = failure.reason.removeprefix(f"{ClientFailure.__name__}: ")
        self._warn(f"round {self._order.round}: {failure.client_id} dropped, {reason}")
        if failure.client_id not in self._visited:
            self._failed[failure.client_id] = failure
