"""A run that was killed, at any moment and any number of times, ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from heard import Heard
from patience import PATIENCE
from safetensors.torch import load_file
from spy import Spy

from fedms.fl.config import Config
from fedms.fl.engines.local import LocalEngine
from fedms.fl.journal.checkpoint import load_checkpoint
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.runs.folder import resume, start

# Imports once, then forks a child for every leg of a run: one that nobody stops, then one that is
# killed a moment after so and so many visits. Prints how each leg ended and how many lines of
# metrics it left.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
import transformers.models.bert.modeling_bert
from fedms.fl.config import load_config
from fedms.fl.engines.local import LocalEngine
from fedms.fl.journal.progress import Progress
from fedms.fl.runs.folder import resume, start

torch.set_num_threads(1)
whole, stopped, settings, moments = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])

def leg(folder, visits, seconds):
    folder = Path(folder)
    reading, writing = os.pipe()

    class Telling(LocalEngine):
        def visit(self, *args):
            os.write(writing, b".")
            return super().visit(*args)

    child = os.fork()
    if not child:
        os.close(reading)
        if (folder / "config.toml").exists():
            resume(folder, Progress(quiet=True), engine=Telling)
        else:
            start(load_config(None, settings), folder, Progress(quiet=True), engine=Telling)
        os._exit(0)
    os.close(writing)
    while visits and os.read(reading, 1):
        visits -= 1
    if not visits:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    path = folder / "metrics.jsonl"
    print(json.dumps([status, path.read_text().count("\\n") if path.exists() else 0]), flush=True)

leg(whole, -1, 0)
for visits, seconds in moments:
    leg(stopped, visits, seconds)
leg(stopped, -1, 0)
"""


def drive(whole: Path, stopped: Path, settings: list[str], moments: list) -> list[list[int]]:
    """For each leg how it ended (a wait status) and the lines of metrics after it."""
    arguments = [str(whole), str(stopped), json.dumps(settings), json.dumps(moments)]
    command = [sys.executable, "-c", DRIVER, *arguments]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Everything that a run exported."""
    return {
        str(path.relative_to(folder)): load_file(path)
        for path in folder.rglob("*.safetensors")
        if "checkpoints" not in path.parts
    }


@pytest.fixture
def assert_same_run(read_lines):
    def check(found: Path, wanted: Path) -> None:
        assert (found / "finished").exists()
        places = [path.parent.relative_to(wanted) for path in wanted.rglob("metrics.jsonl")]
        for place in places:
            for name in ("metrics.jsonl", "clients.jsonl"):
                assert read_lines(found / place / name) == read_lines(wanted / place / name), place
            (one, ours), (other, theirs) = (
                (load_checkpoint(run / "checkpoints", states, pytest.fail), states)
                for run in (found / place, wanted / place)
                for states in (ClientStates(run / "clients"),)
            )
            assert one is not None
            assert other is not None
            assert (one.round, one.written, one.sal) == (other.round, other.written, other.sal)
            assert all(torch.equal(one.server[n], t) for n, t in other.server.items())
            for k in range(4):
                for round in (one.round - 1, one.round):
                    kept, same = (s.read(f"client-0{k}", round) or {} for s in (ours, theirs))
                    assert kept.keys() == same.keys()
                    assert all(torch.equal(kept[name], t) for name, t in same.items())
            files = [
                sorted(p.name for p in (r / place / "clients").rglob("*")) for r in (found, wanted)
            ]
            assert files[0] == files[1]
        ours, theirs = tensors(found), tensors(wanted)
        assert ours.keys() == theirs.keys()
        for path, state in theirs.items():
            assert all(torch.equal(ours[path][name], tensor) for name, tensor in state.items())

    return check


KILLED = (
    "stage1.rounds=3",
    "stage2.rounds=2",
    "sal.trigger=every",
    "sal.every=2",
    "lora.dropout=0.1",
    "server.fraction_train=0.75",
    'rivals=["fedavg", "fedavg_ft"]',
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    settings, tmp_path, assert_same_run
):
    """Five kills, each some visits and a moment of up to two visits' length later."""
    draw = random.Random(0)
    moments = [(draw.randint(3, 6), draw.uniform(0, 0.06)) for _ in range(5)]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    first, *killed, last = drive(whole, stopped, [*settings, *KILLED], moments)
    assert first == last == [0, 5]
    assert [status for status, _ in killed] == [signal.SIGKILL] * 5
    assert len({lines for _, lines in killed}) > 1, killed
    assert_same_run(stopped, whole)


# Chosen moments --------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the library catches it."""


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nobody stopped and its settings; made once for each of them."""
    made: dict[tuple[str, ...], tuple[Config, Path]] = {}

    def run(*overrides: str) -> tuple[Config, Path]:
        if overrides not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            start(config(*overrides), folder, Progress(quiet=True))
            made[overrides] = config(*overrides), folder
        return made[overrides]

    return run


class Stopping(LocalEngine):
    """The process ends before the first cohort that is visited after ``after`` others."""

    def __init__(self, *args, after: int) -> None:
        super().__init__(*args)
        self._left = after

    def visit(self, *args):
        self._left -= 1
        if self._left < 0:
            raise Killed
        return super().visit(*args)


class Unwritten(LocalEngine):
    """The process ends when the first round's scores are there."""

    def evaluate(self, order):
        super().evaluate(order)
        raise Killed


def at_visit(nth: int):
    return lambda *args: Stopping(*args, after=nth)


