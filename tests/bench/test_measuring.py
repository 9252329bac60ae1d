"""What is measured: every row is checked before it is timed, and a wrong one has no number."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import stand_in_cuda
from cases import EXPERTS, RANKS, gpu_case, matrix, varied
from gpu_sections import measured
from gpu_visit import Visit
from rows import Row, checked, problem, rows
from timing import Clock, Events, capture, interleaved

CPU = torch.device("cpu")
CASE = gpu_case("ViT-B/16", tiny=True)


@pytest.fixture
def visit(tmp_path):
    with stand_in_cuda.stand_in():
        yield Visit(tmp_path, 60.0, CPU, Events(CPU), tiny=True)


def some_rows(*names: str) -> dict[str, Row]:
    whole = problem(CASE, CPU)
    return {name: row for name, row in rows(CASE, whole).items() if name in names}


def test_a_wrong_result_is_refused_and_not_timed(visit):
    found = some_rows("frozen", "stacked", "peft")
    whole, right = found["stacked"].problem, found["stacked"].forward

    def one_wrong_row():
        y = right()
        return torch.cat([y[:-1], -y[-1:]])

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
    result = measured(visit, found, 0.01)["rows"]
    right = ("frozen", "stacked", "peft")
    timed = {name for name, row in result.items() if "both" in row}
    assert timed == {*right, *(f"{name} (graph)" for name in right)}
    assert result["wrong row"].keys() == {"refused"}
    assert "output 0" in result["wrong row"]["refused"]
    assert "output 2 is off by 1.0e+00" in result["wrong gradient"]["refused"]
    assert "off by nan" in result["not finite"]["refused"]
    assert result["broken"] == {"refused": "RuntimeError: no such kernel"}


def test_nothing_is_timed_without_a_right_floor(visit):
    found = some_rows("frozen", "stacked")
    floor = found["frozen"]
    found["frozen"] = Row(floor.problem, lambda: 2 * floor.forward())
    result = measured(visit, found, 0.01)
    assert "refused" in result["rows"]["frozen"]
    assert result["rows"]["stacked"] == {"checked": "yes"}
    assert "nothing is timed" in result["line"]


def test_a_graph_whose_replay_differs_is_refused():
    row = some_rows("stacked")["stacked"]
    calls = []

    def another_every_time():
        calls.append(len(calls))
        return row.forward() * float(len(calls))

    with stand_in_cuda.stand_in():
        capture(row)()
        with pytest.raises(RuntimeError, match="replay is not the eager call's result: output 0"):
            capture(Row(row.problem, another_every_time))


@pytest.mark.parametrize("case", varied(CASE, tiny=True), ids=str)
def test_rows_of_every_kind_of_mixture_are_right(case):
    found = {n: r for n, r in rows(case, problem(case, CPU)).items() if "triton" not in n}
    assert not {name: said for name, said in checked(found).items() if said}
    assert {"frozen", "peft", "stacked"} <= found.keys()


def test_times_are_those_of_the_clock():
    ticks = iter(range(1000))
    clock = Clock(lambda: float(next(ticks)))
    runs = {"a": {"forward": int, "backward": int}, "b": {"both": int}}
    times = interleaved(runs, 0.0, 4, clock)
    assert times["a"] == {"forward": [1e6] * 4, "backward": [1e6] * 4, "both": [2e6] * 4}
    assert times["b"] == {"both": [1e6] * 4}


def test_the_matrix_is_whole_and_begins_with_what_counts():
    cases = matrix()
    assert len({str(c) for c in cases}) == len(cases)
    assert str(cases[0]) == "Llama-3-8B 8192x4096x4096 bf16 r16 E2 gated"
    plain = {(c.model, c.k, c.n, c.r, c.experts, c.dropout_p) for c in cases}
    for model, k, n in {(c.model, c.k, c.n) for c in cases}:
        for r in RANKS:
            assert {(model, k, n, r, e, p) for e in EXPERTS for p in (0.0, 0.1)} <= plain
