"""The study: what it chooses, what it runs again, and the numbers that its report states."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import study
from study_cells import TASKS, Cell, Group, Task, overrides
from study_lines import Lines, append
from study_numbers import Study, balance, frontier, interval, own_at
from study_report import TABLES
from study_work import work

TINY = (
    "data.max_per_category=1", "data.num_clients=2", "data.unseen_clients=1",
    "data.min_partition_size=8", "stage1.rounds=1", "stage2.rounds=1", "stage1.local_steps=1",
    "stage2.local_steps=1", "stage1.batch_size=4", "stage2.batch_size=4", "sal.max_blocks=1",
    "model.dtype=float32", "eval.pooled_examples=20",
)  # fmt: skip


def scored(own: float, everyone: float, **more: object) -> dict:
    return {
        "own": own, "everyone": everyone, "worst10": own, "unseen": None, "global": None,
        "gate": None, "frontier": {}, "bytes_up": 10**6, "bytes_down": 10**6, "cpu_seconds": 2.0,
        "trained_share": 0.01, "scale": 1.0, "commit": "abc", **more,
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


def test_ranks_share_ties_and_leave_gaps_out(lines):
    write(
        lines,
        run_line("fedavg", 0.9, 0.5), run_line("ditto", 0.9, 0.4), run_line("fedprox", 0.1, 0.9),
        run_line("fedavg", 0.5, 0.5, seed=1), run_line("ditto", 0.6, 0.4, seed=1),
        run_line("fedprox", 0.7, 0.1, seed=1), run_line("fedms", 0.7, 0.1, seed=1),
    )  # fmt: skip
    found = Study(lines.runs())
    methods, blocks = found.complete()
    assert (methods, len(blocks)) == (["fedavg", "ditto", "fedprox"], 2)
    ranks = found.ranks(lambda line: line["own"])
    assert {m: r.mean for m, r in ranks.items()} == {
        "fedavg": 2.25, "ditto": 1.75, "fedprox": 2.0,
    }  # fmt: skip
    assert (ranks["fedprox"].low, ranks["fedprox"].high) == (1.0, 3.0)
    gain = found.difference(balance, "fedavg", "ditto")
    assert gain is not None
    assert gain.mean == pytest.approx(0.025)
    assert found.difference(balance, "fedavg", "nobody") is None
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_a_setting_compares_its_methods_over_the_same_seeds(lines):
    write(
        lines,
        *(run_line(m, 0.5, 0.5, seed) for m in ("fedavg", "ditto") for seed in (0, 1)),
        run_line("fedprox", 0.9, 0.9), run_line("fedms", 0.9, 0.9, seed=2),
        run_line("fedavg", 0.1, 0.1, seed=3, task="emoji", alpha="natural"),
    )  # fmt: skip
    found = Study(lines.runs())
    seeds = {m: [run["seed"] for run in found.of("icd10", "0.3", m)] for m in found.methods()}
    assert seeds == {"fedavg": [0, 1], "ditto": [0, 1], "fedprox": [], "fedms": []}
    assert [run["seed"] for run in found.of("emoji", "natural", "fedavg")] == [3]


def test_own_data_at_equal_everyones_lies_between_the_knobs():
    points = {"0.5": {"own": 0.8, "everyone": 0.6}, "-0.5": {"own": 0.4, "everyone": 0.7}}
    line = run_line("fedavg", 0.7, 0.7, frontier=points)
    curve = frontier([line])
    assert curve == [(-0.5, 0.7, 0.4), (0.0, 0.7, 0.7), (0.5, 0.6, 0.8)]
    assert own_at(curve, 0.65) == pytest.approx(0.75)
    assert own_at(curve, 0.6) == 0.8
    assert own_at(curve, 0.5) == 0.8
    assert own_at(curve, 0.71) is None


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
    assert 0 < first["cpu_seconds"] < 60
    assert tuned["cpu_seconds"] > 0
    found = Study(lines.runs())
    for table in TABLES.values():
        assert table(found, lines).startswith("| ")
