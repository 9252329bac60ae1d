"""The Flower engine: orders go out through a Grid, answers come back. The loop stays ours.

A message is one ConfigRecord of strings and bytes, JSON and safetensors within; a client's answer
is read as it comes. Nothing is waited for longer than ``engine.deadline``, and a client that says
nothing, something else or too late is a failure with its reason. Flower's own simulation hands
messages to its workers by Ray, within one machine.
"""

# Flower is an extra:
# pyright: reportMissingImports=false

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from flwr.app import DEFAULT_TTL, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedms.fl.algorithms import stages_of
from fedms.fl.channel.channel import Channel
from fedms.fl.client import prepare
from fedms.fl.config import Config
from fedms.fl.engines.answers import (
    EVALUATE,
    HELLO,
    IMPORTANCE,
    TRAIN,
    VALIDATE,
    Introduction,
    hear,
    why_not,
)  # fmt: skip
from fedms.fl.engines.engine import Message as ClientMessage
from fedms.fl.engines.engine import Order, Reply
from fedms.fl.engines.intake import Intake
from fedms.fl.evaluate import Scores, Tally
from fedms.fl.journal.progress import Progress
from fedms.fl.model.model import Model
from fedms.fl.types import ClientFailure, Failure, State
from fedms.fl.wire import pack

T = TypeVar("T")

Content = Callable[[str], ConfigRecord]
"""What a client is sent."""

RECORD = "fedms"
PAUSE = 0.2
"""Seconds between two looks for answers."""
LOOK = 5.0
"""Seconds between two looks at who is connected."""


class Sites:
    """The clients that can be reached, each through a node of the grid.

    Args:
        grid: Flower's.
        deadline: seconds that an answer may take; 0: as long as it likes.
        progress: is warned of whoever cannot be understood.
    """

    def __init__(self, grid: Grid, deadline: float, progress: Progress) -> None:
        self._grid, self._deadline, self._progress = grid, deadline, progress
        self._nodes: dict[str, int] = {}
        self._asked: set[int] = set()
        self._connected: set[int] = set()
        self._next_look = 0.0
        self.introduced: dict[str, Introduction] = {}

    def find(self) -> None:
        """Ask every node that has come since the last time, or had no answer then, who it is."""
        self._connected = set(self._grid.get_node_ids())
        new = sorted(self._connected - self._asked)
        self._asked.update(new)
        for node, reply in self._exchange(HELLO, new, lambda _: ConfigRecord(), ""):
            try:
                who = hear(_content(reply), Introduction)
            except ClientFailure as error:
                self._progress.warn(f"a site (node {node}) is left out: {error}")
                self._asked.discard(node)
                continue
            if who.client_id in self._nodes:
                self._progress.warn(f"{who.client_id} has come again, as node {node}")
            self._nodes[who.client_id] = node
            self.introduced[who.client_id] = who

    def wait_for(self, clients: Iterable[str], seconds: float) -> None:
        """Wait until all of these are connected, or so many seconds."""
        until = time.monotonic() + seconds
        while True:
            self.find()
            missing = [c for c in clients if self._nodes.get(c) not in self._connected]
            if not missing or time.monotonic() > until:
                break
            time.sleep(1.0)
        if missing:
            self._progress.warn(f"going on without {', '.join(missing)}")

    def ask(
        self, what: str, clients: Iterable[str], content: Content, group: str
    ) -> Iterator[tuple[str, bytes | Failure]]:
        """Ask clients and yield their answers as they come; who cannot be reached comes first."""
        self.find()
        reached: dict[int, str] = {}
        for client in clients:
            node = self._nodes.get(client)
            if node in self._connected:
                reached[node] = client
            else:
                yield client, Failure(client, "no SuperNode that is connected stands for it")
        for node, found in self._exchange(what, reached, lambda n: content(reached[n]), group):
            client = reached[node]
            try:
                yield client, _content(found)
            except ClientFailure as error:
                yield client, Failure(client, str(error))

    def _exchange(
        self, what: str, nodes: Iterable[int], content: Callable[[int], ConfigRecord], group: str
    ) -> Iterator[tuple[int, Message | str]]:
        """Messages to nodes, and their replies as they come, or why there is none."""
        waiting: dict[str, int] = {}
        ttl = self._deadline or DEFAULT_TTL
        until = time.monotonic() + ttl
        for node in nodes:  # one by one: a cohort's orders are never held at once
            record = RecordDict({RECORD: content(node)})
            message = Message(record, node, what, ttl=ttl, group_id=group)
            (sent,) = [*self._grid.push_messages([message])] or [None]
            if sent:
                waiting[sent] = node
            else:
                yield node, "the SuperLink did not take its order"
        while waiting:
            for reply in self._grid.pull_messages([*waiting]):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, reply
            if time.monotonic() >= until:
                break
            for message_id in self._lost(waiting):
                yield waiting.pop(message_id), "its SuperNode has gone"
            time.sleep(PAUSE if waiting else 0.0)
        for node in waiting.values():
            yield node, f"it did not answer within engine.deadline, {self._deadline:g} s"

    def _lost(self, waiting: Mapping[str, int]) -> list[str]:
        """Messages to nodes that are not connected any more; looked for now and then."""
        if time.monotonic() < self._next_look:
            return []
        self._next_look = time.monotonic() + LOOK
        self._connected = set(self._grid.get_node_ids())
        return [message_id for message_id, node in waiting.items() if node not in self._connected]


