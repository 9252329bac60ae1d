"""All ranks that torchrun has started, as one engine: each visits a share of the clients.

Rank 0 runs the loop, writes what a run writes and visits a share of its own; the others do what it
orders (:func:`serve`). Orders and replies cross as they are, by gloo on the CPU, whatever the ranks
compute on. Sums are in fp64 and are added in the order of ranks, so their number does not show.

What clients keep is written by whoever visited them: the run's folder must be one that all see.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from fedms.fl.algorithms import stages_of
from fedms.fl.config import Config
from fedms.fl.engines.engine import Engine, Order, Reply
from fedms.fl.evaluate import Scores
from fedms.fl.types import FedMSError

PATIENCE = timedelta(days=7)
"""How long a rank waits for another: a dead one's connection closes, a slow one is not dead."""

Answer = Callable[[str, bytes], bytes]
"""(what is asked, content) -> content."""


def started_by_torchrun() -> bool:
    """Whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class Ranks:
    """The group of ranks, as one of them sees it; each computes on a GPU of its own if there are.

    Attributes:
        rank, size: this one's number, and how many there are.
    """

    def __init__(self) -> None:
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local % torch.cuda.device_count())
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def send(self, to: int, content: bytes) -> None:
        """RuntimeError if that rank is gone."""
        dist.send(torch.tensor([len(content)]), to)
        dist.send(torch.frombuffer(bytearray(content), dtype=torch.uint8), to)

    def receive(self, sender: int) -> bytes:
        """Wait for a message; RuntimeError if that rank is gone."""
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, sender)
        content = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(content, sender)
        return content.numpy().tobytes()

    def ask(self, kind: str, contents: Sequence[bytes]) -> None:
        """Hand each of the other ranks its content, in order of ranks."""
        for rank, content in enumerate(contents, start=1):
            with _named(rank):
                self.send(rank, kind.encode() + b"\n" + content)

    def answers(self) -> list[bytes]:
        """What the other ranks have to say.

        Raises:
            FedMSError: one of them failed or ended.
        """
        found: list[bytes] = []
        for rank in range(1, self.size):
            with _named(rank):
                kind, _, content = self.receive(rank).partition(b"\n")
            if kind != b"done":
                raise FedMSError(f"rank {rank} failed: {content.decode()}")
            found.append(content)
        return found

    def end(self) -> None:
        """Let the other ranks go."""
        for rank in range(1, self.size):
            with suppress(RuntimeError):
                self.send(rank, b"end\n")
        dist.destroy_process_group()


class _named:
    """Says which rank it is that cannot be reached."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, RuntimeError):
            raise FedMSError(
                f"rank {self._rank} has ended; what is done is kept, and `fedms resume` goes on "
                "from the last finished round under any number of ranks"
            ) from error


def serve(ranks: Ranks, answer: Answer) -> None:
    """Do what rank 0 asks until it says that this is the end, or is gone."""
    while True:
        try:
            kind, _, content = ranks.receive(0).partition(b"\n")
        except RuntimeError:
            return
        if kind == b"end":
            dist.destroy_process_group()
            return
        try:
            found = b"done\n" + answer(kind.decode(), content)
        except Exception as error:  # rank 0 tells it, once
            found = f"failed\n{type(error).__name__}: {error}".encode()
        with suppress(RuntimeError):
            ranks.send(0, found)


def obey(engine: Engine, kind: str, content: bytes) -> bytes:
    """What another rank's engine answers to one of :class:`TorchrunEngine`'s questions."""
    if kind == "importance":
        return json.dumps(engine.importance(json.loads(content))).encode()
    order = Order.from_bytes(content)
    if kind == "train":
        return engine.train(order).to_bytes()
    return (engine.validate if kind == "validate" else engine.evaluate)(order).to_bytes()


class TorchrunEngine:
    """Rank 0's engine. Clients are dealt out one by one, so every rank has as many steps.

    Args:
        config: of one method.
        local: visits rank 0's own share.
        ranks: the others obey an engine of the same method.
        advance: hears of the clients of other ranks.
    """

    def __init__(
        self, config: Config, local: Engine, ranks: Ranks, advance: Callable[[int], object]
    ) -> None:
        self._stages = stages_of(config)
        self._local, self._ranks, self._advance = local, ranks, advance

    def train(self, order: Order) -> Reply:
        own, others = self._shares("train", order)
        mine, stage = self._local.train(own), self._stages[order.stage]
        replies = [Reply.from_bytes(content, stage) for content in self._answers(others)]
        return Reply.merged([mine, *replies], order.clients)

    def validate(self, order: Order) -> Scores:
        own, _ = self._shares("validate", order)
        mine = self._local.validate(own)
        scores = [Scores.from_bytes(content) for content in self._ranks.answers()]
        return Scores.merged([mine, *scores], order.clients)

    def evaluate(self, order: Order) -> Scores:
        own, others = self._shares("evaluate", order)
        mine = self._local.evaluate(own)
        scores = [Scores.from_bytes(content) for content in self._answers(others)]
        return Scores.merged([mine, *scores], order.clients)

    def importance(self, clients: Sequence[str]) -> list[float]:
        some = [list(clients[rank :: self._ranks.size]) for rank in range(self._ranks.size)]
        self._ranks.ask("importance", [json.dumps(own).encode() for own in some[1:]])
        found = [self._local.importance(some[0]), *map(json.loads, self._ranks.answers())]
        return [sum(scores) for scores in zip(*filter(None, found), strict=True)]

    def _shares(self, kind: str, order: Order) -> tuple[Order, int]:
        """Hand out all shares but the first, and return that one and how many clients are away."""
        clients, size = list(order.clients), self._ranks.size
        own, *shares = (order.share(clients[rank::size]) for rank in range(size))
        self._ranks.ask(kind, [share.to_bytes() for share in shares])
        return own, len(clients) - len(own.clients)

    def _answers(self, clients: int) -> list[bytes]:
        found = self._ranks.answers()
        self._advance(clients)
        return found
