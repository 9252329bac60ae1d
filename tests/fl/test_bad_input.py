"""What a person can get wrong: exit status 2 and one sentence on stderr that names it."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest
from spy import Spy

from fedms.fl.cli import main
from fedms.fl.config import load_config
from fedms.fl.journal.progress import Progress
from fedms.fl.runs.folder import start
from fedms.fl.types import Failure, QuorumError


@pytest.fixture
def refused(settings, tmp_path, capsys):
    """``refused("key=value", names=[...])``: a run that must fail and say these words."""

    def run(*overrides: str, names: list[str], out: Path | None = None) -> str:
        folder = out or tmp_path / "run"
        assert main(["run", *settings, *overrides, "--out", str(folder), "--quiet"]) == 2
        text = capsys.readouterr().err
        assert text.startswith("fedms: ")
        assert text.count("\n") == 1, text
        for name in names:
            assert name in text
        return text

    return run


def copy_table(table: Path, to: Path, change) -> Path:
    """The table with ``change(number, row)`` made to every row; None leaves the row out."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = [change(i, row) for i, row in enumerate(csv.DictReader(file))]
    rows = [row for row in rows if row is not None]
    with to.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return to


# Settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("data.alpah=1", ["unknown setting data.alpah", "did you mean data.alpha?"]),
        ("stage1.rounds=many", ["stage1.rounds", "int", "'many'"]),
        ("mofm.combine=sum", ["mofm.combine", "probabilities", "'sum'"]),
        ("data.alpha=0", ["alpha", "above 0"]),
        ("data.alpha=-1", ["alpha", "above 0", "-1"]),
        ("data.num_clients=0", ["num_clients", "at least 1"]),
        ("data.num_clients=1000", ["1001 clients", "training examples"]),
        ("data.num_clients=100", ["clients", "min_partition_size"]),
        ("data.unseen_clients=-1", ["unseen_clients"]),
        ("data.train=0.9", ["fractions", "sum to 1"]),
        ("seed=-1", ["seed", "-1"]),
        ('lora.targets=["nothing"]', ["lora.targets", "'nothing'", "query"]),
        ("lora.r=999999", ["lora.r must be at most 32", "got 999999"]),
        ("model.path=/nowhere/at/all", ["model.path", "/nowhere/at/all"]),
        ("model.max_tokens=1000", ["model.max_tokens", "32"]),
        ("rounds", ["key=value", "'rounds'"]),
    ],
)
def test_settings(refused, override, names):
    refused(override, names=names)


def test_a_settings_file_that_is_not_there(capsys):
    assert main(["run", "nowhere.toml"]) == 2
    assert "nowhere.toml cannot be read: No such file" in capsys.readouterr().err


# Data ------------------------------------------------------------------------------------------


def test_no_table(refused, tmp_path):
    refused(f"data.source={tmp_path}/none.csv", names=["no such file", "none.csv"])


def test_a_missing_column_and_a_second_try_in_the_same_folder(refused, settings, tmp_path):
    refused("data.label_column=lable", names=["'lable'", "did you mean 'label'?", "notes.csv"])
    by_hospital = ("data.partitioner=column", "data.client_column=hospital")
    refused(*by_hospital, names=["'hospital'", "ward"])
    assert list((tmp_path / "run").iterdir()) == []
    right = ["run", *settings, "method=zero_shot", "--out", str(tmp_path / "run"), "--quiet"]
    assert main(right) == 0


def test_clients_by_column_without_a_column(refused):
    refused("data.partitioner=column", names=["'column'", "client column"])


def test_a_test_label_that_is_in_no_training_row(refused, table, tmp_path):
    def change(i: int, row: dict) -> dict:
        row["split"] = "test" if i % 4 == 0 else "train"
        if i == 8:
            row["label"] = "liver"
        return row

    path = copy_table(table, tmp_path / "t.csv", change)
    refused(
        f"data.source={path}", "data.split_column=split", names=["'liver' (1 rows)", "training row"]
    )


def test_a_client_with_one_row(refused, table, tmp_path):
    path = copy_table(
        table, tmp_path / "t.csv", lambda i, row: row | ({"ward": "attic"} if i == 5 else {})
    )
    by_ward = ("data.partitioner=column", "data.client_column=ward")
    names = ["'attic'", "at least 2 rows"]
    refused(f"data.source={path}", *by_ward, names=names)


def test_a_row_without_a_text(refused, table, tmp_path):
    path = copy_table(
        table, tmp_path / "t.csv", lambda i, row: row | ({"text": " "} if i == 6 else {})
    )
    refused(f"data.source={path}", names=["t.csv, row 7", "'text'"])


def test_a_client_with_a_single_class_is_legal(settings, table, tmp_path, read_lines):
    """One ward sees hearts alone, another has no gate or val examples."""

    def change(i: int, row: dict) -> dict | None:
        if row["ward"] == "north" and row["label"] != "heart":
            return None
        if row["ward"] == "south" and i > 16:
            return None
        return row

    path = copy_table(table, tmp_path / "t.csv", change)
    by_ward = ("data.partitioner=column", "data.client_column=ward", "data.unseen_clients=0")
    folder = tmp_path / "run"
    overrides = [f"data.source={path}", *by_ward]
    assert main(["run", *settings, *overrides, "--out", str(folder), "--quiet"]) == 0
    lines = read_lines(folder / "metrics.jsonl")
    assert [len(line["participants"]) for line in lines] == [4] * 4
    assert all(line["failed"] == [] for line in lines)
    assert lines[0]["unseen_accuracy"] is None


