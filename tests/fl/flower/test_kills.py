"""Flower's real processes, killed: a SuperNode in a visit, the server in a save and in a round."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

import pytest
from patience import PATIENCE

from fedms.fl.cli import main
from fedms.fl.config import load_config
from fedms.fl.engines.engine import Message, Order
from fedms.fl.engines.local import LocalEngine
from fedms.fl.types import Failure

pytest.importorskip("flwr")

from loopback import Loopback, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

SETTINGS = (
    "data.num_clients=2", "data.unseen_clients=0", "stage1.rounds=0", "stage2.rounds=3",
    "stage2.local_steps=150", "sal.trigger=all_at_once", "eval.every=9",
    f"engine.deadline={PATIENCE}",
)  # fmt: skip
GONE = r"its SuperNode has gone|Node Unavailable"
"""Whoever notices first, fedms or Flower, says it."""


class WithoutNorth(LocalEngine):
    """north is not there in the second round."""

    def visits(self, order: Order) -> Iterator[Message | Failure]:
        gone = {"north"} if order.round == 2 else set()
        yield from super().visits(order.share(order.clients.keys() - gone))
        yield from (Failure(client, "away") for client in gone)


@pytest.mark.slow
def test_a_federation_outlives_its_processes(wards, tmp_path, execute, read_lines, same_lines):
    """It ends as the local engine, in which one client misses one round.

    Killed are the server in the save of the first round, a SuperNode while its client trains in the
    second, and SuperLink and server in the third.
    """
    two = wards.only("east", "north")
    settings, app, out = [*two.settings, *SETTINGS], tmp_path / "hospitals", tmp_path / "server"
    assert main(["flower", "new", str(app), *settings]) == 0
    nodes = two.nodes(tmp_path / "sites")

    def rounds_kept() -> list[int]:
        kept = (tmp_path / "sites" / "north").glob("*/clients/*/north-*")
        return sorted(int(path.name.split(".")[1]) for path in kept)

    def written() -> list[dict]:
        return read_lines(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []

    with Loopback(tmp_path / "flower") as flower:

        def run() -> None:
            config = f'out="{out}" wait={PATIENCE}.0'
            flower.flwr("run", str(app), "loopback", "--run-config", config)

        def wait(until, name: str) -> None:
            wait_for(until, PATIENCE, name, flower.logs)

        link = flower.superlink()
        east = flower.supernode("east", nodes["east"])
        north = flower.supernode("north", nodes["north"])
        # A commit writes metrics.jsonl, clients.jsonl and the checkpoint: it stands still between
        # the first two while nobody reads this pipe.
        run()
        wait((out / "sites.json").exists, "the run has opened its files")
        os.mkfifo(out / "clients.jsonl")
        wait(lambda: len(written()) == 1, "the server saves round 1")
        flower.kill(link, "flwr-serverapp")
        assert not (out / "checkpoints").exists()
        (out / "clients.jsonl").unlink()

        run()
        wait(lambda: "round 2: north trains" in flower.log_of(north), "north trains in round 2")
        flower.kill(north)
        assert rounds_kept() == [1], "north was killed too late"
        wait(lambda: len(written()) == 2, "round 2 ends without north")
        assert written()[1]["participants"] == ["east"]
        (failure,) = written()[1]["failed"]
        assert failure["client_id"] == "north"
        assert re.search(GONE, failure["reason"]), failure

        wait(lambda: "round 3: east trains" in flower.log_of(east), "east trains in round 3")
        flower.kill(link)
        assert len(written()) == 2, "the server was killed too late"
        flower.superlink()
        flower.supernode("north", nodes["north"])
        run()
        wait((out / "finished").exists, "the run is finished")
    assert not flower.processes()
    execute(load_config(None, settings), tmp_path / "local", engine=WithoutNorth)
    for name in ("metrics.jsonl", "clients.jsonl"):
        found, wanted = (read_lines(place / name) for place in (out, tmp_path / "local"))
        for line in (*found, *wanted):
            line.pop("pooled_accuracy")
            line.pop("bytes_down", None)
            line["failed"] = [each["client_id"] for each in line.get("failed", [])]
        same_lines(found, wanted)
    assert rounds_kept() == [1, 3]
