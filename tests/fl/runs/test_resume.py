"""A run that was killed, at any moment and any number of times, ends as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedms.fl import round as engine
from fedms.fl.config import Config
from fedms.fl.runs import folder as experiment
from fedms.fl.runs.checkpoint import load_checkpoint
from fedms.fl.runs.folder import resume, start
from fedms.fl.runs.progress import Progress
from fedms.fl.runs.states import ClientStates

# Imports once, then forks a child for every leg of a run: one that nobody stops, then one that is
# killed a moment after so and so many visits. Prints how each leg ended and how many lines of
# metrics it left.
DRIVER = """
import json, os, signal, sys, time
import torch
import transformers.models.bert.modeling_bert
from fedms.fl.cli import main
from fedms.fl import round as local
import fedms.fl.runs.report, fedms.fl.runs.folder

torch.set_num_threads(1)
whole, stopped, settings, moments = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
real = local.visit

def leg(folder, visits, seconds):
    first = not os.path.exists(os.path.join(folder, "config.toml"))
    command = ["run", *settings, "--out", folder] if first else ["resume", folder]
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        local.visit = lambda *args: (os.write(writing, b"."), real(*args))[1]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main([*command, "--quiet"]))
    os.close(writing)
    while visits and os.read(reading, 1):
        visits -= 1
    if not visits:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    path = os.path.join(folder, "metrics.jsonl")
    lines = open(path).read().count("\\n") if os.path.exists(path) else 0
    print(json.dumps([status, lines]), flush=True)

leg(whole, -1, 0)
for visits, seconds in moments:
    leg(stopped, visits, seconds)
leg(stopped, -1, 0)
"""


def drive(whole: Path, stopped: Path, settings: list[str], moments: list) -> list[list[int]]:
    """For each leg how it ended (a wait status) and the lines of metrics after it."""
    arguments = [str(whole), str(stopped), json.dumps(settings), json.dumps(moments)]
    command = [sys.executable, "-c", DRIVER, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
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


def stop_at(monkeypatch, place: object, name: str, nth: int, *, after: bool = False) -> None:
    """The ``nth`` call of a function is the last thing that happens, before or after its work."""
    real, calls = getattr(place, name), iter(range(10_000))

    def stopping(*args, **kwargs):
        if next(calls) != nth:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(place, name, stopping)


@pytest.mark.parametrize(
    ("place", "name", "nth", "after"),
    [
        (engine, "save_checkpoint", 0, False),  # the first line is written, its checkpoint not
        (engine, "save_checkpoint", 2, False),  # the same in the first round of stage 2
        (engine, "save_checkpoint", 1, True),  # between the stages
        (engine, "save_checkpoint", 3, True),  # all rounds are done, nothing is exported
        (engine, "visit", 6, False),  # in the middle of a cohort
        (engine, "evaluate", 1, True),  # scored, not written
        (experiment, "export_common", 0, True),  # in the middle of the export
        (experiment, "replace_file", 0, False),  # config.toml and nothing more
    ],
)
def test_stops_at_chosen_moments(
    whole, tmp_path, quiet, monkeypatch, assert_same_run, place, name, nth, after
):
    settings, wanted = whole()
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at(patch, place, name, nth, after=after)
        with suppress(Killed):
            start(settings, folder, quiet)
    if (folder / "config.toml").exists():
        resume(folder, quiet)
    else:
        start(settings, folder, quiet)
    assert_same_run(folder, wanted)


def test_torn_last_lines(whole, tmp_path, quiet, monkeypatch, assert_same_run):
    settings, wanted = whole()
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at(patch, engine, "save_checkpoint", 2)
        with pytest.raises(Killed):
            start(settings, folder, quiet)
    for name, cut in (("metrics.jsonl", 40), ("clients.jsonl", 1)):
        text = (folder / name).read_text()
        (folder / name).write_text(text[:-cut])
    resume(folder, quiet)
    assert_same_run(folder, wanted)


@pytest.mark.parametrize(
    "file", ["checkpoints/round-0003/server.safetensors", "clients/*/client-02-*.3.*"]
)
def test_a_truncated_newest_checkpoint(whole, tmp_path, quiet, monkeypatch, assert_same_run, file):
    settings, wanted = whole()
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_at(patch, engine, "save_checkpoint", 2, after=True)
        with pytest.raises(Killed):
            start(settings, folder, quiet)
    path = next(iter(folder.glob(file)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    warnings: list[str] = []
    monkeypatch.setattr(quiet, "warn", warnings.append)
    resume(folder, quiet)
    assert [text.partition(" (")[0] for text in warnings] == ["checkpoint round-0003 is damaged"]
    assert_same_run(folder, wanted)


@pytest.mark.parametrize("rival", [1, 2])
def test_a_stop_within_a_rival(whole, tmp_path, quiet, monkeypatch, assert_same_run, rival):
    """fedavg_ft begins with fedavg's first stage; a resumed one has to train that itself."""
    settings, wanted = whole('rivals=["fedavg", "fedavg_ft"]', "method=local_only")
    folder = tmp_path / "stopped"
    checkpoints = 4 + (1 if rival == 1 else 4)
    with monkeypatch.context() as patch:
        stop_at(patch, engine, "save_checkpoint", checkpoints)
        with pytest.raises(Killed):
            start(settings, folder, quiet)
    resume(folder, quiet)
    assert_same_run(folder, wanted)
    for method in ("fedavg", "fedavg_ft"):
        assert (folder / "rivals" / method / "finished").exists()


def test_a_resumed_run_does_not_repeat_rounds_that_are_done(config, tmp_path, quiet, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, engine, "save_checkpoint", 2, after=True)
        with pytest.raises(Killed):
            start(config(), tmp_path / "r", quiet)
    rounds = []
    real = engine.visit

    def visit(model, stage, visits, server, round, seed):
        rounds.append(round)
        return real(model, stage, visits, server, round, seed)

    monkeypatch.setattr(engine, "visit", visit)
    resume(tmp_path / "r", quiet)
    assert rounds == [4] * 4


def test_the_order_of_waking_survives(whole, tmp_path, quiet, monkeypatch, assert_same_run):
    settings, wanted = whole(
        "sal.order=importance",
        "sal.max_blocks=3",
        "sal.queue_length=3",
        "sal.threshold=2",
        "stage1.rounds=4",
    )
    folder = tmp_path / "stopped"
    for checkpoint in (1, 0, 1):
        with monkeypatch.context() as patch:
            stop_at(patch, engine, "save_checkpoint", checkpoint, after=True)
            with pytest.raises(Killed):
                resume(folder, quiet) if folder.exists() else start(settings, folder, quiet)
    resume(folder, quiet)
    assert_same_run(folder, wanted)
