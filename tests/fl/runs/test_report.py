"""The report of a run folder: numbers worked by hand, files whole, torn, missing and hostile."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import sys
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import pytest
from rich.console import Console
from rich.table import Table

from fedms.fl.algorithms import StageConfig
from fedms.fl.config import Config, to_toml
from fedms.fl.journal.records import RoundRecord, Spread
from fedms.fl.runs.report import comparison_table, read_clients, read_rounds, write_report
from fedms.fl.types import Failure, FedMSError

ALL = ["accuracy.png", "bytes.png", "clients.png", "labels.png", "blocks_and_gate.png"]


def spread(mean: float, worst10: float = 0.0) -> Spread:
    return Spread(mean, 0.05, worst10, 0.0, 2)


def record(round: int, own: Spread | None, **changes: object) -> RoundRecord:
    plain = RoundRecord(
        round=round,
        stage="stage1",
        seconds=60.0,
        participants=["a", "b"],
        failed=[],
        awake_blocks=[5],
        trainable_parameters=10,
        trainable_share=0.001,
        bytes_up=1_000_000,
        bytes_down=2_000_000,
        train_loss=1.0,
        global_accuracy=None,
        personalized_accuracy=own,
        pooled_accuracy=None,
        unseen_accuracy=None,
        gate_local_mean=None,
        peak_memory_mb=100.0,
    )
    return replace(plain, **changes)


def write(folder: Path, records: list[RoundRecord], clients: tuple[str, ...] = ("a", "b")) -> None:
    """What the engine leaves: metrics, and a line per client for each round that was scored."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(r)) + "\n" for r in records]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = []
    for r in records:
        for i, client_id in enumerate(clients if r.personalized_accuracy else ()):
            score = {
                "round": r.round, "stage": r.stage, "client_id": client_id, "seen": True,
                "num_test": 10, "accuracy": 0.5 + 0.1 * (i % 5), "pooled_accuracy": 0.4,
                "gate_local": 0.7 if r.stage == "stage2" else None,
            }  # fmt: skip
            lines.append(json.dumps(score) + "\n")
    (folder / "clients.jsonl").write_text("".join(lines), encoding="utf-8")


