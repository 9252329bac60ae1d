"""Sites with their own data and disks, without Flower's processes: what they end with and leave."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator

import pytest
from transformers import AutoModel

from fedms.fl.config import load_config
from fedms.fl.runs.folder import start

pytest.importorskip("flwr")

from flwr.app import Message
from post import Post, app_of

from fedms.fl.engines.flower import RECORD
from fedms.fl.runs.flower import serve, simulate
from fedms.fl.types import ConfigError, FedMSError
from fedms.fl.wire import unpack


@pytest.fixture
def federation(wards, tmp_path, quiet):
    """``federation("key=value")``: (post, carry), four wards of which one may be unseen."""

    def build(*overrides: str, unseen: str = "west"):
        config = load_config(None, [*wards.settings, *overrides])
        post = Post(wards.nodes(tmp_path / "sites", unseen), app_of(config, tmp_path / "app"))

        def carry(out: str = "server", wait: float = 5.0) -> None:
            config_now = load_config(None, [*wards.settings, *overrides])
            serve(config_now, tmp_path / out, post, wait, quiet)

        return post, carry

    return build


def without_everyone(lines: list[dict]) -> list[dict]:
    """What a site can measure: nobody has everyone's test examples."""
    return [{k: v for k, v in line.items() if k != "pooled_accuracy"} for line in lines]


@pytest.mark.parametrize(
    "more", [("sal.order=importance",), ("mofm.clusters=2", "mofm.cluster_rounds=1")]
)
def test_sites_end_with_the_metrics_of_the_local_engine(
    federation, wards, tmp_path, quiet, read_lines, same_lines, more
):
    settings = ["data.num_clients=3", "data.unseen_clients=1", "stage1.rounds=2", "stage2.rounds=2"]
    settings += more
    local = tmp_path / "local"
    start(load_config(None, [*wards.settings, *settings]), local, quiet)
    (unseen,) = {c["client_id"] for c in read_lines(local / "clients.jsonl") if not c["seen"]}
    _, carry = federation(*settings, unseen=unseen)
    carry()
    for name in ("metrics.jsonl", "clients.jsonl"):
        found, wanted = (read_lines(place / name) for place in (tmp_path / "server", local))
        same_lines(without_everyone(found), without_everyone(wanted))
        assert all(line["pooled_accuracy"] is None for line in found)
    assert not (tmp_path / "server" / "clients").exists()  # what is a client's own stays there


SHORT = ("data.num_clients=4", "data.unseen_clients=0", "stage1.rounds=1", "stage2.rounds=2")


class Killed(BaseException):
    """What ends a server between two lines of its program."""


def test_a_server_that_was_killed_goes_on_and_ends_alike(
    federation, tmp_path, read_lines, same_lines
):
    """In the first round, when stage 2's visits are done and not committed, and after the last."""
    _, carry = federation(*SHORT, unseen="")
    carry("whole")
    post, carry = federation(*SHORT, unseen="")
    moments = [("1", "train"), ("2", "evaluate"), ("3", "evaluate")]

    def spoil(client: str, order: Message, reply: Message) -> list[Message]:
        now = order.metadata.group_id, order.metadata.message_type
        if moments and now == moments[0] and client == "south":
            moments.pop(0)
            raise Killed
        return [reply]

    post.spoil = spoil
    for _ in range(3):
        with pytest.raises(Killed):
            carry("killed")
    carry("killed")
    assert not moments
    for name in ("metrics.jsonl", "clients.jsonl"):
        found, wanted = (read_lines(tmp_path / run / name) for run in ("killed", "whole"))
        for line in (*found, *wanted):  # the frozen part is sent anew after a kill
            line.pop("bytes_down", None)
        same_lines(found, wanted)


def fields_of(said: object, at: str = "") -> Iterator[str]:
    """The name of every value in an answer, at any depth."""
    for inner in said if isinstance(said, list) else ():
        yield from fields_of(inner, at)
    for name, inner in said.items() if isinstance(said, dict) else ():
        yield f"{at}{name}"
        yield from fields_of(inner, f"{at}{name}/")


def test_what_leaves_a_site(federation, wards, tmp_path):
    """No text, label count, local expert or weight of the gate's own is among its answers."""
    post, carry = federation("data.num_clients=3", "data.unseen_clients=1", "eval.every=2")
    carry()
    words = {
        row["text"].encode()
        for path in wards.own.values()
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    }
    replies = [m for _, m in post.sent if m.metadata.reply_to_message_id]
    assert len(replies) > 20
    names, fields = set(), set()
    for reply in replies:
        answer = reply.content.config_records[RECORD]["answer"]
        assert list(reply.content) == [RECORD]
        assert not any(word in answer for word in words)
        record, states = unpack(answer)
        fields |= set(fields_of(record.get("said", record)))
        names |= set(states.get("values", {}))
    assert fields == {
        "client_id", "unseen",  # who it is
        "round", "codec", "shapes", "num_examples", "kept", "train_loss",  # a visit
        "common", "common/total", "common/count", "failed",  # scores
        "clients", "clients/client_id", "clients/seen", "clients/num_test", "clients/accuracy",
        "clients/pooled_accuracy", "clients/gate_local", "clients/by_prior",
    }  # fmt: skip
    assert {name.split(".")[0] for name in names} == {"global", "gate"}
    assert all(name.startswith(("global.", "gate.adapter.")) for name in names)


