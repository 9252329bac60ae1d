"""Where clients run: an Order goes in, a Reply comes out.

The loop hands an engine Orders and knows nothing else of it. Order, Message and Reply are JSON and
safetensors, and beside the configuration, from which any process builds the same stages, they are
all that one process needs of another:

    loop --Order--> engine --Order--> clients --bytes--> Intake, which adds up --Reply--> loop

What a client keeps stands in none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol, Self

import torch

from fedms.fl.algorithms import Stage
from fedms.fl.evaluate import Scores
from fedms.fl.server import Totals
from fedms.fl.types import Failure, State
from fedms.fl.wire import pack, unpack


@dataclass(frozen=True)
class Order:
    """What the server wants of some clients in a round.

    Attributes:
        method: name of the algorithm.
        stage: place among its stages, from 0.
        round: counts from 1.
        awake: blocks whose experts take part.
        depths: blocks that a forward may start from until the stage ends: what a cache should hold.
        clients: who is meant, and which of the awake blocks each trains.
        sent: what all of them are sent.
        frozen: what stays the same for the whole stage and only those are sent who lack it.
        lacking: who does.
        counted: the round in which a client's answer last counted; nothing of whom none did. What
            it held then is what it goes on from: a visit whose answer was lost has not happened.
    """

    method: str
    stage: int
    round: int
    awake: tuple[int, ...]
    depths: tuple[int, ...]
    clients: dict[str, tuple[int, ...]]
    sent: State
    frozen: State
    lacking: frozenset[str] = frozenset()
    counted: dict[str, int] = field(default_factory=dict)

    @property
    def received(self) -> State:
        """What a client has from the server once it lacks nothing."""
        return {**self.frozen, **self.sent}

    def share(self, clients: Iterable[str]) -> Self:
        """The same for some of its clients."""
        some = {client: self.clients[client] for client in clients}
        counted = {client: round for client, round in self.counted.items() if client in some}
        return replace(self, clients=some, lacking=self.lacking.intersection(some), counted=counted)

    def to_bytes(self) -> bytes:
        record = {
            "method": self.method, "stage": self.stage, "round": self.round, "awake": self.awake,
            "depths": self.depths, "clients": self.clients, "lacking": sorted(self.lacking),
            "counted": self.counted,
        }  # fmt: skip
        return pack(record, sent=self.sent, frozen=self.frozen)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """ValueError if it is something else."""
        record, states = unpack(content)
        try:
            return cls(
                method=record["method"],
                stage=record["stage"],
                round=record["round"],
                awake=tuple(record["awake"]),
                depths=tuple(record["depths"]),
                clients={client: tuple(blocks) for client, blocks in record["clients"].items()},
                sent=states.get("sent", {}),
                frozen=states.get("frozen", {}),
                lacking=frozenset(record["lacking"]),
                counted={client: int(round) for client, round in record["counted"].items()},
            )
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"no order: {error}") from error


@dataclass(frozen=True)
class Message:
    """What a client sends: bytes, which :class:`fedms.fl.channel.link.Link` makes and reads."""

    client_id: str
    content: bytes


@dataclass(frozen=True)
class Visited:
    """A client that came back, ``kept``: with something of its own in its file."""

    client_id: str
    num_examples: int
    train_loss: float | None
    bytes_up: int
    kept: bool


@dataclass(frozen=True)
class Reply:
    """What came of an order: who came back, who did not and why, and their updates added up.

    Attributes:
        visited, failed: in the order of the order's clients.
        bytes_down: of all that was sent to the clients.
    """

    visited: tuple[Visited, ...]
    failed: tuple[Failure, ...]
    totals: Totals
    bytes_down: int

    @property
    def train_loss(self) -> float | None:
        """The mean over examples, or None where nobody came back and told."""
        told = [(e.num_examples, e.train_loss) for e in self.visited if e.train_loss is not None]
        examples = sum(count for count, _ in told)
        return sum(count * loss for count, loss in told) / examples if examples else None

    @staticmethod
    def merged(replies: Sequence[Reply], clients: Iterable[str]) -> Reply:
        """Replies of some clients each as one, in the order of ``clients``."""
        place = {client: i for i, client in enumerate(clients)}
        first, *rest = replies
        for reply in rest:
            first.totals.merge(reply.totals)
        visited = [each for reply in replies for each in reply.visited]
        failed = [each for reply in replies for each in reply.failed]
        return Reply(
            tuple(sorted(visited, key=lambda each: place[each.client_id])),
            tuple(sorted(failed, key=lambda each: place[each.client_id])),
            first.totals,
            sum(reply.bytes_down for reply in replies),
        )

    def to_bytes(self) -> bytes:
        totals = self.totals
        record = {
            "visited": [asdict(each) for each in self.visited],
            "failed": [asdict(each) for each in self.failed],
            "bytes_down": self.bytes_down,
            "weights": totals.weights,
            "dtype": str(totals.dtype).removeprefix("torch."),
            "each": list(totals.each),
        }
        each = {f"each {i}": state for i, state in enumerate(totals.each.values())}
        return pack(record, sums=totals.sums, **each)

    @staticmethod
    def from_bytes(content: bytes, stage: Stage) -> Reply:
        """What a process sent of a stage; ValueError if it is something else."""
        record, states = unpack(content)
        totals = Totals(stage.aggregate)
        try:
            totals.sums, totals.weights = states.get("sums", {}), record["weights"]
            totals.each = {c: states.get(f"each {i}", {}) for i, c in enumerate(record["each"])}
            totals.dtype = getattr(torch, record["dtype"])
            visited = tuple(Visited(**each) for each in record["visited"])
            failed = tuple(Failure(**each) for each in record["failed"])
            return Reply(visited, failed, totals, record["bytes_down"])
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"no reply: {error}") from error


class Engine(Protocol):
    """Where clients run."""

    def train(self, order: Order) -> Reply:
        """Visit the clients. One that fails is noted, and what the others kept is on the disk."""
        ...

    def validate(self, order: Order) -> Scores:
        """The common model on a sample of the clients' validation examples, which SAL watches.

        A client that fails is noted, here and in :meth:`evaluate`.
        """
        ...

    def evaluate(self, order: Order) -> Scores:
        """Each client's own model and the common one on test examples.

        Clients that take part in no round are asked, too.
        """
        ...

    def importance(self, clients: Sequence[str]) -> list[float]:
        """A score a block, by which SAL can order them, or none: see :mod:`fedms.fl.sal`."""
        ...
