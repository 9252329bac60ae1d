"""An engine that records what passes through it, and whose clients do as they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from fedms.fl.config import Config
from fedms.fl.engines.engine import Message, Order, Reply
from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.server import Sent
from fedms.fl.types import Failure, State
from fedms.fl.wire import pack, unpack

SAID = ("client_id", "round", "num_examples", "kept", "train_loss")
Found = Sent | Failure
Change = Callable[[Order, Found], Found]


class Spy(LocalEngine):
    """Records every order of a round, and what each client sent by (round, client).

    Args:
        change: what becomes of a client's answer on its way.

    Attributes:
        folder: of the run, set by the fixture.
    """

    folder: Path

    def __init__(
        self,
        config: Config,
        world: World,
        states: ClientStates,
        progress: Progress,
        change: Change = lambda order, found: found,
    ) -> None:
        super().__init__(config, world, states, progress)
        self.world, self.states = world, states
        self._change = change
        self.orders: list[Order] = []
        self.sent: dict[tuple[int, str], State] = {}

    def train(self, order: Order) -> Reply:
        self.orders.append(order)
        return super().train(order)

    def visits(self, order: Order) -> Iterator[Message | Failure]:
        for found in super().visits(order):
            answer = self._change(order, found if isinstance(found, Failure) else read(found))
            if isinstance(answer, Sent):
                self.sent[order.round, answer.client_id] = answer.shared
                yield write(answer)
            else:
                yield answer


def read(message: Message) -> Sent:
    """What a client says without a codec."""
    record, states = unpack(message.content)
    said = {field: record[field] for field in SAID}
    return Sent(**said, shared=states.get("values", {}))


def write(sent: Sent) -> Message:
    said = {field: getattr(sent, field) for field in SAID}
    content = pack({**said, "codec": "none", "shapes": {}}, values=sent.shared)
    return Message(sent.client_id, content)


def servers(folder: Path) -> list[dict[str, torch.Tensor]]:
    """What the server held after each round of a run with ``engine.keep_checkpoints=99``."""
    places = sorted((folder / "checkpoints").iterdir())
    return [load_file(place / "server.safetensors") for place in places]
