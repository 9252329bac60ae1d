"""The two visits to a GPU without one: rehearsals, what ends an item, verdicts, targets."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

import gpu_report  # noqa: E402
import gpu_suite  # noqa: E402
import gpu_visit  # noqa: E402
from gpu_sections import by_backend, seconds_a_round  # noqa: E402
from gpu_visit import Visit, why_not_installed  # noqa: E402
from timing import Clock  # noqa: E402

from fedms.kernels import native, tiles, triton  # noqa: E402

CPU = torch.device("cpu")


def rehearse(script: str, out: Path) -> tuple[dict, str]:
    done = subprocess.run(
        [sys.executable, BENCH / script, "--rehearse", "--out", out],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text("utf-8")), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not triton.available(), reason="triton is not installed")
@pytest.mark.parametrize("script", ["gpu_first.py", "gpu_suite.py"])
def test_a_rehearsal_runs_every_item(script, tmp_path):
    data, printed = rehearse(script, tmp_path)
    items = data["items"]
    assert data["rehearsal"] is True
    assert not data["left_out"]
    assert {name: item["refused"] for name, item in items.items() if "refused" in item} == {}
    assert all(f"] {name}: " in printed for name in items)
    timed = {name: item for name, item in items.items() if name.startswith("time ")}
    for name, item in timed.items():
        assert item["truth"] == "float64"
        for row, cell in item["rows"].items():
            assert "refused" not in cell, (name, row)
            unmasked = "p=0.1" in name and row.startswith("peft")
            assert cell["checked"] == ("without dropout" if unmasked else "yes")
            spread = cell["both"]["us"]
            assert 0 < spread["q1"] <= spread["median"] <= spread["q3"]
        assert {"frozen", "frozen (graph)", "triton", "triton (graph)"} <= item["rows"].keys()
    if script == "gpu_suite.py":
        rounds = items["federated round"]["rounds"]
        assert {s: len(spans) for s, spans in rounds.items()} == {"1": 1, "8": 1, "32": 1}
    assert gpu_report.standing(items)["triton bf16"]["passed"]
    assert not (tmp_path / "plan.json").exists()
    lines = list(gpu_report.lines(data))
    assert lines[0].startswith("REHEARSAL")
    assert sum("not measured" in line for line in lines) == len(gpu_report.TARGETS) + 1
    gpu_report.picture(data, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def visit(tmp_path: Path, seconds: float = 60.0) -> Visit:
    return Visit(tmp_path, seconds, CPU, Clock(), tiny=True)


def stored(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "results.json").read_text("utf-8"))


def test_an_item_that_raises_is_refused_and_the_next_one_runs(tmp_path):
    v = visit(tmp_path)

    def raises():
        raise RuntimeError("out of something\nand more")

    def looks():
        before = stored(tmp_path)
        assert before["running"] == "second"
        assert before["items"]["first"]["refused"] == "RuntimeError: out of something"
        return {"line": "seen"}

    v.item("first", raises)
    v.item("second", looks)
    data = stored(tmp_path)
    assert data["items"]["second"]["line"] == "seen"
    assert "running" not in data
    assert not v.lost


def test_what_the_time_does_not_reach_is_left_out_by_name(tmp_path):
    v = visit(tmp_path, 0.0)
    assert v.item("late", dict) is None
    assert stored(tmp_path)["left_out"] == ["late"]


def test_after_a_lost_device_only_other_processes_run(tmp_path):
    v = visit(tmp_path)
    v.device = torch.device("meta")  # reading a number back from it raises, as on a lost device
    v.item("crash", lambda: 1 // 0)
    v.item("next", dict)
    v.item("tests", lambda: {"line": "ran"}, apart=True)
    data = stored(tmp_path)
    assert data["items"]["crash"]["lost"]
    assert data["left_out"] == ["next"]
    assert data["items"]["tests"]["line"] == "ran"


def test_a_second_start_runs_what_is_missing_and_names_what_ended_the_first(tmp_path):
    first = visit(tmp_path)
    first.item("done", lambda: {"line": "first"})
    first.data |= {"running": "hung", "left_out": ["missing"]}
    first.write()
    second = visit(tmp_path)
    ran = []
    for name in ("done", "hung", "missing"):
        second.item(name, lambda n=name: {"line": ran.append(n)})
    data = stored(tmp_path)
    assert ran == ["missing"]
    assert data["items"]["done"]["line"] == "first"
    assert data["items"]["hung"] == {"refused": "the process ended in it"}
    assert data["left_out"] == []


def test_a_device_lost_in_an_item_that_kept_its_errors_is_noticed(tmp_path):
    """As in a sweep, which lists what each tile raised and goes on."""
    v = visit(tmp_path)
    v.device = torch.device("meta")
    v.item("sweep", lambda: {"wrong": {"tile": "CUDA error"}})
    assert v.lost == "sweep"


HANGS = """
import sys, time, torch
from pathlib import Path
from gpu_visit import Visit
from timing import Clock
visit = Visit(Path(sys.argv[1]), 60.0, torch.device("cpu"), Clock(), tiny=True)
visit.limit = 0.5
visit.item("quick", dict)
visit.item("hangs", lambda: time.sleep(30))
"""


@pytest.mark.slow
def test_an_item_that_hangs_ends_the_process_and_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], cwd=BENCH, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "<lambda>" in done.stderr
    assert stored(tmp_path)["running"] == "hangs"
    assert "quick" in stored(tmp_path)["items"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_source_folders_package_is_refused(tmp_path):
    checkout, elsewhere = tmp_path / "repo", tmp_path / "site-packages/fedms/__init__.py"
    inside = checkout / "fedms/__init__.py"
    runs = "built, 1 device(s); not chosen by the plan"
    absent = "not built (No module named 'fedms.kernels._C_cuda')"
    assert "must be the installed package" in why_not_installed(inside, checkout, runs)
    for useless in (absent, "built, cannot run: no driver", native.build_info()["cuda"]):
        assert "the CUDA module must run" in why_not_installed(elsewhere, checkout, useless)
    assert why_not_installed(elsewhere, checkout, runs) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_visit_says_before_anything_else_that_this_is_not_the_package(tmp_path):
    """Here fedms is the folder's own, or has no CUDA module."""
    v = visit(tmp_path)
    v.tiny = False
    found = v.item("about", lambda: gpu_visit.about(v))
    own = BENCH.parent in Path(gpu_visit.fedms.__file__).parents
    assert ("must be the installed package" if own else "module must run") in found["refused"]


