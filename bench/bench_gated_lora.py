"""pytest-benchmark over the gated LoRA layer; the result is checked before it is timed.

    pytest bench -k smoke                  two small shapes, seconds: for CI
    pytest bench -k "not smoke"            every shape
    python bench/table.py                  the ratios as a markdown table, rows interleaved

`benchmark.pedantic` with fixed rounds, because the calibrated mode has no upper bound on its time.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import MIXTURES, SHAPES, SMOKE, Case, cpu_cases
from rows import Row, checked, problem, rows

ROWS = ["frozen", "peft", "stacked", "native"]


@cache
def _right(case: Case) -> dict[str, Row]:
    found = rows(case, problem(case, torch.device("cpu")))
    found = {name: row for name, row in found.items() if name in ROWS}
    wrong = {name: said for name, said in checked(found).items() if said}
    if wrong:
        raise AssertionError(f"{case}: {wrong}")
    return found


def _bench(benchmark, case: Case, row: str, rounds: int) -> None:
    found = _right(case)
    if row not in found:
        pytest.skip("the extension is not built")
    benchmark.group = str(case)
    benchmark.extra_info["row"] = row
    benchmark.pedantic(found[row].results, rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SMOKE, ids=str)
def test_smoke(benchmark, shape, base, row):
    _bench(benchmark, Case(*shape, *MIXTURES[2], base=base, adapter="fp32"), row, rounds=5)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", cpu_cases(SHAPES), ids=str)
def test_layer(benchmark, case, row):
    _bench(benchmark, case, row, rounds=15)