class AfterRound(Progress):
    """The process ends when so many rounds, counted over methods, have been committed."""

    def __init__(self, count: int) -> None:
        super().__init__(quiet=True)
        self._left = count

    def scored(self, *args) -> None:
        self._left -= 1
        if not self._left:
            raise Killed


def stopped_after(settings: Config, folder: Path, rounds: int, go_on: bool = False) -> None:
    """A run that ended with its process when so many rounds had been committed."""
    progress = AfterRound(rounds)
    with pytest.raises(Killed):
        resume(folder, progress) if go_on else start(settings, folder, progress)


def uncommitted(folder: Path) -> None:
    """As if the process had ended before the newest checkpoint was renamed."""
    shutil.rmtree(max((folder / "checkpoints").iterdir()))


@pytest.mark.parametrize("engine", [at_visit(0), at_visit(6), at_visit(12), Unwritten])
def test_stops_in_a_round(whole, tmp_path, quiet, assert_same_run, engine):
    settings, wanted = whole()
    folder = tmp_path / "stopped"
    with pytest.raises(Killed):
        start(settings, folder, quiet, engine=engine)
    resume(folder, quiet)
    assert_same_run(folder, wanted)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_stops_between_rounds(whole, tmp_path, quiet, assert_same_run, rounds, committed):
    """Lines are written before the checkpoint that makes them count."""
    settings, wanted = whole()
    folder = tmp_path / "stopped"
    stopped_after(settings, folder, rounds)
    if not committed:
        uncommitted(folder)
    resume(folder, quiet)
    assert_same_run(folder, wanted)


@pytest.mark.parametrize("left", [("config.toml",), ("config.toml", "origin.json")])
def test_stops_before_the_first_round(whole, tmp_path, quiet, assert_same_run, left):
    _, wanted = whole()
    folder = tmp_path / "stopped"
    folder.mkdir()
    for name in left:
        shutil.copy(wanted / name, folder)
    resume(folder, quiet)
    assert_same_run(folder, wanted)


def test_stops_in_the_export(whole, tmp_path, quiet, assert_same_run):
    _, wanted = whole()
    folder = shutil.copytree(wanted, tmp_path / "stopped")
    (folder / "finished").unlink()
    (folder / "gate.safetensors").unlink()
    path = folder / "adapters" / "global" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    resume(folder, quiet)
    assert_same_run(folder, wanted)


def test_torn_last_lines(whole, tmp_path, quiet, assert_same_run):
    settings, wanted = whole()
    folder = tmp_path / "stopped"
    stopped_after(settings, folder, 3)
    uncommitted(folder)
    for name, cut in (("metrics.jsonl", 40), ("clients.jsonl", 1)):
        text = (folder / name).read_text()
        (folder / name).write_text(text[:-cut])
    resume(folder, quiet)
    assert_same_run(folder, wanted)


@pytest.mark.parametrize(
    "file", ["checkpoints/round-0003/server.safetensors", "clients/*/client-02-*.3.*"]
)
def test_a_truncated_newest_checkpoint(whole, tmp_path, assert_same_run, file):
    settings, wanted = whole()
    folder, progress = tmp_path / "stopped", Heard()
    stopped_after(settings, folder, 3)
    path = next(iter(folder.glob(file)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    resume(folder, progress)
    said = [text.partition(" (")[0] for text in progress.warnings]
    assert said == ["checkpoint round-0003 is damaged"]
    assert_same_run(folder, wanted)


@pytest.mark.parametrize("rival", [1, 2])
def test_a_stop_within_a_rival(whole, tmp_path, quiet, assert_same_run, rival):
    """fedavg_ft begins with fedavg's first stage, also where another process has trained that."""
    settings, wanted = whole('rivals=["fedavg", "fedavg_ft"]', "method=local_only")
    folder = tmp_path / "stopped"
    stopped_after(settings, folder, 4 + (1 if rival == 1 else 5))
    resume(folder, quiet)
    assert_same_run(folder, wanted)
    for method in ("fedavg", "fedavg_ft"):
        assert (folder / "rivals" / method / "finished").exists()


def test_a_resumed_run_does_not_repeat_rounds_that_are_done(config, tmp_path, quiet):
    folder = tmp_path / "r"
    stopped_after(config(), folder, 3)
    made: list[Spy] = []

    def spy(*args) -> Spy:
        made.append(Spy(*args))
        return made[-1]

    resume(folder, quiet, engine=spy)
    assert [order.round for order in made[0].orders] == [4]


@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_clusters_survive(whole, tmp_path, quiet, assert_same_run, rounds):
    """Killed before they are made, after it, and after a newcomer has joined one."""
    settings, wanted = whole(
        "stage1.rounds=4",
        "stage2.rounds=1",
        "server.fraction_train=0.5",
        "mofm.clusters=2",
        "mofm.local_from=residual",
    )
    folder = tmp_path / "stopped"
    stopped_after(settings, folder, rounds)
    resume(folder, quiet)
    assert_same_run(folder, wanted)


def test_the_order_of_waking_survives(whole, tmp_path, quiet, assert_same_run):
    settings, wanted = whole(
        "sal.order=importance",
        "sal.max_blocks=3",
        "sal.queue_length=3",
        "sal.threshold=2",
        "stage1.rounds=4",
    )
    folder = tmp_path / "stopped"
    stopped_after(settings, folder, 2)
    for _ in range(2):
        stopped_after(settings, folder, 1, go_on=True)
    resume(folder, quiet)
    assert_same_run(folder, wanted)
