"""TensorBoard shows a run's rounds, each once, also of one that was killed and went on."""

from __future__ import annotations

import shutil
import sys

import pytest

from fedms.fl.engines.world import World
from fedms.fl.runs.method import run_method
from fedms.fl.types import ConfigError

TENSORBOARD = ("engine.tensorboard=true", "stage2.rounds=1")


def shown(folder) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, as TensorBoard reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_every_round_is_shown_once(config, world, tmp_path, quiet, read_lines):
    pytest.importorskip("tensorboard")
    settings = config(*TENSORBOARD)
    for done in (3, 2):  # the second run goes on after a kill in the last round
        run_method(settings, world, tmp_path, quiet)
        lines = read_lines(tmp_path / "metrics.jsonl")
        found = shown(tmp_path)
        assert [step for step, _ in found["train/loss"]] == [1, 2, 3], done
        for name, key in (("train/loss", "train_loss"), ("bytes/up", "bytes_up")):
            wanted = [pytest.approx(line[key], rel=1e-6) for line in lines]
            assert [value for _, value in found[name]] == wanted
        own = [pytest.approx(line["personalized_accuracy"]["mean"], rel=1e-6) for line in lines]
        assert [value for _, value in found["score/own"]] == own
        assert [step for step, _ in found["train/gate on local"]] == [3]
        shutil.rmtree(tmp_path / "checkpoints" / "round-0003")


def test_an_adopted_first_stage_is_shown_too(config, world, tmp_path, quiet):
    pytest.importorskip("tensorboard")
    for method in ("fedavg", "fedavg_ft"):
        folder = tmp_path / method
        folder.mkdir()
        run_method(config(*TENSORBOARD, f"method={method}"), world, folder, quiet)
        assert [step for step, _ in shown(folder)["train/loss"]] == [1, 2, 3]


def test_without_tensorboard_there_is_one_clear_error(
    config, world: World, tmp_path, quiet, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedms\[tensorboard\]'"):
        run_method(config(*TENSORBOARD), world, tmp_path, quiet)
