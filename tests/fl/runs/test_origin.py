"""A resume goes on with what the run was started with, from anywhere, one process at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fedms.fl.cli import main
from fedms.fl.config import Config, load_config
from fedms.fl.journal.files import locked
from fedms.fl.journal.progress import Progress
from fedms.fl.runs.folder import resume, start
from fedms.fl.types import FedMSError

SHORT = ("stage1.rounds=2", "stage2.rounds=0", "eval.pooled_examples=5")


class StopAfter(Progress):
    """A progress that is told of so many rounds, then the run is over."""

    def __init__(self, rounds: int) -> None:
        super().__init__(quiet=True)
        self._left = rounds

    def scored(self, method, record, metric) -> None:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


@pytest.fixture
def place(tmp_path: Path, tiny_bert: Path, table: Path) -> Path:
    """A folder with a model and a table of its own."""
    shutil.copytree(tiny_bert, tmp_path / "model")
    shutil.copy(table, tmp_path / "notes.csv")
    return tmp_path


@pytest.fixture
def stopped(place: Path, config) -> Path:
    """A run in ``place / "run"`` that was stopped after its first of two rounds."""
    with suppress(KeyboardInterrupt):
        start(own(config, place), place / "run", StopAfter(1))
    return place / "run"


def own(config, place: Path) -> Config:
    sources = (f"data.source={place / 'notes.csv'}", f"model.path={place / 'model'}")
    return config(*SHORT, *sources)


def refused(folder: Path, quiet: Progress) -> str:
    before = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    with pytest.raises(FedMSError) as caught:
        resume(folder, quiet)
    assert before == sorted((p, p.read_bytes()) for p in folder.rglob("*") if p.is_file())
    return str(caught.value)


def more_rows_in_front(path: Path) -> str:
    header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([header, *rows[:30], *rows]), encoding="utf-8")
    return "notes.csv had 240 examples, has 270"


def another_order(path: Path) -> str:
    header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([header, *rows[4:], *rows[:4]]), encoding="utf-8")
    return "notes.csv has other examples, or has them in another order"


def another_label(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(",lung,", ",skin,", 1), encoding="utf-8")
    return "notes.csv has other labels"


@pytest.mark.parametrize("change", [more_rows_in_front, another_order, another_label])
def test_other_data_are_refused(place, stopped, quiet, change):
    said = change(place / "notes.csv")
    assert said in refused(stopped, quiet)


def test_another_model_is_refused_by_resume_and_predict(place, stopped, quiet, capsys):
    path = place / "model" / "model.safetensors"
    weights = load_file(path)
    name = "encoder.layer.2.output.dense.weight"
    weights[name] = weights[name] * 1.1
    save_file(weights, path, {"format": "pt"})
    assert "has other parameters" in refused(stopped, quiet)
    assert main(["predict", str(stopped), "--client", "client-00", "rash"]) == 2
    assert "is not the one that" in capsys.readouterr().err


def test_settings_that_decide_a_result_are_refused_by_name(stopped, quiet):
    path = stopped / "config.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("local_steps = 2", "local_steps = 3"), encoding="utf-8")
    said = refused(stopped, quiet)
    assert "stage1.local_steps was 2, is 3" in said
    assert "stage2.local_steps was 2, is 3" in said
    assert "notes.csv" not in said


def test_settings_that_decide_none_may_change(stopped, quiet):
    path = stopped / "config.toml"
    text = path.read_text(encoding="utf-8")
    assert "rivals = []" in text
    text = text.replace("quorum = 0.5", "quorum = 0.25").replace(
        "rivals = []", 'rivals = ["zero_shot"]'
    )
    path.write_text(text.replace("threads = 0", "threads = 1"), encoding="utf-8")
    resume(stopped, quiet)
    assert (stopped / "rivals" / "zero_shot" / "finished").exists()


def test_a_folder_without_a_record_is_not_trusted(stopped, quiet):
    (stopped / "origin.json").unlink()
    assert "has no origin.json" in refused(stopped, quiet)
    (stopped / "metrics.jsonl").unlink()
    shutil.rmtree(stopped / "checkpoints")
    resume(stopped, quiet)  # nothing had been trained: killed before the record was written
    assert json.loads((stopped / "origin.json").read_bytes())["examples"] == 240


def test_relative_files_are_found_from_another_folder(place, config, quiet, monkeypatch):
    """Data and model named by a relative path; resumed, and asked, from elsewhere."""
    monkeypatch.chdir(place)
    relative = own(config, Path())
    with suppress(KeyboardInterrupt):
        start(relative, place / "run", StopAfter(1))
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    resume(place / "run", quiet)
    assert (place / "run" / "finished").exists()
    assert load_config(place / "run" / "config.toml").data.source == str(place / "notes.csv")
    assert main(["predict", str(place / "run"), "--client", "client-00", "rash"]) == 0


# One process at a time ----------------------------------------------------------------------------


def test_a_folder_that_another_process_works_on_is_left_alone(stopped, config, quiet, tmp_path):
    with locked(stopped, pytest.fail):
        assert "another process works on" in refused(stopped, quiet)
    (tmp_path / "new").mkdir()
    with (
        locked(tmp_path / "new", pytest.fail),
        pytest.raises(FedMSError, match="another process works on"),
    ):
        start(config(*SHORT), tmp_path / "new", quiet)
    resume(stopped, quiet)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_ends_the_lock(tmp_path):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with locked(tmp_path, pytest.fail):
            os.write(writing, b".")
            signal.pause()
    os.read(reading, 1)
    try:
        with pytest.raises(FedMSError, match="another process"), locked(tmp_path, pytest.fail):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    with locked(tmp_path, pytest.fail):
        assert list(tmp_path.iterdir()) == []
