"""What sites and networks do wrong: the round goes on, the reason is in the metrics at once."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from collections.abc import Callable

import pytest
import torch
from heard import Heard
from spy import servers

from fedms.fl.config import load_config
from fedms.fl.journal.states import ClientStates
from fedms.fl.types import QuorumError

pytest.importorskip("flwr")

from flwr.app import Error, Message, RecordDict
from post import Post, answer_of, app_of, with_answer

from fedms.fl.runs.flower import serve
from fedms.fl.wire import pack, unpack

SETTINGS = ("data.num_clients=4", "data.unseen_clients=0", "engine.deadline=0.3", "eval.every=9")
BAD = "north"


Answer = Callable[[Message, Message], list[Message]]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def carry(wards, tmp_path, heard):
    """``carry(name, "key=value", spoil=...)``: a run, and the lines of its metrics."""

    def run(name: str, *overrides: str, spoil=None, nodes=None) -> list[dict]:
        config = load_config(None, [*wards.settings, *SETTINGS, *overrides])
        nodes = nodes or wards.nodes(tmp_path / name / "sites")
        post = Post(nodes, app_of(config, tmp_path / name / "app"))
        if spoil is not None:
            post.spoil = spoil
        serve(config, tmp_path / name / "server", post, 5.0, heard)
        text = (tmp_path / name / "server" / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return run


def of_bad(kind: str, *answers: Answer):
    """What becomes of BAD's replies to such orders: the first of these in round 1, and so on."""

    def spoil(client: str, order: Message, reply: Message) -> list[Message]:
        if client != BAD or order.metadata.message_type != kind:
            return [reply]
        answer = answers[int(order.metadata.group_id) - 1] if len(answers) > 1 else answers[0]
        return answer(order, reply)

    return spoil


def nothing(order: Message, reply: Message) -> list[Message]:
    return []


def changed(order: Message, reply: Message, change: Callable[[dict, dict], None]) -> list[Message]:
    """The reply with its record and tensors changed, whole again as bytes."""
    record, states = unpack(answer_of(reply))
    change(record, states["values"])
    return [with_answer(order, pack(record, **states))]


def of_record(**fields: object):
    return lambda order, reply: changed(order, reply, lambda said, _: said.update(fields))


def of_tensors(change: Callable[[dict], None]):
    return lambda order, reply: changed(order, reply, lambda _, shared: change(shared))


def of_bytes(change: Callable[[bytes], bytes]):
    return lambda order, reply: [with_answer(order, change(answer_of(reply)))]


def first(shared: dict) -> str:
    return next(iter(shared))


def poison(shared: dict) -> None:
    shared[first(shared)].view(-1)[0] = float("nan")


def rename(shared: dict) -> None:
    shared["global.layer.9.lora_A"] = shared.pop(first(shared))


def reshape(shared: dict) -> None:
    shared[first(shared)] = torch.zeros(3, 3)


def of_flower(order: Message, _: Message) -> list[Message]:
    return [Message(Error(code=204, reason="<class 'ZeroDivisionError'>"), reply_to=order)]


def untimed(line: dict) -> dict:
    return {k: v for k, v in line.items() if k not in ("seconds", "peak_memory_mb")}


FAULTS = {
    "raises, as Flower tells it": (of_flower, "Flower says: <class 'ZeroDivisionError'>"),
    "hangs": (nothing, "it did not answer within engine.deadline, 0.3 s"),
    "replies for another round": (of_record(round=7), "its message is of round '7', expected"),
    "speaks for another": (
        of_record(client_id="south"),
        "its message is of client 'south', expected 'north'",
    ),
    "sends NaN": (of_tensors(poison), "is not finite"),
    "sends another name": (of_tensors(rename), "global.layer.9.lora_A, which is not expected"),
    "sends another shape": (of_tensors(reshape), r"of shape \[3, 3\], expected"),
    "is cut short": (of_bytes(lambda b: b[:-100]), "its message cannot be read"),
    "sends noise": (
        of_bytes(lambda b: random.Random(0).randbytes(len(b))),
        "message cannot be read",
    ),
    "sends nothing": (of_bytes(lambda b: b""), "its message cannot be read"),
    "sends too much": (of_bytes(lambda b: b + bytes(2**22)), r"its message has \d+ bytes, at most"),
    "trained on minus one": (of_record(num_examples=-1), "it says it trained on -1 examples"),
    "counts in words": (of_record(num_examples="9"), "header is wrong: num_examples"),
    "says no loss": (of_record(train_loss=None), "it must say its number of examples and loss"),
    "replies without a record": (
        lambda order, reply: [Message(RecordDict(), reply_to=order)],
        "its reply has no bytes named fedms/answer",
    ),
}


