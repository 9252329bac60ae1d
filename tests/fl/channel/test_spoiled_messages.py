"""What clients can send that is no update: each is dropped with its reason, and no sum holds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from fedms.fl.channel.message import MessageError
from fedms.fl.data.sampling import generator
from fedms.fl.engines.engine import Message, Order
from fedms.fl.engines.local import LocalEngine
from fedms.fl.types import Failure, State
from fedms.fl.wire import pack, unpack

TEN = (
    "data.num_clients=10", "data.partitioner=iid", "data.min_partition_size=1", "method=fedavg",
    "stage1.local_steps=1", "stage2.rounds=0", "sal.trigger=all_at_once", "engine.cohort=10",
)  # fmt: skip
Tamper = Callable[[bytes], bytes]


def with_values(change: Callable[[State], State], **header) -> Tamper:
    """A well-formed message of other values."""

    def tamper(content: bytes) -> bytes:
        record, states = unpack(content)
        return pack({**record, **header}, values=change(states["values"]))

    return tamper


def first(values: State, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    name, tensor = next(iter(values.items()))
    return {**values, name: change(tensor)}


FAULTS: dict[str, tuple[Tamper, str]] = {
    "client-00": (lambda c: c[:-7], "MessageError: its message cannot be read"),
    "client-01": (lambda c: c + bytes(10**6), "MessageError: its message has 10"),
    "client-02": (lambda c: b"\x80\x04\x95", "MessageError: its message cannot be read"),
    "client-03": (with_values(lambda v: v, round=7), "MessageError: its message is of round '7'"),
    "client-04": (
        with_values(lambda v: {**v, "local.x": torch.ones(1)}),
        "MessageError: it sent local.x, which is not expected",
    ),
    "client-05": (
        with_values(lambda v: first(v, lambda t: t[:1])), "MessageError: it sent global."
    ),
    "client-06": (
        with_values(lambda v: first(v, lambda t: t * float("nan"))), "ClientFailure: its global."
    ),
    "client-07": (
        with_values(lambda v: v, client_id="client-09"), "MessageError: its message is of client"
    ),
}  # fmt: skip


class Faulty(LocalEngine):
    """Two clients are honest; of the others each does one thing wrong in every round."""

    def visits(self, order: Order) -> Iterator[Message | Failure]:
        for found in super().visits(order):
            assert isinstance(found, Message)
            tamper = FAULTS.get(found.client_id, (bytes, ""))[0]
            yield replace(found, content=tamper(found.content))
            if found.client_id == "client-08":
                yield found  # and once more
        yield Message("client-99", b"")


class Away(LocalEngine):
    """Those who are at fault above do not answer."""

    def visits(self, order: Order) -> Iterator[Message | Failure]:
        for found in super().visits(order):
            if isinstance(found, Message) and found.client_id not in FAULTS:
                yield found


def test_each_fault_is_named_and_no_sum_holds_it(config, execute, tmp_path, read_lines):
    settings = config(*TEN, "server.quorum=0.2", "channel.codec=none")
    faulty = execute(settings, tmp_path / "faulty", engine=Faulty)
    for line in read_lines(tmp_path / "faulty" / "metrics.jsonl"):
        assert line["participants"] == ["client-08", "client-09"]
        reasons = {each["client_id"]: each["reason"] for each in line["failed"]}
        assert reasons.keys() == FAULTS.keys()
        for client, (_, reason) in FAULTS.items():
            assert reasons[client].startswith(reason), client
    away = execute(settings, tmp_path / "away", engine=Away)
    assert {each["reason"] for line in read_lines(tmp_path / "away" / "metrics.jsonl")
            for each in line["failed"]} == {"it did not answer"}  # fmt: skip
    assert faulty.server.state.keys() == away.server.state.keys()
    for name, tensor in away.server.state.items():
        assert torch.equal(faulty.server.state[name], tensor)


class Unlucky(LocalEngine):
    """Three of ten clients, others in each round, fail in one of three ways."""

    def visits(self, order: Order) -> Iterator[Message | Failure]:
        clients = sorted(order.clients)
        failing = generator(0, "unlucky", order.round).choice(clients, 3, replace=False).tolist()
        for found in super().visits(order):
            assert isinstance(found, Message)
            if found.client_id == failing[0]:
                yield Failure(found.client_id, "MemoryError: out of memory")
            elif found.client_id == failing[1]:
                yield replace(found, content=found.content[: len(found.content) // 2])
            elif found.client_id != failing[2]:  # the third never answers
                yield found


def test_a_third_of_the_clients_fails_in_every_of_fifty_rounds(
    config, execute, tmp_path, read_lines
):
    settings = config(*TEN, "stage1.rounds=50", "eval.every=50", "server.quorum=0.7")
    run = execute(settings, tmp_path, engine=Unlucky)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["round"] for line in lines] == list(range(1, 51))
    ids = [f"client-{i:02d}" for i in range(10)]
    seen: set[str] = set()
    for line in lines:
        reasons = {each["client_id"]: each["reason"] for each in line["failed"]}
        assert sorted([*line["participants"], *reasons]) == ids
        kinds = sorted(reason.partition(":")[0] for reason in reasons.values())
        assert kinds == [MemoryError.__name__, MessageError.__name__, "it did not answer"]
        seen.update(reasons)
    assert seen == set(ids)
    assert all(torch.isfinite(tensor).all() for tensor in run.server.state.values())
    assert lines[-1]["personalized_accuracy"]["mean"] > 0.5  # of four classes
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    json.dumps(lines, allow_nan=False)