def test_what_a_site_keeps_and_exports(federation, tmp_path):
    settings = (*SHORT[:2], "stage1.rounds=1", "stage2.rounds=4", "eval.every=9")
    post, carry = federation(*settings, unseen="")
    carry()
    (run,) = (tmp_path / "sites" / "north").glob("*/clients")
    kept = sorted(int(path.name.split(".")[1]) for path in run.glob("*/*"))
    assert kept == [3, 4, 5]  # what two checkpoints of the server can go back to, and the newest
    adapters = run.parent / "adapters"
    assert {path.name for path in adapters.iterdir()} == {"global", "local", "gate.safetensors"}
    assert (adapters / "local" / "adapter_model.safetensors").is_file()
    first = [m for _, m in post.sent if not m.metadata.reply_to_message_id]
    frozen = [m for m in first if m.content.config_records[RECORD].get("frozen bytes")]
    assert len(frozen) == 4  # once to each site in all of stage 2


def test_a_site_with_other_data_or_another_model_is_left_out(
    wards, tmp_path, quiet, tiny_bert, read_lines
):
    """It finds that itself; the others go on."""
    config = load_config(None, [*wards.settings, *SHORT, "stage1.rounds=2", "stage2.rounds=0"])
    nodes = wards.nodes(tmp_path / "sites")
    post = Post(nodes, app_of(config, tmp_path / "app"))

    def kill(client: str, order: Message, reply: Message) -> list[Message]:
        if order.metadata.group_id == "2":
            raise Killed
        return [reply]

    post.spoil = kill
    with pytest.raises(Killed):
        serve(config, tmp_path / "server", post, 5.0, quiet)
    rows = wards.own["east"].read_text(encoding="utf-8").replace("\nacute", "\nchronic acute")
    (tmp_path / "east.csv").write_text(rows, encoding="utf-8")
    nodes["east"]["data"] = str(tmp_path / "east.csv")
    other = AutoModel.from_pretrained(tiny_bert)
    other.encoder.layer[0].output.dense.weight.data += 0.1
    shutil.copytree(tiny_bert, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    nodes["south"]["model"] = str(tmp_path / "other")
    post = Post(nodes, app_of(config, tmp_path / "app, after a restart of the sites"))
    serve(config, tmp_path / "server", post, 5.0, quiet)
    first, last = read_lines(tmp_path / "server" / "metrics.jsonl")
    assert first["failed"] == []
    east, south = last["failed"]
    assert "has other examples" in east["reason"]
    assert "other is not the server's" in south["reason"]
    assert last["participants"] == ["north", "west"]


def test_who_is_there_is_decided_when_a_run_begins(federation, tmp_path, capfd):
    settings = ("data.num_clients=3", "data.unseen_clients=0", "stage1.rounds=2", "eval.every=9")
    post, carry = federation(*settings, "stage2.rounds=0", unseen="")
    post.away = {"west", "south"}
    with pytest.raises(FedMSError, match=r"2 sites and 0 unseen ones have come within 0\.1 s"):
        carry(wait=0.1)
    post.away = {"west"}

    def spoil(client: str, order: Message, reply: Message) -> list[Message]:
        post.away = {"south"} if order.metadata.message_type == "evaluate.validate" else post.away
        return [reply]

    post.spoil = spoil
    carry()
    lines = (tmp_path / "server" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    assert [line["participants"] for line in rounds] == [
        ["east", "north", "south"],
        ["east", "north"],
    ]


def test_other_settings_do_not_go_on_with_a_run(federation):
    _, carry = federation(*SHORT, unseen="")
    carry()
    _, carry = federation(*SHORT, "stage1.lr=0.5", unseen="")
    with pytest.raises(FedMSError, match=r"stage1.lr was 0.01, is 0.5"):
        carry()


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("prior=0.5", "everyone's label frequencies"),
        ("method=fedavg_prior", "everyone's label frequencies"),
        ('rivals=["fedavg_prior"]', "everyone's label frequencies"),
        ("method=centralised", "centralised trains on all clients' examples in one place"),
        ('rivals=["centralised"]', "centralised trains on all clients' examples in one place"),
    ],
)
def test_what_needs_everyone_is_refused(federation, tmp_path, override, why):
    _, carry = federation(*SHORT, override, unseen="")
    with pytest.raises(ConfigError, match=why):
        carry()
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize("override", ["method=centralised", 'rivals=["centralised"]'])
def test_a_simulation_has_no_place_for_everybodys_examples(wards, tmp_path, quiet, override):
    def never(**_) -> None:
        raise AssertionError("nothing is to be run")

    config = load_config(None, [*wards.settings, *SHORT, override])
    with pytest.raises(ConfigError, match=r'run it with engine\.kind = "local"'):
        simulate(config, tmp_path, quiet, never)
