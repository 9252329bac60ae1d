"""The study: what it chooses, what it runs again, and the numbers that its report states."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import study
import study_work
from study_cells import TASKS, Cell, Group, Task, overrides
from study_lines import Lines, append
from study_report import TABLES, Study, write_report
from study_work import work

from fedms.fl.compare.result import Point
from fedms.fl.journal.progress import Progress
from fedms.fl.tasks.classify import ACCURACY

TINY = (
    "data.max_per_category=1", "data.num_clients=2", "data.unseen_clients=1",
    "data.min_partition_size=8", "stage1.rounds=1", "stage2.rounds=1", "stage1.local_steps=1",
    "stage2.local_steps=1", "stage1.batch_size=4", "stage2.batch_size=4", "sal.max_blocks=1",
    "model.dtype=float32", "eval.pooled_examples=20",
)  # fmt: skip


def scored(own: float, everyone: float, **more: object) -> dict:
    return {
        "own": own, "everyone": everyone, "worst10": own, "unseen": None, "global": None,
        "gate": None, "frontier": {}, "bytes_up": 10**6, "bytes_down": 10**6, "step_seconds": 2.0,
        "seconds": 9.0, "trained_share": 0.01, "scale": 1.0, "commit": "abc", **more,
    }  # fmt: skip


def run_line(method: str, own: float, everyone: float, seed: int = 0, **more: object) -> dict:
    place = {"kind": "run", "task": "icd10", "alpha": "0.3", "seed": seed, "method": method}
    return {**place, **scored(own, everyone, **more)}


@pytest.fixture
def lines(tmp_path) -> Lines:
    return Lines(tmp_path / "lines.jsonl")


def write(lines: Lines, *found: dict) -> None:
    for line in found:
        append(lines._path, line)


def test_rates_and_knob_are_chosen_on_validation_lines_alone(lines):
    assert lines.untried("icd10", "ditto") == [1.0, 0.5]
    place = {"kind": "choice", "task": "icd10", "alpha": "0.3", "seed": 0, "method": "ditto"}
    knobs = {"0.5": {"own": 0.9, "everyone": 0.5}, "-0.5": {"own": 0.5, "everyone": 0.8}}
    write(
        lines,
        {**place, **scored(0.7, 0.5, scale=1.0)},
        {**place, **scored(0.6, 0.7, scale=2.0, frontier=knobs)},
        run_line("ditto", 0.1, 0.1, scale=0.5),
    )
    assert lines.untried("icd10", "ditto") == [0.5]
    write(lines, {**place, **scored(0.8, 0.4, scale=0.5)})
    assert lines.untried("icd10", "ditto") == [4.0]  # the best is the greatest
    write(lines, {**place, **scored(0.2, 0.4, scale=4.0)})
    assert lines.untried("icd10", "ditto") == []
    assert lines.chosen("icd10", "ditto") == (2.0, 0.5)
    assert lines.chosen("icd10", "fedprox") == (1.0, 0.0)
    ((cell, scale),) = Group.of_runs([Cell("icd10", "0.1", 2, "ditto")], lines).cells
    assert scale == 2.0
    assert {"stage1.lr=0.012", "stage2.lr=0.004", "data.alpha=0.1", "seed=2"} <= {
        *overrides(cell, scale, "run")
    }


def test_every_row_has_its_settings_rounds():
    def rounds(task: str, method: str) -> list[str]:
        given = overrides(Cell(task, "0.3", 0, method), 1.0, "run")
        return [setting for setting in given if ".rounds=" in setting]

    assert rounds("icd10", "fedavg") == ["stage1.rounds=6", "stage2.rounds=3"]
    assert rounds("icd10", "fedavg_ft, late") == ["stage1.rounds=8", "stage2.rounds=1"]
    assert rounds("icd10-long", "fedavg_ft, late") == ["stage1.rounds=28", "stage2.rounds=2"]
    longer = rounds("icd10-long", "fedms, SAL at the bytes of no SAL")
    assert longer == ["stage1.rounds=28", "stage2.rounds=6"]


def test_an_ablation_takes_the_choice_of_its_method(lines):
    place = {"kind": "choice", "task": "icd10", "alpha": "0.3", "seed": 0, "method": "fedms"}
    write(lines, {**place, **scored(0.6, 0.7, scale=2.0)})
    for name in ("fedms, no SAL", "fedms, one half"):
        assert not lines.untried("icd10", name)
        assert lines.chosen("icd10", name).scale == 2.0


def test_what_has_a_line_is_not_run_again_and_the_last_line_counts(lines):
    write(lines, run_line("fedavg", 0.5, 0.5), run_line("fedavg", 0.6, 0.5))
    assert [line["own"] for line in lines.runs().values()] == [0.6]
    asked = ["--methods", "fedavg", "ditto", "--seeds", "0", "1", "--alphas", "0.3"]
    for more, expected in (([], 3), (["--again"], 4)):
        groups = study._left(study._parser().parse_args([*asked, *more]), lines)
        cells = [cell for group in groups for cell, _ in group.cells]
        assert len(cells) == expected
        assert (Cell("icd10", "0.3", 0, "fedavg") in cells) == bool(more)


def test_a_line_is_compared_as_what_it_says(lines):
    knobs = {"0.5": {"own": 0.8, "worst10": 0.7, "everyone": 0.6, "unseen": 0.1}}
    write(lines, run_line("fedms, late", 0.7, 0.5, 2, frontier=knobs, gate=0.4))
    study_ = Study.of(lines)
    ((block, runs),) = study_.comparison.blocks.items()
    assert block == ("icd10, alpha 0.3", 2)
    assert study_.places == {"icd10, alpha 0.3": ("icd10", "0.3")}
    run = runs["fedms, late"]
    assert (run.label, run.algorithm, run.metric.unit) == ("FedMS, late", "fedms", "%")
    assert run.scores == Point(0.7, 0.7, 0.5, None)
    assert run.at(0.5) == Point(0.8, 0.7, 0.6, 0.1)
    assert (run.sent, run.seconds, run.cpu_seconds, run.gate) == (2 * 10**6, None, 2.0, 0.4)


def test_the_page_keeps_its_words_and_gets_its_tables(lines, tmp_path):
    write(
        lines,
        *(run_line(m, 0.5, own, s) for s in (0, 1) for m, own in
          (("fedms, late", 0.6), ("fedavg", 0.7), ("fedavg_ft", 0.5))),
    )  # fmt: skip
    page = tmp_path / "page.md"
    places = "\n\n".join(f"{name} is\n<!-- {name} -->\nold\n<!-- end -->" for name in TABLES)
    page.write_text(places, "utf-8")
    written = write_report(lines, page)
    assert [path.name for path in written] == ["page.md", "frontier.png", "cost.png", "ranks.png"]
    text = page.read_text("utf-8")
    assert "old" not in text
    assert all(f"{name} is\n<!-- {name} -->\n| " in text for name in TABLES)
    difference = "| FedAvg-LoRA | 2 | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] | -10.0 [-10.0, -10.0]"
    assert difference in text
    write_report(lines, page)
    assert page.read_text("utf-8") == text
    page.write_text(text.replace("<!-- knobs -->", ""), "utf-8")
    with pytest.raises(SystemExit, match="no place for the table 'knobs'"):
        write_report(lines, page)


def test_what_a_step_costs_is_counted_without_frozen_states(monkeypatch):
    clock = iter([0.0, 2.0, 7.0, 8.0])  # the round begins, states from 2 to 7, the visit ends
    monkeypatch.setattr(study_work.time, "process_time", lambda: next(clock))
    backbone = SimpleNamespace(entering=lambda batch, depths: {})
    meter = study_work.Meter()
    meter.leave_out(backbone)
    meter.round("fedavg", "stage1", 1, 1, 1)
    assert backbone.entering(None, [3]) == {}
    meter.advance(1)
    record = SimpleNamespace(participants=("a",), failed=(), seconds=9.5)
    monkeypatch.setattr(Progress, "scored", lambda *_: None)  # says what the record holds
    meter.scored("fedavg", record, ACCURACY)
    assert meter.spent == {9.5: 3.0}


def test_cells_of_one_world_end_as_lines_that_their_folders_bear_out(lines, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", Task(TINY))
    cells = [Cell("tiny", "natural", 0, method) for method in ("fedavg", "no such", "fedavg_ft")]
    group = Group("run", [(cell, 1.0) for cell in cells])
    assert [line["method"] for line in work(group, tmp_path / "runs", "abc", lines._path)] == [
        "fedavg", "fedavg_ft"
    ]  # fmt: skip
    assert list(lines.runs()) == [cells[0], cells[2]]
    assert work(group, tmp_path / "runs", "abc", lines._path) == []  # has been done meanwhile
    tuned = lines.runs()[cells[2]]
    folder = tmp_path / "runs" / "tiny" / "natural" / "0" / "run" / "fedavg_ft-x1"
    clients = [json.loads(c) for c in (folder / "clients.jsonl").read_text().splitlines()][-3:]
    seen = [client["accuracy"] for client in clients if client["seen"]]
    assert tuned["own"] == pytest.approx(sum(seen) / 2, abs=1e-5)
    at_half = [client["by_prior"]["0.5"][1] for client in clients if client["seen"]]
    assert tuned["frontier"]["0.5"]["everyone"] == pytest.approx(sum(at_half) / 2, abs=1e-5)
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert tuned["bytes_up"] == sum(r["bytes_up"] for r in rounds)
    # its first stage is fedavg's, which it is charged for all the same
    first = lines.runs()[cells[0]]
    assert rounds[0] == json.loads(
        (folder.parent / "fedavg-x1" / "metrics.jsonl").read_text().splitlines()[0]
    )
    assert 0 < first["step_seconds"] < 60
    assert tuned["step_seconds"] > 0
    study_ = Study.of(lines)
    for table in TABLES.values():
        assert table(study_).startswith("| ")
