"""The GPU suite without a GPU: a whole rehearsal, resuming, the budget, what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

import gpu_suite  # noqa: E402
from gpu_cases import EXPERTS, RANKS, Case, matrix, rehearsal  # noqa: E402
from gpu_results import SECTIONS, Results  # noqa: E402
from gpu_rows import Row, problem, rows  # noqa: E402
from gpu_timing import Clock, measure  # noqa: E402
from gpu_worker import CUT, FINISHED, Worker  # noqa: E402

from fedms.kernels import tiles, triton  # noqa: E402

CPU = torch.device("cpu")
TRITON = ["triton"] * triton.available()


def suite(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH / "gpu_suite.py", "--rehearse", "--out", out, *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def read(out: Path) -> dict:
    return json.loads(out.read_text("utf-8"))


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, str]:
    """The file of a whole rehearsal, and what it printed."""
    out = tmp_path_factory.mktemp("rehearsal") / "suite.json"
    before = {path: path.read_bytes() for path in (BENCH / "results").iterdir()}
    done = suite(out)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in (BENCH / "results").iterdir()} == before
    return out, done.stdout


@pytest.mark.slow
def test_a_rehearsal_runs_every_section_and_marks_its_numbers(rehearsed):
    out, printed = rehearsed
    data = read(out)
    assert data["rehearsal"] is True
    assert data["packages"]["torch"] == torch.__version__
    assert {"device", "date", "driver", "cuda", "commit", "sources"} <= data.keys()
    assert {name: data["sections"][name]["state"] for name in SECTIONS} == dict.fromkeys(
        SECTIONS, "done"
    )
    assert data["sections"]["test"]["note"] == "3 passed, 0 failed, 0 skipped"
    assert not any(b["passed_on_device"] for b in data["sections"]["report"]["backends"].values())
    assert {t["verdict"] for t in data["sections"]["report"]["targets"]} == {"not measured"}
    lines = printed.splitlines()
    assert lines[-1] == f"written to {out}"
    assert any(line.startswith("REHEARSAL") for line in lines)
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_every_row_of_a_rehearsal_was_checked_and_timed(rehearsed):
    items = read(rehearsed[0])["sections"]["time"]["items"]
    assert list(items) == ["ceilings", *map(str, rehearsal())]
    assert all(value > 0 for value in items.pop("ceilings").values())
    for result in items.values():
        assert result["truth"] == "float64"
        kinds = {"frozen", "peft bf16", "stacked", result["default"], *TRITON}
        assert kinds <= result["rows"].keys()
        for name, row in result["rows"].items():
            if name.endswith("(graph)"):
                assert row == {"refused": "RuntimeError: CUDA graphs need a GPU"}
                continue
            unmasked = "dropout" in result["case"] and name.startswith("peft")
            assert row["checked"] == ("without dropout" if unmasked else "yes")
            for part in ("forward", "backward", "both"):
                spread = row[part]["us"]
                assert 0 < spread["q1"] <= spread["median"] <= spread["q3"]
            assert row["launches"] > 0
        assert result["rows"]["frozen"]["both"]["over_frozen"]["median"] == 1.0
    first = items[str(rehearsal()[0])]["rows"]
    # x [17, 48] and h [17, 32] in bf16, gates [17, 2] in fp32; peft keeps more
    assert first["stacked"]["saved_bytes"] == 17 * (2 * 48 + 2 * 32 + 4 * 2)
    assert first["peft bf16"]["saved_bytes"] > first["stacked"]["saved_bytes"]
    assert first["frozen"]["saved_bytes"] == 0


@pytest.mark.slow
def test_a_rehearsal_tunes_a_table_that_the_plan_can_read(rehearsed):
    out = rehearsed[0]
    plan = out.with_name("suite-plan.json")
    table = tiles.parse(plan.read_text("utf-8"), str(plan))
    (attempted,) = read(out)["sections"]["tune"]["items"].values()
    assert len(table) == 1
    assert all(choice.measured for choice in table.values())
    timed = {a["what"] for a in attempted["attempts"] if a["microseconds"] is not None}
    assert "stacked" in timed
    assert any(what.startswith("triton") for what in timed) == triton.available()


@pytest.mark.slow
def test_a_second_start_skips_and_only_runs_again(rehearsed, tmp_path):
    out = tmp_path / "suite.json"
    out.write_bytes(rehearsed[0].read_bytes())
    before = read(out)["sections"]
    again = suite(out)
    assert again.stdout.count("finished before") == len(SECTIONS) - 1
    assert all(read(out)["sections"][name] == before[name] for name in SECTIONS[:-1])
    only = suite(out, "--only", "test")
    assert only.stdout.count("not asked for") == len(SECTIONS) - 2
    after = read(out)["sections"]
    assert after["test"]["seconds"] != before["test"]["seconds"]
    assert all(after[name] == before[name] for name in ("build", "sanitize", "tune", "time"))

    stale = read(out)
    for section in stale["sections"].values():
        section["sources"] = "of last week"
    out.write_text(json.dumps(stale), "utf-8")
    assert "finished before" not in suite(out, "--minutes", "0").stdout


@pytest.mark.slow
def test_the_budget_stops_early_and_says_what_is_left_out(rehearsed, tmp_path):
    out = tmp_path / "none.json"
    done = suite(out, "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert read(out)["left_out"] == {"sections": list(SECTIONS[:-1])}
    assert "left out of sections: 5, first build; test; sanitize" in done.stdout

    out = tmp_path / "some.json"
    out.write_bytes(rehearsed[0].read_bytes())
    done = suite(out, "--only", "time", "--minutes", "0.05")
    data = read(out)
    assert data["sections"]["time"]["state"] == "cut"
    named = [*data["sections"]["time"]["items"], *data["left_out"]["time"]]
    assert data["left_out"]["time"]
    assert named == ["ceilings", *map(str, rehearsal())]
    assert f"left out of time: {len(data['left_out']['time'])}" in done.stdout


def test_a_wrong_result_is_refused_and_not_timed():
    case = replace(rehearsal()[0], graphs=False, compiled=False)
    whole = problem(case, CPU)
    found = {n: r for n, r in rows(case, whole).items() if n in ("frozen", "stacked", "peft bf16")}
    right = found["stacked"].forward

    def one_wrong_row():
        y = right()
        return torch.cat([y[:-1], y[-1:].roll(1, dims=1)])

    def no_gradient_of_gates():
        still = replace(whole, gates=whole.gates.detach())
        return still.fedms("stacked")() + 0 * whole.gates.sum()

    def raises():
        raise RuntimeError("no such kernel\nand more")

    found |= {
        "wrong row": Row(whole, one_wrong_row),
        "wrong gradient": Row(whole, no_gradient_of_gates),
        "not finite": Row(whole, lambda: right() * float("nan")),
        "broken": Row(whole, raises),
    }
    result = measure(case, found, Clock(CPU), 0.01)["rows"]
    assert {name for name, row in result.items() if "both" in row} == {
        "frozen", "stacked", "peft bf16",
    }  # fmt: skip
    assert result["wrong row"].keys() == {"refused"}
    assert "output 0" in result["wrong row"]["refused"]
    assert "output 2 is off by 1.0e+00" in result["wrong gradient"]["refused"]
    assert "off by nan" in result["not finite"]["refused"]
    assert result["broken"] == {"refused": "RuntimeError: no such kernel"}


def test_one_wrong_row_among_thousands_is_refused():
    """Over the whole output it is within the bound; over its own row it is not."""
    case = Case("", 40000, 16, 16, r=4)
    whole = problem(case, CPU)

    def one_wrong_row():
        y = whole.fedms("stacked")()
        return torch.cat([y[:-1], -y[-1:]])

    found = {"frozen": rows(case, whole)["frozen"], "wrong": Row(whole, one_wrong_row)}
    assert "a row of output 0" in measure(case, found, Clock(CPU), 0.01)["rows"]["wrong"]["refused"]


def test_nothing_is_timed_without_a_right_floor():
    case = replace(rehearsal()[0], graphs=False, compiled=False)
    whole = problem(case, CPU)
    found = {n: r for n, r in rows(case, whole).items() if n in ("frozen", "stacked")}
    floor = found["frozen"]
    found["frozen"] = Row(floor.problem, lambda: 2 * floor.forward())
    result = measure(case, found, Clock(CPU), 0.01)["rows"]
    assert "refused" in result["frozen"]
    assert result["stacked"] == {"checked": "yes"}


def test_a_worker_goes_on_behind_an_item_that_took_its_process_along(tmp_path):
    results = Results(tmp_path / "r.json")
    section = results.section("time")
    section |= {"items": {"a": {"rows": {}}}, "running": "b"}
    ran = []

    def item(name):
        def work():
            ran.append(name)
            assert Results(results.path).section("time")["running"] == name
            if name == "c":
                raise RuntimeError("out of something")
            return {"rows": {}}

        return work

    todo = {name: item(name) for name in "abcd"}
    assert Worker(results, "time", time.time() - 1, CPU).run(todo) == CUT
    assert Results(results.path).section("time")["left_out"] == ["c", "d"]
    assert Worker(results, "time", time.time() + 60, CPU).run(todo) == FINISHED
    assert ran == ["c", "d"]
    stored = Results(results.path).section("time")
    assert stored["items"]["b"] == {"refused": "the process died in it or it took too long"}
    assert stored["items"]["c"] == {"refused": "RuntimeError: out of something"}
    assert stored["left_out"] == []
    assert "running" not in stored


HANGS = """
import sys, time, torch
from pathlib import Path
from gpu_results import Results
from gpu_worker import Worker
worker = Worker(Results(Path(sys.argv[1])), "time", time.time() + 60, torch.device("cpu"))
worker.limit = 1
sys.exit(worker.run({"hangs": lambda: time.sleep(30), "after it": lambda: {"rows": {}}}))
"""


@pytest.mark.slow
def test_an_item_that_hangs_costs_its_process_and_nothing_else(tmp_path):
    words = [sys.executable, "-c", HANGS, str(tmp_path / "r.json")]
    assert subprocess.run(words, cwd=BENCH, check=False).returncode == -signal.SIGALRM
    assert subprocess.run(words, cwd=BENCH, check=False).returncode == FINISHED
    assert Results(tmp_path / "r.json").section("time")["items"] == {
        "hangs": {"refused": "the process died in it or it took too long"},
        "after it": {"rows": {}},
    }


def test_the_matrix_is_whole_and_begins_with_what_counts():
    cases = matrix()
    names = [str(c) for c in cases]
    assert len(set(names)) == len(names)
    assert names[0] == "ViT-B/16 6304x768x768 r16 E2"
    assert all((c.r, c.experts, c.dropout_p) == (16, 2, 0.0) for c in cases[:20])
    shapes = {(c.model, c.k, c.n) for c in cases}
    plain = {(c.model, c.k, c.n, c.r, c.experts, c.dropout_p) for c in cases if not c.top_k}
    assert len(shapes) == 20
    for shape in shapes:
        for r in RANKS:
            assert {(*shape, r, e, p) for e in EXPERTS for p in (0.0, 0.1)} <= plain


def test_only_rows_of_backends_that_passed_are_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    shapes = [tiles.Shape("a GPU", "bfloat16", "bfloat16", 16, 64, 64 * n, 16) for n in (1, 2)]
    chosen = [
        replace(tiles.heuristic(s), backend=b)
        for s, b in zip(shapes, ("triton", "cuda"), strict=True)
    ]
    plan = tmp_path / "tuned.json"
    tiles.save(dict(zip(shapes, chosen, strict=True)), plan)
    backends = {"triton": {"passed_on_device": True}, "cuda": {"passed_on_device": False}}
    results = Results(tmp_path / "r.json")
    gpu_suite._install(gpu_suite.Suite(results, plan, False, {}), backends)
    installed = tmp_path / "fedms/kernels/plan.json"
    assert tiles.parse(installed.read_text("utf-8"), "") == {shapes[0]: chosen[0]}
    installed.unlink()
    gpu_suite._install(gpu_suite.Suite(results, plan, True, {}), backends)
    assert not installed.exists()


def test_failures_and_errors_of_tests_both_count():
    report = """<testsuite><testcase/><testcase><failure/></testcase><testcase><error/></testcase>
        <testcase><skipped/></testcase></testsuite>"""
    counts = gpu_suite._count(list(ElementTree.fromstring(report)))
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "built"], "got 'built'"),
        (["--out", str(BENCH / "results" / "x.json")], "a rehearsal must not write into"),
    ],
    ids=["section", "results"],
)
def test_arguments_that_cannot_be_meant(words, said, tmp_path):
    done = suite(tmp_path / "x.json", *words)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_file_of_a_real_run_takes_no_rehearsal(tmp_path):
    out = tmp_path / "h100.json"
    out.write_text(json.dumps({"rehearsal": False, "sections": {}, "left_out": {}}), "utf-8")
    done = suite(out)
    assert done.returncode == 1
    assert "--out must name a file of this rehearsal (True), got one of False" in done.stderr