class FlowerEngine:
    """Lets sites train and score.

    Args:
        config: of one method.
        model: the server's, for names and shapes.
        sites: where the clients are.
        run: names the run on the sites' disks.
        digest: of the model, which sites compare with theirs; "": they need not.
        here: whether what clients keep is written to the run's own folder (a simulation).
        clients: how many take part.
        progress: hears of every client.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        sites: Sites,
        run: str,
        digest: str,
        here: bool,
        clients: int,
        progress: Progress,
    ) -> None:
        self._method, self._stages = config.method, stages_of(config)
        self._model, self._sites = model, sites
        self._run, self._digest, self._here, self._progress = run, digest, here, progress
        self._channel, self._bytes_down = Channel.of(config, clients), 0
        self._holding: set[tuple[str, str]] = set()
        """(client, digest) of the frozen parts that clients have answered with."""

    def train(self, order: Order) -> Reply:
        stage = self._stages[order.stage]
        frozen = Frozen(order.frozen)
        order = replace(order, lacking=frozenset(order.clients) - self._holders(frozen))
        prepare(self._model, stage, order.awake)
        intake = Intake.of(order, stage, self._model, self._channel, self._progress.warn)
        self._bytes_down = 0
        for client, answer in self._ask(TRAIN, order, frozen):
            intake.take(self._update(client, answer, frozen))
            self._progress.advance(1)
        reply = intake.reply(self._bytes_down)
        visited = (replace(each, kept=each.kept and self._here) for each in reply.visited)
        return replace(reply, visited=tuple(visited))

    def validate(self, order: Order) -> Scores:
        return self._scores(VALIDATE, order)

    def evaluate(self, order: Order) -> Scores:
        return self._scores(EVALUATE, order)

    def importance(self, clients: Sequence[str]) -> list[float]:
        order = Order(self._method, 0, 0, (), (), dict.fromkeys(clients, ()), {}, {})
        said, _ = self._collect(IMPORTANCE, order, list[float])
        return [sum(each) for each in zip(*said.values(), strict=True)]

    # Inside ---------------------------------------------------------------------------------------

    def _scores(self, what: str, order: Order) -> Scores:
        said, failed = self._collect(what, order, Scores)
        parts = [*said.values(), Scores(Tally(), (), tuple(failed))]
        return Scores.merged(parts, order.clients)

    def _collect(
        self, what: str, order: Order, form: type[T]
    ) -> tuple[dict[str, T], list[Failure]]:
        """What the clients of an order say, in its order, and who says nothing; it is warned of."""
        said: dict[str, T] = {}
        failed: list[Failure] = []
        frozen = Frozen(order.frozen)
        for client, answer in self._ask(what, order, frozen):
            try:
                if isinstance(answer, Failure):
                    raise ClientFailure(answer.reason)
                said[client] = self._of_itself(hear(answer, form), what, client)
                self._holding.add((client, frozen.digest))
            except ClientFailure as error:
                self._holding.discard((client, frozen.digest))  # it may have lost it
                self._progress.warn(f"round {order.round}: no {what} of {client}, {error}")
                failed.append(Failure(client, str(error)))
            self._progress.advance(1 if what == EVALUATE else 0)
        return {client: said[client] for client in order.clients if client in said}, failed

    def _ask(
        self, what: str, order: Order, frozen: Frozen
    ) -> Iterator[tuple[str, bytes | Failure]]:
        holders = self._holders(frozen)

        def content(client: str) -> ConfigRecord:
            own = replace(order.share([client]), frozen={}, lacking=frozenset()).to_bytes()
            once = b"" if client in holders else frozen.content
            self._bytes_down += len(own) + len(once)
            return ConfigRecord(
                {
                    "run": self._run,
                    "model": self._digest,
                    "order": own,
                    "frozen": frozen.digest,
                    "frozen bytes": once,
                }
            )

        yield from self._sites.ask(what, order.clients, content, str(order.round))

    def _update(
        self, client: str, answer: bytes | Failure, frozen: Frozen
    ) -> ClientMessage | Failure:
        """What a client sends, unread, or why it sends nothing."""
        if isinstance(answer, Failure):
            return answer
        if reason := why_not(answer):
            self._holding.discard((client, frozen.digest))  # it may have lost it
            return Failure(client, reason)
        self._holding.add((client, frozen.digest))
        return ClientMessage(client, answer)

    def _of_itself(self, said: T, what: str, client: str) -> T:
        """What a client says.

        Raises:
            ClientFailure: it is not what was asked for: scores of this one alone where clients' own
                models are scored, a number for each block.
        """
        if isinstance(said, Scores):
            found = [each.client_id for each in (*said.clients, *said.failed)]
            wanted = [client] if what == EVALUATE else []
            if found != wanted:
                of, own = (", ".join(each) or "nobody" for each in (found, wanted))
                raise ClientFailure(f"it sent scores of {of}, expected of {own}")
        elif isinstance(said, list):
            blocks = len(self._model.backbone.blocks)
            if len(said) != blocks:
                raise ClientFailure(f"it sent {len(said)} numbers, expected one of {blocks} blocks")
        return said

    def _holders(self, frozen: Frozen) -> set[str]:
        return {client for client, digest in self._holding if digest == frozen.digest}


class Frozen:
    """What stays the same for a whole stage, to be sent once to each client and kept by it.

    Attributes:
        content: safetensors; nothing if there is no such part.
        digest: names it.
    """

    def __init__(self, state: State) -> None:
        self.content = pack({}, frozen=state) if state else b""
        self.digest = hashlib.sha256(self.content).hexdigest() if state else ""


def _content(reply: Message | str) -> bytes:
    """The bytes of a reply.

    Raises:
        ClientFailure: there are none, and why.
    """
    if isinstance(reply, str):
        raise ClientFailure(reply)
    if reply.has_error():
        raise ClientFailure(f"Flower says: {reply.error.reason or reply.error.code}")
    record = reply.content.config_records.get(RECORD)
    content = record.get("answer") if record is not None else None
    if not isinstance(content, bytes):
        raise ClientFailure(f"its reply has no bytes named {RECORD}/answer")
    return content
