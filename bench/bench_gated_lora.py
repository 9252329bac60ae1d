"""pytest-benchmark over the gated LoRA layer; the result is checked before it is timed.

    pytest bench -k smoke                  two small shapes, seconds: for CI
    pytest bench -k "not smoke"            every shape
    python bench/table.py                  the ratios as a markdown table, rows interleaved

`benchmark.pedantic` with fixed rounds, because the calibrated mode has no upper bound on its time.
"""

from __future__ import annotations

import pytest
from gated_lora_cases import MIXTURES, SHAPES, SMOKE, Case, cases, check, rows

ROWS = ["frozen", "peft", "stacked", "native"]


def _bench(benchmark, case: Case, row: str, rounds: int) -> None:
    found = rows(case)
    if row not in found:
        pytest.skip("the extension is not built")
    check(found, case)
    benchmark.group = str(case)
    benchmark.extra_info["row"] = row
    benchmark.pedantic(found[row], rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SMOKE, ids=str)
def test_smoke(benchmark, shape, bf16, row):
    _bench(benchmark, Case(*shape, *MIXTURES[2], bf16), row, rounds=5)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", cases(SHAPES), ids=str)
def test_layer(benchmark, case, row):
    _bench(benchmark, case, row, rounds=15)
