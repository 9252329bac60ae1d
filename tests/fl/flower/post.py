"""Flower's Grid with all sites in this process, and what a network may do to their replies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from uuid import uuid4

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedms.fl.config import to_toml
from fedms.fl.engines.flower import RECORD
from fedms.fl.runs.flower import client_app

Spoil = Callable[[str, Message, Message], Iterable[Message]]
"""(client, order, its reply) -> the replies that arrive."""


class Post(Grid):
    """Hands each message to its site at once and keeps what it replies.

    Args:
        sites: node configs by client.
        app: of all of them.

    Attributes:
        spoil: what becomes of each reply.
        away: clients whose SuperNodes are not there.
        sent: every message and reply, by client.
    """

    def __init__(self, sites: Mapping[str, Mapping[str, str | bool]], app: ClientApp) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._app = app
        self._clients = dict(enumerate(sites, start=100))
        self._contexts = {
            node: Context(1, node, dict(sites[client]), RecordDict(), {})
            for node, client in self._clients.items()
        }
        self._replies: list[Message] = []
        self.spoil: Spoil = lambda client, order, reply: [reply]
        self.away: set[str] = set()
        self.sent: list[tuple[str, Message]] = []

    def get_node_ids(self) -> list[int]:
        return [node for node, client in self._clients.items() if client not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        found = []
        for message in messages:
            client = self._clients[message.metadata.dst_node_id]
            message.metadata.__dict__["_message_id"] = uuid4().hex
            found.append(message.metadata.message_id)
            if client not in self.away:
                reply = self._app(message, self._contexts[message.metadata.dst_node_id])
                self.sent += [(client, message), (client, reply)]
                self._replies += self.spoil(client, message, reply)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        found = [r for r in self._replies if r.metadata.reply_to_message_id in wanted]
        self._replies = [r for r in self._replies if r not in found]
        return found

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError


def answer_of(reply: Message) -> bytes:
    """The bytes of a reply."""
    answer = reply.content.config_records[RECORD]["answer"]
    assert isinstance(answer, bytes)
    return answer


def with_answer(order: Message, answer: bytes) -> Message:
    """A reply with other bytes."""
    return Message(RecordDict({RECORD: ConfigRecord({"answer": answer})}), reply_to=order)


def app_of(config, folder: Path) -> ClientApp:
    """The ClientApp of some settings, which lets this process live past its deadline."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config.replace(engine=config.engine.replace(deadline=0.0))
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return client_app(folder / "config.toml")