JUNIT = """<testsuite>
<testcase classname="tests.test_triton" name="test_error[shape-fp32-split]"><failure/></testcase>
<testcase classname="tests.test_triton" name="test_error[shape-bf16-split]"/>
<testcase classname="tests.test_triton" name="test_bf16[1]"><error/></testcase>
<testcase classname="tests.test_gemm_tiles" name="test_every_row[128x128-fused]"/>
<testcase classname="tests.test_cuda" name="test_capture"><skipped/></testcase>
</testsuite>"""


def test_tests_count_by_backend_and_dtype():
    found = by_backend(ElementTree.fromstring(JUNIT).iter("testcase"))
    assert found["triton fp32"]["failed"] == ["test_error[shape-fp32-split]"]
    assert found["triton bf16"]["passed"] == ["test_error[shape-bf16-split]"]
    assert found["triton bf16"]["failed"] == ["test_bf16[1]"]
    assert found["triton any"]["passed"] == ["test_every_row[128x128-fused]"]
    assert found["cuda any"] == {"passed": [], "failed": [], "skipped": ["test_capture"]}


def test_federated_rounds_before_an_error_or_the_end_of_the_time_are_kept():
    done = '{"side_by_side": 1, "seconds": 2.0}\n{"side_by_side": 8, "seconds": 0.5}\n'
    more = '{"side_by_side": 1, "seconds": 3.0}\n'
    whole = seconds_a_round(0, f"a warning\n{done}{more}\n| a table |")
    assert whole == {
        "line": "S = 1 2.500 s, S = 8 0.500 s",
        "rounds": {"1": [2.0, 3.0], "8": [0.5]},
    }
    cut = seconds_a_round(None, done + more[:25])
    assert cut["refused"] == "S = 1 2.000 s, S = 8 0.500 s, then CUT"
    assert cut["rounds"] == {"1": [2.0], "8": [0.5]}
    assert (
        seconds_a_round(1, "KeyError: 'x'\n")["refused"]
        == "nothing, then exit code 1: KeyError: 'x'"
    )


