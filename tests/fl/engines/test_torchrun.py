"""Ranks share the clients: their number does not show, and one that dies ends all with one word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE
from ranks import run_ranks
from safetensors.torch import load_file

from fedms.fl.config import load_config
from fedms.fl.journal.progress import Progress
from fedms.fl.runs.folder import resume, start
from fedms.fl.runs.ranks import on_all_ranks

SETTINGS = (
    "sal.order=importance",
    "sal.scope=client",
    "sal.trigger=capability_queue",
    "sal.threshold=2",
    "sal.queue_length=3",
    "sal.max_blocks=3",
    "lora.dropout=0.1",
    'rivals=["fedavg", "fedex_lora", "local_only"]',
    "model.dtype=float64",
)


def carry_out(settings: list[str], folder: str) -> bool:
    config = load_config(None, settings)
    quiet = Progress(quiet=True)
    return on_all_ranks(config, lambda engine: start(config, Path(folder), quiet, engine=engine))


def numbers(folder: Path) -> dict[str, float]:
    """Every number that a run wrote, by where it stands."""
    found: dict[str, float] = {}

    def walk(value, at: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{at}/{key}")
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                walk(inner, f"{at}/{i}")
        elif not isinstance(value, str | None) and not at.endswith(("seconds", "memory_mb")):
            found[at] = float(value)

    for path in folder.rglob("*.jsonl"):
        walk([*map(json.loads, path.read_text().splitlines())], str(path.relative_to(folder)))
    for path in folder.rglob("state.json"):  # SAL's scores are in it
        walk(json.loads(path.read_text()), str(path.relative_to(folder)))
    for path in folder.rglob("*.safetensors"):
        at = str(path.relative_to(folder)).rpartition(".")[0]
        at = at.rpartition(".")[0] if "clients" in path.parts else at  # less the digest
        for name, tensor in load_file(path).items():
            found |= {f"{at}/{name}/{i}": v for i, v in enumerate(tensor.flatten().tolist())}
    return found


def test_one_two_and_four_ranks_end_alike(settings, tmp_path):
    settings = [*settings, *SETTINGS]
    start(load_config(None, settings), tmp_path / "1", Progress(quiet=True))
    wanted = numbers(tmp_path / "1")
    assert len(wanted) > 10_000
    for ranks in (2, 4):
        folder = tmp_path / str(ranks)
        here = run_ranks(carry_out, settings, str(folder), ranks=ranks)
        assert here == [True] + [False] * (ranks - 1)
        found = numbers(folder)
        assert found.keys() == wanted.keys()
        assert max(abs(found[at] - value) for at, value in wanted.items()) < 1e-9


def test_clusters_of_clients_on_two_ranks(settings, tmp_path):
    settings = [*settings, "mofm.clusters=2", "mofm.cluster_rounds=1", "model.dtype=float64"]
    start(load_config(None, settings), tmp_path / "1", Progress(quiet=True))
    run_ranks(carry_out, settings, str(tmp_path / "2"), ranks=2)
    wanted, found = numbers(tmp_path / "1"), numbers(tmp_path / "2")
    assert any("/clusters.client-00" in at for at in wanted)
    assert found.keys() == wanted.keys()
    assert max(abs(found[at] - value) for at, value in wanted.items()) < 1e-9


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), "-m", "fedms", *arguments,
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # not in the checkout, whose package has no compiled module
    return subprocess.Popen(command, text=True, cwd="/", start_new_session=True, **pipes)


def children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(number) for number in text.split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_rank_that_dies_ends_all_with_one_sentence_and_the_run_goes_on(
    settings, config, tmp_path, read_lines
):
    """By the real torchrun; resumed in one process."""
    folder, many = tmp_path / "run", ("stage1.rounds=40", "stage2.rounds=1", "eval.every=100")
    process = torchrun("run", *settings, *many, "--out", str(folder), "--quiet")
    try:
        until = time.monotonic() + 900
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(max(children(process.pid)), signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode
    ours = [line for line in said.splitlines() if line.startswith("fedms: ")]
    assert len(ours) == 1, said
    assert "has ended" in ours[0]
    assert "`fedms resume` goes on from the last finished round" in ours[0]
    done = len(read_lines(folder / "metrics.jsonl"))
    assert 0 < done < 41
    resume(folder, Progress(quiet=True))
    assert [line["round"] for line in read_lines(folder / "metrics.jsonl")] == [*range(1, 42)]


def test_a_mistake_is_told_once(settings, tmp_path):
    process = torchrun("run", *settings, "data.label_column=lable", "--out", str(tmp_path / "run"))
    _, said = process.communicate(timeout=PATIENCE)
    ours = [line for line in said.splitlines() if line.startswith("fedms: ")]
    assert len(ours) == 1, said
    assert "'lable'" in ours[0]