# Folders ---------------------------------------------------------------------------------------


def test_a_folder_that_holds_something(refused, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("dear to me")
    refused(names=[str(folder), "exists", "--out"], out=folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    refused(names=[str(folder / "thesis.tex"), "exists"], out=folder / "thesis.tex")
    assert (folder / "thesis.tex").read_text() == "dear to me"


def test_a_folder_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        names=[str(tmp_path / "file" / "run"), "cannot be written"], out=tmp_path / "file" / "run"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(names=["cannot be written: Permission denied"], out=tmp_path / "locked" / "run")


def test_an_empty_folder_is_taken(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    run = ["run", *settings, "method=zero_shot", "--quiet"]
    assert main([*run, "--out", str(tmp_path / "empty")]) == 0


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["run", *settings, "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.mark.parametrize("nth", [0, 1, 8, 19])
def test_a_full_disk(settings, whole, tmp_path, capsys, full_disk, read_lines, nth):
    """Whatever write it hits, one sentence; with room again, resume ends as if nothing had been."""
    folder = tmp_path / "run"
    with full_disk(nth):
        assert main(["run", *settings, "--out", str(folder), "--quiet"]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert str(folder) in text
    assert "cannot be written: No space left on device" in text
    if nth == 0:
        return  # not even the settings were written
    assert main(["resume", str(folder), "--quiet"]) == 0
    for name in ("metrics.jsonl", "clients.jsonl"):
        assert read_lines(folder / name) == read_lines(whole / name)


def test_a_disk_that_fills_while_adapters_are_exported(settings, tmp_path, capsys):
    """A folder stands where the file has to go: the export cannot write, and says so."""
    folder = tmp_path / "run"
    short = ["stage1.rounds=1", "stage2.rounds=0"]
    assert main(["run", *settings, *short, "--out", str(folder), "--quiet"]) == 0
    (folder / "finished").unlink()
    weights = folder / "adapters" / "global" / "adapter_model.safetensors"
    weights.unlink()
    weights.mkdir()
    capsys.readouterr()
    assert main(["resume", str(folder), "--quiet"]) == 2
    text = capsys.readouterr().err
    assert str(folder) in text
    assert "cannot be written" in text
    weights.rmdir()
    assert main(["resume", str(folder), "--quiet"]) == 0
    assert weights.is_file()


# Commands on a run -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["resume"], ["report"], ["predict", "--client", "x", "text"]])
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_a_run(tmp_path, capsys, command, there):
    folder = tmp_path / "other"
    if there:
        folder.mkdir()
        (folder / "a.txt").write_text("")
    name, *rest = command
    assert main([name, str(folder), *rest]) == 2
    text = capsys.readouterr().err
    assert text.startswith("fedms: ")
    assert str(folder) in text


def test_a_run_whose_settings_are_broken(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("seed = = 1")
    assert main(["resume", str(tmp_path)]) == 2
    assert "config.toml is not valid TOML" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["origin.json", "label_counts.json", "config.toml"])
@pytest.mark.parametrize("content", [None, "{}", '{"examples": 2', "old = true"])
def test_files_of_another_version(whole, tmp_path, capsys, name, content):
    """What cannot be read is named, whoever reads it; nothing is taken for granted."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert main(["predict", str(folder), "--client", "client-00", "rash"]) == 2
    assert name in capsys.readouterr().err
    if name == "origin.json" and content is not None:
        (folder / "finished").unlink()
        assert main(["resume", str(folder), "--quiet"]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("command", ["export", "report"])
def test_a_folder_that_cannot_be_written_any_more(whole, tmp_path, capsys, command):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "adapters" / "clients").write_text("in the way")
    (folder / "report.html").mkdir()
    client = ["client-00"] if command == "export" else []
    assert main([command, str(folder), *client]) == 2
    assert str(folder) in capsys.readouterr().err


def test_a_disk_without_room_for_an_export(whole, tmp_path, capsys, full_disk):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    with full_disk(1):
        assert main(["export", str(folder), "client-00"]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_bytes_that_are_no_text(whole, capsys):
    assert main(["predict", str(whole), "--client", "client-00", "caf\udce9"]) == 2
    assert r"a text must be UTF-8, got other bytes: 'caf\udce9'" in capsys.readouterr().err


def test_all_checkpoints_damaged(settings, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["run", *settings, "method=fedavg", "--out", str(folder), "--quiet"]) == 0
    (folder / "finished").unlink()
    for path in (folder / "checkpoints").iterdir():
        (path / "server.safetensors").write_bytes(b"?")
    capsys.readouterr()
    assert main(["resume", str(folder), "--quiet"]) == 2
    text = capsys.readouterr().err
    assert "round-0004" in text
    assert "round-0003" in text
    assert "no checkpoint in" in text


def test_predict_before_the_first_round_and_for_a_stranger(config, tmp_path, capsys):
    folder = tmp_path / "run"

    def nobody(*args) -> Spy:
        return Spy(*args, change=lambda order, found: Failure(found.client_id, "away"))

    with pytest.raises(QuorumError):
        start(config(), folder, Progress(quiet=True), engine=nobody)
    capsys.readouterr()
    assert main(["predict", str(folder), "--client", "client-00", "rash"]) == 2
    assert "no round" in capsys.readouterr().err
    assert load_config(folder / "config.toml").method == "fedms"
    assert main(["resume", str(folder), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["predict", str(folder), "--client", "client-99", "rash"]) == 2
    text = capsys.readouterr().err
    assert "no client 'client-99'" in text
    assert "client-00" in text