def test_a_round_goes_on_without_whoever_fails_and_nothing_of_it_is_averaged(carry):
    """A fault a round, and the same run in which that client is silent in every round."""
    faults = list(FAULTS.items())
    rounds = [f"stage1.rounds={len(faults)}", "stage2.rounds=0", "stage1.local_steps=1"]
    spoil = of_bad("train", *(fault for _, (fault, _) in faults))
    lines = carry("faults", *rounds, spoil=spoil)
    for line, (name, (_, reason)) in zip(lines, faults, strict=True):
        (failure,) = line.pop("failed")
        assert failure["client_id"] == BAD, name
        assert re.search(reason, failure["reason"]), (name, failure)
        assert line["participants"] == ["east", "south", "west"]
    silent = carry("silent", *rounds, spoil=of_bad("train", nothing))
    for found, wanted in zip(lines, silent, strict=True):
        wanted.pop("failed")
        assert untimed(found) == untimed(wanted)


def of_scores(*clients: str):
    """Its own scores, once under each of these names."""

    def change(order: Message, reply: Message) -> list[Message]:
        record, _ = unpack(answer_of(reply))
        (own,) = record["said"]["clients"]
        record["said"]["clients"] = [own | {"client_id": client} for client in clients]
        return [with_answer(order, pack(record))]

    return change


SCORES = {
    "of another client": (of_scores("south"), "it sent scores of south, expected of north"),
    "of others, too": (of_scores(BAD, "west"), "it sent scores of north, west, expected of north"),
    "twice": (of_scores(BAD, BAD), "it sent scores of north, north, expected of north"),
    "of nobody": (of_scores(), "it sent scores of nobody, expected of north"),
}


def test_scores_are_a_clients_own_or_none(carry):
    """A fault a round, and the same run in which that client says no score in any round."""
    faults = list(SCORES.values())
    rounds = [f"stage1.rounds={len(faults)}", "stage2.rounds=0", "eval.every=1"]
    spoil = of_bad("evaluate", *(fault for fault, _ in faults))
    lines = carry("scores", *rounds, spoil=spoil)
    silent = carry("silent", *rounds, spoil=of_bad("evaluate", nothing))
    for line, wanted, (_, reason) in zip(lines, silent, faults, strict=True):
        assert line.pop("unscored") == [{"client_id": BAD, "reason": reason}]
        assert [each["client_id"] for each in wanted.pop("unscored")] == [BAD]
        assert line["personalized_accuracy"]["clients"] == 3
        assert untimed(line) == untimed(wanted)


def test_an_importance_is_a_number_a_block(carry, heard):
    """One that is not is left out, and blocks wake in the others' order."""
    by_importance = ["stage1.rounds=1", "stage2.rounds=0", "sal.order=importance"]

    def saying(*scores: float):
        answer = pack({"said": scores})
        return of_bad("query.importance", lambda order, _: [with_answer(order, answer)])

    (most,) = carry("most", *by_importance, spoil=saying(0.0, 0.0, 1e9, 0.0))
    (least,) = carry("least", *by_importance, spoil=saying(0.0, 1e9, 0.0, 0.0))
    assert (most["awake_blocks"], least["awake_blocks"]) == ([2], [1])
    (without,) = carry("without", *by_importance, spoil=saying(0.0, 0.0, 0.0, 0.0))
    for found in ((), (0.0, 1e9), (0.0, 1e9, 0.0, 0.0, 0.0), (0.0, float("inf"), 0.0, 0.0)):
        (line,) = carry(f"of {len(found)}", *by_importance, spoil=saying(*found))
        assert line["awake_blocks"] == without["awake_blocks"]
    assert len(heard.warnings) == 4
    assert all(f"no query.importance of {BAD}, it sent " in warning for warning in heard.warnings)


