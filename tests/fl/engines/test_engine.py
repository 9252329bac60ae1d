"""What crosses a process: written and read back it is the same, and nothing else is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spy import write

from fedms.fl.algorithms import stages_of
from fedms.fl.algorithms.stage import Aggregate
from fedms.fl.channel.link import Link
from fedms.fl.channel.robust import Robust
from fedms.fl.channel.settings import ChannelConfig
from fedms.fl.config import Config
from fedms.fl.engines.engine import Order, Reply, Visited
from fedms.fl.engines.intake import Intake
from fedms.fl.engines.local import LocalEngine
from fedms.fl.evaluate import Scores, Tally
from fedms.fl.journal.records import ClientScore
from fedms.fl.journal.states import ClientStates
from fedms.fl.server import Sent, Server
from fedms.fl.types import Failure
from fedms.fl.wire import pack, unpack

(FEDAVG, _) = stages_of(Config(method="fedavg"))
LINK = Link(ChannelConfig())


def order(clients: str = "abc", **changes) -> Order:
    return replace(
        Order(
            method="fedms",
            stage=1,
            round=7,
            awake=(2, 3),
            depths=(0, 2),
            clients=dict.fromkeys(clients, (3,)),
            sent={"gate.weight": torch.randn(2, 3, dtype=torch.float64)},
            frozen={"global.q.lora_A": torch.randn(4).bfloat16(), "global.q.lora_B": torch.ones(1)},
            lacking=frozenset("a"),
            counted={"a": 3, "c": 6},
        ),
        **changes,
    )


def sent(client: str, *values: float, examples: int = 1, round: int = 7) -> Sent:
    w = torch.tensor(values, dtype=torch.float32)
    return Sent(client, round, examples, {"w": w}, True, 0.25)


def test_an_order_comes_back_as_it_was():
    for one in (order(), order("", sent={}, frozen={}, lacking=frozenset()), order("/ä\n\0'")):
        found = Order.from_bytes(one.to_bytes())
        assert (found.clients, found.lacking) == (one.clients, one.lacking)
        assert found.counted == one.counted
        assert (found.method, found.stage, found.round) == (one.method, one.stage, one.round)
        assert (found.awake, found.depths) == (one.awake, one.depths)
        for ours, theirs in ((found.sent, one.sent), (found.frozen, one.frozen)):
            assert ours.keys() == theirs.keys()
            assert all(
                torch.equal(ours[n], t) and ours[n].dtype == t.dtype for n, t in theirs.items()
            )


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 100, b"{}", pack({"round": 3})])
def test_bytes_that_are_no_message(content):
    with pytest.raises(ValueError, match=r"no message|no order"):
        Order.from_bytes(content)


def test_a_message_that_was_cut_short():
    whole = order().to_bytes()
    for length in (7, 40, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match=f"{length} bytes that are no message"):
            unpack(whole[:length])


def test_a_share_of_an_order():
    some = order().share("ca")
    assert list(some.clients) == ["c", "a"]
    assert some.lacking == {"a"}
    assert order().share("b").lacking == set()


def took(how: Aggregate, *found: Sent | Failure, of: Order | None = None) -> Reply:
    """What a stage of one parameter w [2] makes of what came back."""
    of = of or order()
    intake = Intake(of, how, LINK, lambda client: {"w": torch.zeros(2)}, lambda text: None)
    for each in found:
        intake.take(each if isinstance(each, Failure) else write(each))
    return intake.reply(10 * len(of.clients))


def median(server, states, weights):
    return {"w": torch.stack([state["w"] for state in states.values()]).median(dim=0).values}


COSINE = Robust("bipartition", 0, {"w": torch.zeros(2)})  # cuts [8, -1] to the length of [1, 5]


@pytest.mark.parametrize(
    ("how", "mean"),
    [
        (Aggregate(), [45 / 8, 9 / 8]),
        (Aggregate(finish=median, each=True), [3, 4]),
        (Aggregate(finish=COSINE, each=True), [(4 + 8 * 0.4**0.5) / 3, (9 - 0.4**0.5) / 3]),
    ],
)
def test_replies_of_shares_are_the_reply_to_the_whole(how, mean):
    """Each through bytes, in any order of arrival."""
    updates = [sent("a", 1, 5, examples=2), sent("b", 3, 4), sent("c", 8, -1, examples=5)]
    whole = took(how, *updates)
    stage = replace(FEDAVG, aggregate=how)
    parts = [
        took(how, updates[2], updates[0], of=order().share("ca")),
        took(how, updates[1], of=order().share("b")),
    ]
    merged = Reply.merged(
        [Reply.from_bytes(part.to_bytes(), stage) for part in parts], order().clients
    )
    assert [each.client_id for each in merged.visited] == ["a", "b", "c"]
    assert merged.visited == whole.visited
    assert (merged.failed, merged.bytes_down) == ((), 30)
    assert merged.train_loss == 0.25
    assert torch.equal(merged.totals.finish({})["w"], whole.totals.finish({})["w"])
    assert merged.totals.finish({})["w"].tolist() == pytest.approx(mean)


def test_what_the_server_does_not_take():
    """The first answer of who was asked, to this round, of the right form; failures are kept."""
    bad = [
        (sent("x", 9, 9), None),
        (sent("a", 9, 9, round=6), "its message is of round '6', expected 7"),
        (sent("b", 9), r"it sent w of shape [1], expected [2]"),
        (sent("c", float("inf"), 9), "its w is not finite"),
        (replace(sent("a", 9, 9), shared={"v": torch.ones(2)}), "it sent v, which is not expected"),
        (sent("b", 9, 9, examples=0), "it says it trained on 0 examples"),
        (Failure("c", "OSError: no space"), "OSError: no space"),
    ]
    for found, why in bad:
        reply = took(Aggregate(), sent("a" if found.client_id != "a" else "b", 1, 2), found)
        assert reply.totals.finish({})["w"].tolist() == [1, 2]
        reasons = {failure.client_id: failure.reason for failure in reply.failed}
        assert set(reasons) == set("abc") - {reply.visited[0].client_id}
        if why is not None:
            assert why in reasons[found.client_id]
    twice = took(Aggregate(), sent("a", 1, 2), sent("a", 5, 6), sent("b", 1, 2))
    assert twice.totals.finish({})["w"].tolist() == [1, 2]
    assert [each.client_id for each in twice.visited] == ["a", "b"]
    assert twice.failed == (Failure("c", "it did not answer"),)
    late = took(Aggregate(), Failure("a", "timeout"), sent("a", 1, 2))
    size = len(write(sent("a", 1, 2)).content)
    assert late.visited == (Visited("a", 1, 0.25, size, True),)


def test_scores_come_back_as_they_were():
    scores = Scores(
        Tally(3.5, 7),
        (ClientScore("a", True, 5, 0.5, 0.25, None), ClientScore("b", False, 2, 1.0, 0.5, 0.75)),
    )
    assert Scores.from_bytes(scores.to_bytes()) == scores
    parts = [Scores(Tally(1.5, 3), scores.clients[1:]), Scores(Tally(2.0, 4), scores.clients[:1])]
    assert Scores.merged(parts, ["a", "c", "b"]) == scores
    with pytest.raises(ValueError, match="no scores"):
        Scores.from_bytes(b"{}")


def test_an_engine_answers_to_an_order_from_another_process(config, world, quiet, tmp_path):
    """Two engines on states of their own, one given the order, the other its bytes."""
    settings = config("lora.dropout=0.1")
    server = Server(world.model)
    stages, clients = stages_of(settings), [c.client_id for c in world.federation.clients]
    engines = [
        LocalEngine(settings, world, ClientStates(tmp_path / name), quiet) for name in ("1", "2")
    ]
    for stage in (0, 1):
        every, once = server.sends(stages[stage], (2, 3))
        wanted = order(
            clients, stage=stage, round=stage + 1, sent=every, frozen=once, lacking=frozenset(),
            depths=(2,),
        )  # fmt: skip
        wanted = replace(wanted, clients=dict.fromkeys(clients, (2, 3)))
        one = engines[0].train(wanted)
        other = engines[1].train(Order.from_bytes(wanted.to_bytes()))
        assert len(one.visited) == 4
        assert one.visited == other.visited
        after = one.totals.finish(server.state)
        assert all(torch.equal(after[n], t) for n, t in other.totals.finish(server.state).items())
        assert engines[0].evaluate(wanted) == engines[1].evaluate(wanted)
        server.state = after
    assert {path.name for path in (tmp_path / "1").rglob("*.*")} == {
        path.name for path in (tmp_path / "2").rglob("*.*")
    }
