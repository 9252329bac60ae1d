"""Flower's real processes on the loopback address, with TLS and authenticated SuperNodes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from patience import PATIENCE

from fedms.fl.cli import main
from fedms.fl.config import load_config
from fedms.fl.runs.folder import start

pytest.importorskip("flwr")

from certificates import Certificates
from loopback import Loopback, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

SETTINGS = (
    "data.num_clients=2", "data.unseen_clients=0", "stage1.rounds=1", "stage2.rounds=1",
    "sal.trigger=all_at_once", "eval.every=9", f"engine.deadline={PATIENCE}",
)  # fmt: skip


@pytest.mark.slow
def test_two_sites_end_as_the_local_engine(wards, tmp_path, quiet, read_lines, same_lines):
    """Both stages, exports on the sites, metrics at the server; an unknown key is turned away."""
    two = wards.only("east", "north")
    start(load_config(None, [*two.settings, *SETTINGS]), tmp_path / "local", quiet)
    app, out = tmp_path / "hospitals", tmp_path / "server"
    assert main(["flower", "new", str(app), *two.settings, *SETTINGS]) == 0
    nodes = two.nodes(tmp_path / "sites")
    with Loopback(tmp_path / "flower", Certificates(tmp_path / "keys")) as flower:
        flower.superlink()
        flower.supernode("east", nodes["east"])
        flower.supernode("north", nodes["north"])
        stranger = flower.supernode("stranger", nodes["east"], registered=False)
        flower.flwr("run", str(app), "loopback", "--run-config", f'out="{out}" wait={PATIENCE}.0')
        wait_for((out / "finished").exists, PATIENCE, "the run is finished", flower.logs)
        assert "Failed to activate SuperNode" in flower.log_of(stranger)
    assert not flower.processes()
    for name in ("metrics.jsonl", "clients.jsonl"):
        found, wanted = (read_lines(place / name) for place in (out, tmp_path / "local"))
        for line in (*found, *wanted):
            line.pop("pooled_accuracy")
            line.pop("bytes_down", None)
        same_lines(found, wanted)
    assert (out / "adapters" / "global" / "adapter_model.safetensors").is_file()
    for ward, node in nodes.items():
        (adapters,) = Path(str(node["folder"])).glob("*/adapters")
        assert (adapters / "local" / "adapter_model.safetensors").is_file(), ward