def labels(folder: Path, class_names: list[str], clients: list[str]) -> None:
    counts = [[(i + j) % 7 for j in range(len(class_names))] for i in range(len(clients))]
    found = {"class_names": class_names, "clients": clients, "counts": counts}
    (folder / "label_counts.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """FedMS through its 1 + 1 rounds; no rivals."""
    settings = StageConfig(rounds=1, local_steps=1)
    (tmp_path / "config.toml").write_text(
        to_toml(Config(stage1=settings, stage2=settings)), encoding="utf-8"
    )
    second = record(
        2, spread(0.8, 0.6), stage="stage2", seconds=65.0, awake_blocks=[4, 5],
        bytes_up=2_500_000, bytes_down=500_000, trainable_share=0.0025,
        pooled_accuracy=spread(0.5), gate_local_mean=0.7,
    )  # fmt: skip
    write(tmp_path, [record(1, spread(0.7, 0.5)), second])
    labels(tmp_path, ["x", "y", "z"], ["a", "b"])
    return tmp_path


def cells(table: Table) -> list[list[str]]:
    rows = zip(*(c.cells for c in table.columns), strict=True)
    return [[str(text) for text in row] for row in rows]


def bold(table: Table) -> list[list[str]]:
    """By row, the cells in bold."""
    rows = zip(*(c.cells for c in table.columns), strict=True)
    return [[str(text) for text in row if text.style == "bold"] for row in rows]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


# Reading ----------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(tmp_path):
    failed = record(1, spread(0.7, 0.5), failed=[Failure("b", "died")], unseen_accuracy=spread(0.1))
    nothing = record(2, None, train_loss=None)
    write(tmp_path, [failed, nothing])
    assert read_rounds(tmp_path) == [failed, nothing]
    assert [(c.round, c.client_id, c.accuracy) for c in read_clients(tmp_path)] == [
        (1, "a", 0.5),
        (1, "b", 0.6),
    ]


def test_a_torn_last_line_is_left_out_and_the_rest_is_read(run):
    for name in ("metrics.jsonl", "clients.jsonl"):
        with (run / name).open("a", encoding="utf-8") as file:
            file.write('{"round": 3, "stage": "sta')
    assert [r.round for r in read_rounds(run)] == [1, 2]
    assert len(read_clients(run)) == 4


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(run):
    path = run / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(FedMSError, match=r"metrics\.jsonl, line 1: not valid JSON"):
        read_rounds(run)
    path.write_text('{"round": 1}\n', encoding="utf-8")
    with pytest.raises(FedMSError, match="line 1: not a round"):
        read_rounds(run)


@pytest.mark.parametrize("act", [read_rounds, read_clients, write_report])
def test_a_folder_that_is_no_run(act, tmp_path):
    with pytest.raises(FedMSError, match=r"is not the folder of a run: \w+\.jsonl cannot be read"):
        act(tmp_path)


@pytest.mark.parametrize("text", ["", '{"round": 1, "sta'])
def test_a_run_without_a_round_yet(text, run):
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(FedMSError, match=r"metrics\.jsonl has no round yet"):
        read_rounds(run)


# The table --------------------------------------------------------------------------------------


def test_numbers_of_one_method(run):
    # MB up 1.0 + 2.5, MB down 2.0 + 0.5, 60 + 65 seconds, the larger share of the two rounds
    assert cells(comparison_table(run, title="t")) == [
        ["FedMS", "2", "80.0 ± 5.0", "60.0", "50.0", "–", "0.25", "3.5", "2.5", "125"]
    ]


def test_fedms_stands_first_and_the_others_by_accuracy(run):
    write(run / "rivals/zero_shot", [record(1, spread(0.9), stage="zero_shot")])
    write(run / "rivals/fedavg", [record(1, spread(0.1)), record(2, None)])
    write(run / "rivals/local_only", [record(1, spread(0.3)), record(2, spread(0.2))])
    write(run / "rivals/mine", [record(1, None)])
    names = [row[0] for row in cells(comparison_table(run, title="t"))]
    assert names == ["FedMS", "zero-shot", "local only", "FedAvg-LoRA", "mine"]


def test_the_best_of_each_accuracy_column_is_bold(run):
    rival = record(
        2, spread(0.85, 0.55), pooled_accuracy=spread(0.5), unseen_accuracy=spread(0.3), bytes_up=9
    )  # fmt: skip
    write(run / "rivals/local_only", [record(1, None), rival])
    assert bold(comparison_table(run, title="t")) == [
        ["60.0", "50.0"],
        ["85.0 ± 5.0", "50.0", "30.0"],
    ]


def test_the_last_round_that_was_scored_counts(run):
    write(run, [record(1, spread(0.7, 0.5)), record(2, None, stage="stage2")])
    assert cells(comparison_table(run, title="t"))[0][:4] == ["FedMS", "2", "70.0 ± 5.0", "50.0"]


def test_an_unfinished_rival_says_so_and_one_without_a_round_is_left_out(run):
    write(run / "rivals/fedavg_ft", [record(1, spread(0.6))])
    (run / "rivals/fedavg").mkdir()
    (run / "rivals/local_only").mkdir()
    (run / "rivals/local_only/metrics.jsonl").write_text('{"round": 1, "sta', encoding="utf-8")
    rows = cells(comparison_table(run, title="t"))
    assert [row[:2] for row in rows] == [
        ["FedMS", "2"],
        ["FedAvg-LoRA + fine-tuning (unfinished)", "1/2"],
    ]


def test_nothing_measured_is_a_dash(run):
    write(run, [record(1, None)])
    table = comparison_table(run, title="t")
    assert cells(table)[0][2:6] == ["–"] * 4
    assert bold(table) == [[]]


def test_eighty_columns_are_enough_and_the_title_stands_as_it_is(run):
    write(run / "rivals/fedavg_ft", [record(1, spread(0.6))])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(run, title="runs [bold]x[/bold]"))
    text = console.export_text()
    assert "runs [bold]x[/bold]" in text
    assert "…" not in text
    assert "(unfinished)" in text


# The files --------------------------------------------------------------------------------------


def test_all_files_are_written_and_the_page_holds_the_pictures(run):
    write(run / "rivals/zero_shot", [record(1, spread(0.4), trainable_parameters=0, bytes_up=0)])
    settings = dict(matplotlib.rcParams.copy())
    written = write_report(run)
    assert dict(matplotlib.rcParams.copy()) == settings  # a notebook's own are left alone
    assert [path.relative_to(run).as_posix() for path in written] == [*ALL, "report.html"]
    # inches times 130 dots
    assert png_size(run / "accuracy.png") == (1235, 598)
    assert png_size(run / "bytes.png") == (910, 624)
    assert png_size(run / "labels.png") == (845, 624)
    page = (run / "report.html").read_text(encoding="utf-8")
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(e) for e in embedded] == [(run / name).read_bytes() for name in ALL]
    assert "80.0 ± 5.0" in page
    assert "local_steps = 1" in page
    assert "<script" not in page


def test_names_are_escaped(run):
    evil = "<script>alert(1)</script>"
    dropped = record(1, spread(0.7), failed=[Failure("b", f"ValueError: {evil} & $x$")])
    write(run, [dropped], clients=(evil, "b"))
    labels(run, ["$\\frac$", "z" * 90, evil], [evil, "b"])
    write_report(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    # as a client, as the largest class of both, as the reason of a failure
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4


def test_one_round_and_little_known(run):
    (run / "label_counts.json").unlink()
    write(run, [record(1, None)])
    names = [path.name for path in write_report(run)]
    assert names == ["blocks_and_gate.png", "report.html"]


def test_a_method_that_trains_nothing_alone(run):
    (run / "config.toml").write_text(to_toml(Config(method="zero_shot")), encoding="utf-8")
    nothing = {"trainable_parameters": 0, "awake_blocks": [], "bytes_up": 0, "bytes_down": 0}
    alone = record(1, spread(0.4), **nothing)
    write(run, [alone])
    assert [path.name for path in write_report(run)] == [*ALL[:4], "report.html"]


def test_many_clients_long_names_and_scripts_without_a_font(run):
    clients = tuple(f"hospital number {i} of a long name" for i in range(200))
    write(run, read_rounds(run), clients=clients)
    labels(run, ["疾病", "Erkrankungen " * 9, *map(str, range(70))], list(clients))
    write_report(run)
    assert png_size(run / "labels.png") == (1820, 1430)


def test_without_matplotlib_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FedMSError, match=r'pip install "fedms\[demo\]"'):
        write_report(run)


def test_a_page_of_ten_thousand_clients_lists_the_lowest(run):
    """With a failure for each of them, and their classes: still a page to read."""
    names = tuple(f"client-{k:05d}" for k in range(10_000))
    failed = [Failure(name, "away") for name in names]
    write(run, [record(1, Spread(0.5, 0.1, 0.1, 0.0, 10_000), failed=failed)], names)
    lines = (run / "clients.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [json.loads(line) for line in lines]
    for k, score in enumerate(scores):
        score["accuracy"] = (k * 7919 % 10_000) / 10_000
    text = "".join(json.dumps(score) + "\n" for score in scores)
    (run / "clients.jsonl").write_text(text, encoding="utf-8")
    record_of = {"class_names": ["x", "y"], "clients": names, "counts": [[6, 6]] * 10_000}
    (run / "label_counts.json").write_text(json.dumps(record_of), encoding="utf-8")
    write_report(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "the lowest 250 of 10000 clients" in page
    assert "and 9750 more, in metrics.jsonl" in page
    assert "mean over 10000 clients" in page
    assert page.count("<tr>") < 300
    lowest = min(scores, key=lambda score: score["accuracy"])
    assert lowest["client_id"] in page
