"""Flower's simulation runs the very apps of real sites: its results are the local engine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE

from fedms.fl.runs.folder import start

pytest.importorskip("ray")


def test_a_simulation_ends_with_the_metrics_of_the_local_engine(
    config, settings, tmp_path, quiet, read_lines, same_lines
):
    start(config(), tmp_path / "local", quiet)
    command = [Path(sys.executable).parent / "fedms", "run", *settings]
    simulated = subprocess.run(
        [*command, "engine.kind=flower-simulation", "--out", str(tmp_path / "flower")],
        capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads that wait for a core spin
    )  # fmt: skip
    assert simulated.returncode == 0, simulated.stderr[-4000:]
    for name in ("metrics.jsonl", "clients.jsonl"):
        same_lines(read_lines(tmp_path / "flower" / name), read_lines(tmp_path / "local" / name))
    adapters = [p.relative_to(tmp_path / "local") for p in (tmp_path / "local").rglob("adapter*")]
    assert adapters
    assert all((tmp_path / "flower" / adapter).exists() for adapter in adapters)