def test_an_answer_that_comes_twice_counts_once(carry):
    lines = carry("once", "stage1.rounds=2", "stage2.rounds=0")
    twice = carry(
        "twice", "stage1.rounds=2", "stage2.rounds=0", spoil=lambda _, __, reply: [reply, reply]
    )
    assert [untimed(line) for line in twice] == [untimed(line) for line in lines]


def test_an_answer_that_is_lost_counts_at_neither_end(carry, tmp_path):
    """FedALT's server holds the mean of what its sites last sent, though two answers were lost."""

    def passed(order: Message, reply: Message) -> list[Message]:
        return [reply]

    spoil = of_bad("train", nothing, passed, nothing, passed)
    carry("lost", "method=fedalt", "stage1.rounds=4", "stage2.rounds=0", spoil=spoil)
    held = servers(tmp_path / "lost" / "server")[-1]
    sites = sorted(tmp_path.glob("lost/sites/*/*/clients"))
    kept = [ClientStates(site).read(site.parts[-3], 4) or {} for site in sites]
    assert held["members.sum"] == len(kept) == 4
    for name in held.keys() - {"members.sum"}:
        total = sum(own[name.replace("rest.", "last.", 1)] for own in kept)
        torch.testing.assert_close(held[name], total / 4)


def test_a_third_of_the_clients_fails_at_random_for_fifty_rounds(carry):
    draws = random.Random(0)

    def spoil(client: str, order: Message, reply: Message) -> list[Message]:
        fails = order.metadata.message_type == "train" and draws.random() < 0.3
        fault, _ = FAULTS["sends NaN"]
        return fault(order, reply) if fails else [reply]

    lines = carry(
        "random", "stage1.rounds=50", "stage2.rounds=0", "stage1.local_steps=1",
        "sal.trigger=all_at_once", "eval.every=50", "server.quorum=0.01", spoil=spoil,
    )  # fmt: skip
    assert [line["round"] for line in lines] == list(range(1, 51))
    failed = [failure for line in lines for failure in line["failed"]]
    assert 40 <= len(failed) <= 80
    assert all("is not finite" in failure["reason"] for failure in failed)
    assert all(len(line["participants"]) + len(line["failed"]) == 4 for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def test_a_round_without_its_quorum_does_not_count(carry, tmp_path):
    def spoil(client: str, order: Message, reply: Message) -> list[Message]:
        lost = order.metadata.group_id == "2" and client != "east"
        return [] if lost and order.metadata.message_type == "train" else [reply]

    with pytest.raises(QuorumError, match=r"1 of 4 .* did not answer within .* \(3 clients\)"):
        carry("quorum", "stage1.rounds=3", spoil=spoil)
    text = (tmp_path / "quorum" / "server" / "metrics.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["round"] for line in text.splitlines()] == [1]


def test_a_full_disk_on_a_site_costs_its_visit(carry, wards, tmp_path, monkeypatch):
    """In stage 2 its local expert cannot be written; in the next round there is room again."""
    real, full = os.fsync, {"now": False}

    def fsync(handle: int) -> None:
        where = os.readlink(f"/proc/self/fd/{handle}")
        if full["now"] and f"/sites/{BAD}/" in where:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)

    def spoil(client: str, order: Message, reply: Message) -> list[Message]:
        now = order.metadata.group_id, order.metadata.message_type, client
        full["now"] = now[:2] == ("1", "evaluate") or now == ("2", "train", "east")
        return [reply]

    lines = carry("full", "stage1.rounds=1", "stage2.rounds=2", spoil=spoil)
    assert [[f["client_id"] for f in line["failed"]] for line in lines] == [[], [BAD], []]
    assert "No space left on device" in lines[1]["failed"][0]["reason"]
