"""The GPU suite's verdicts, on numbers made by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import gpu_report
from gpu_cases import Case, matrix, rehearsal


def entry(case: Case, default: str, **us: float) -> dict:
    """A measured case: microseconds of forward + backward by row, `frozen` among them."""
    listed = {
        name.replace("_", " ").replace("graph", "(graph)"): {
            "both": {"us": {"median": t}, "over_frozen": {"median": t / us["frozen"]}},
            "saved_bytes": 102,
            "x_h_g_bytes": 100,
        }
        for name, t in us.items()
    }
    return {"case": str(case), "default": default, "rows": listed}


def judged(*entries: dict) -> dict[str, dict]:
    data = {
        "rehearsal": False,
        "backends": {"stacked": True, "triton": True},
        "sections": {"time": {"items": {e["case"]: e for e in entries}}},
    }
    return {t["target"]: t for t in gpu_report.judge(data)["targets"]}


def test_targets_are_met_missed_or_not_measured():
    qo = Case("Llama-3-8B", 8192, 4096, 4096)
    found = judged(
        entry(qo, "stacked", frozen=100, stacked=120, triton=108, peft_bf16=210),
        entry(replace(qo, experts=8), "triton", frozen=100, stacked=150, triton=126),
        entry(
            replace(qo, experts=32, segments=32), "triton",
            frozen=100, triton=110, triton_one_adapter=100,
        ),
    )  # fmt: skip
    told = {name: (t["verdict"], t["value"], t["best"]) for name, t in found.items()}
    assert told["Llama q/o, over frozen"] == ("missed", 1.2, 1.08)
    assert told["Llama q/o, E 8 over E 2"] == ("met", 1.26 / 1.2, 1.26 / 1.08)
    assert told["Llama q/o, 32 segments over one adapter"][:2] == ("met", 1.1)
    assert told["Llama q/o, peft bf16 gated over fedms"] == ("missed", 1.75, 210 / 108)
    assert told["ViT-L qkvo, over frozen"] == ("not measured", None, None)
    assert told["saved bytes over x + h + g"][0] == "not measured"


def test_few_tokens_count_by_their_graphs_worst_shape():
    few = [c for c in matrix() if c.m == 16 and str(c).endswith("r16 E2")]
    assert len(few) == 4
    times = [
        entry(c, "triton", frozen=50, triton=90, frozen_graph=10, triton_graph=20 + i)
        for i, c in enumerate(few)
    ]
    found = judged(*times)["16 tokens, LoRA's extra device time, us"]
    assert (found["verdict"], found["value"]) == ("met", 13)
    missing = judged(*times[1:])["16 tokens, LoRA's extra device time, us"]
    assert missing["verdict"] == "not measured"


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"tests": {"passed": 3, "failed": 1}}, False),
        ({"tests": {"passed": 0, "failed": 0}}, False),
        ({"state": "cut"}, False),
        ({"tool": "errors found"}, False),
        ({"row": {"refused": "output 0 is off"}}, False),
        ({"rehearsal": True}, False),
    ],
    ids=str,
)
def test_when_a_kernel_has_passed_on_a_device(change, passed):
    case = entry(rehearsal()[0], "stacked", frozen=1, triton=2)
    case["rows"]["triton"] = change.get("row", case["rows"]["triton"])
    tests = {"triton": change.get("tests", {"passed": 3, "failed": 0})}
    runs = [{"backend": "triton", "tool": "racecheck", "state": change.get("tool", "clean")}]
    data = {
        "rehearsal": change.get("rehearsal", False),
        "backends": {"triton": True},
        "sections": {
            "test": {"state": change.get("state", "done"), "backends": tests},
            "sanitize": {"runs": runs},
            "time": {"items": {case["case"]: case}},
        },
    }
    assert gpu_report.standing(data)["triton"]["passed_on_device"] is passed