def entry(default: str, dtype: str = "bf16", **ratios: float) -> dict:
    """A measured case by its graph rows' ratios to the frozen layer."""
    listed = {
        f"{name} (graph)": {"both": {"over_frozen": {"median": r}}} for name, r in ratios.items()
    }
    return {"default": default, "dtype": dtype, "rows": listed | {name: {} for name in ratios}}


def test_a_failure_counts_against_its_own_backend_and_dtype():
    verdicts = {
        "triton fp32": {"passed": ["a"], "failed": ["b"], "skipped": []},
        "triton bf16": {"passed": ["a"], "failed": [], "skipped": []},
        "cuda any": {"passed": [], "failed": [], "skipped": ["a"]},
    }
    items = {"tests": {"verdicts": verdicts}, "time x": entry("triton", triton=1.1, stacked=1.2)}
    passed = {key: verdict["passed"] for key, verdict in gpu_report.standing(items).items()}
    assert passed == {
        "triton fp32": False, "triton bf16": True, "stacked bf16": True, "cuda any": False,
    }  # fmt: skip
    items["time x"]["rows"]["stacked"] = {"refused": "output 0 is off"}
    items["sweep R32"] = {"backend": "triton", "dtype": "bf16", "right": ["a"], "wrong": {"b": "c"}}
    found = gpu_report.standing(items)
    assert not found["stacked bf16"]["passed"]
    assert not found["triton bf16"]["passed"]
    tools = {"memcheck cuda": {"line": "clean"}, "memcheck triton": {"line": "ERRORS FOUND"}}
    assert list(gpu_report.standing(tools)) == ["triton any"]


def test_targets_and_losses_are_those_of_the_plans_choice():
    qo, vit = gpu_report.TARGETS[0], gpu_report.TARGETS[2]
    items = {
        f"time {qo.case}": entry("triton", triton=1.1, stacked=1.2, peft=2.0),
        f"time {vit.case}": entry("stacked", triton=1.4, stacked=1.9, peft=1.6),
    }
    assert [t.value(items) for t in gpu_report.TARGETS] == [1.1, None, 1.9, None]
    said = list(gpu_report.lines({"rehearsal": False, "items": items, "left_out": ["late"]}))
    assert any(s.strip().startswith("met  Llama q/o") for s in said)
    assert any(s.strip().startswith("missed  ViT-B") for s in said)
    assert [s for s in said if "slower than it need be" in s] == [
        f"slower than it need be: time {vit.case} (graph): stacked 1.900, the others 1.600"
    ]
    assert "left out: late" in said


def test_only_measured_rows_are_installed(tmp_path):
    shape = tiles.Shape("a GPU", "bfloat16", "bfloat16", 16, 64, 64, 16)
    chosen = replace(tiles.heuristic(shape), backend="triton", measured=True)
    tiles.save({shape: chosen}, tmp_path / "plan.json")
    assert gpu_suite.install(tmp_path, tmp_path / "table.json") == 0
    text = (tmp_path / "table.json").read_text("utf-8")
    assert tiles.parse(text, "") == {shape: chosen}
    tiles.save({shape: replace(chosen, measured=False)}, tmp_path / "plan.json")
    with pytest.raises(ValueError, match="must have rows of the tuner"):
        gpu_suite.install(tmp_path, tmp_path / "table.json")
