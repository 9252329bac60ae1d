"""What a visit to a GPU does, item by item: sweep, tune, time, look at kernels, run the tests."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from cases import Case
from gpu_visit import ROOT, Visit, bounded, why_not_installed
from rows import Row, Truth, checked, default_backend, first_line, problem, rows, tuned_shape
from timing import capture, counts, interleaved, kernels, ratios, spread

from fedms.kernels import plan, tiles, tune

TESTS = ("test_cuda.py", "test_triton.py", "test_gemm_tiles.py", "test_training.py")
SWEEP = (1031, 1088, 832)
"""Tokens, in and out of the sweep: no multiple of a tile, several tiles each way."""
TINY = (33, 64, 32)


def sweep_choices(capability: int, rank: int, tiny: bool) -> dict[str, tiles.Choice]:
    """Every strategy on every tile that the tuner offers, by a name."""
    size, bf16 = TINY if tiny else SWEEP, torch.bfloat16
    shape = tiles.Shape.of("any", bf16, bf16, *size, rank)
    start = tiles.heuristic(shape)
    return {
        f"{strategy} {gemm}": replace(
            start, forward=strategy, backward=strategy, gemm=gemm, dx_gemm=gemm
        )
        for strategy, gemm in tune.launches(capability, replace(shape, m=2048))
    }


def sweep(visit: Visit, capability: int) -> None:
    """Every row of every output of the Triton backend on production tiles and in every routing."""
    m, k, n = TINY if visit.tiny else SWEEP
    for rank in (32,) if visit.tiny else (16, 32, 64):
        case = Case(m, k, n, r=rank // 2, frozen=1)
        choices = sweep_choices(capability, rank, visit.tiny)
        if visit.tiny:
            choices = dict(list(choices.items())[:4])
        dense = [case]
        more = [replace(case, top_k=1), replace(case, dropout_p=0.1)]
        more += [replace(case, experts=3, segments=3, gated=False, frozen=0)]
        visit.item(f"sweep R{rank}", lambda c=choices, d=dense: _swept(visit, d, c))
        if rank == 32:
            few = dict(list(choices.items())[:3])  # split, and extend by pointers
            visit.item("sweep routing", lambda c=few, d=more: _swept(visit, d, c))


def _swept(visit: Visit, cases: Iterable[Case], choices: dict[str, tiles.Choice]) -> dict[str, Any]:
    found: dict[str, str] = {}
    for case in cases:
        whole, truth = problem(case, visit.device), Truth()
        row = Row(whole, whole.fedms("triton"))
        for name, choice in choices.items():
            tiles.save({tuned_shape(case, visit.device): choice}, tiles.user_table())
            found[f"{case} {name}"] = checked({name: row}, truth)[name]
    wrong = {name: said for name, said in found.items() if said}
    return {
        "line": f"{len(found) - len(wrong)} right, {len(wrong)} wrong {list(wrong.items())[:2]}",
        "backend": "triton",
        "dtype": "bf16",
        "right": [name for name, said in found.items() if not said],
        "wrong": wrong,
    }


def tuned(visit: Visit, case: Case) -> dict[str, Any]:
    """Measure the plan's row of a case; it is used from here on and kept in plan.json.

    The tuner compares every candidate with float64 at its own tiles and shape before its time
    counts, so the row stands by itself, whatever else is wrong with a backend.
    """
    clock = None
    if visit.tiny:
        clock = lambda run: (run(), 1.0)[1]  # noqa: E731
    done = tune.tune(
        case.m, case.k, case.n, [case.r] * case.experts, device=visit.device, clock=clock
    )
    tiles.save({done.shape: done.choice}, tiles.user_table())
    if not visit.tiny:
        tiles.save({done.shape: done.choice}, visit.out / "plan.json")
    attempts = [asdict(a) for a in done.attempts]
    bad = [a for a in attempts if a["microseconds"] is None]
    return {
        "line": f"{done.choice.backend}, {len(attempts)} tried, {len(bad)} refused",
        "choice": asdict(done.choice),
        "attempts": attempts,
    }


def timed(visit: Visit, case: Case, seconds: float, *, compiled: bool = False) -> dict[str, Any]:
    """A case's rows: checked, then timed eagerly and as CUDA graphs."""
    found = rows(case, problem(case, visit.device), compiled=compiled)
    about = {
        "case": str(case),
        "default": default_backend(case, visit.device),
        "dtype": case.base,
    }
    return about | measured(visit, found, seconds)


def measured(visit: Visit, found: dict[str, Row], seconds: float) -> dict[str, Any]:
    """{"rows": {name: ...}} with "refused" and no number for a row that is wrong or raised."""
    truth = Truth()
    said = checked(found, truth)
    out: dict[str, Any] = {
        name: {"refused": why} if why else {"checked": _how(found[name])}
        for name, why in said.items()
    }
    result = {"truth": str(truth.dtype).removeprefix("torch."), "rows": out}
    del truth  # gigabytes of float64, which graphs' own pools could not use
    right = {name: row for name, row in found.items() if not said[name]}
    if "frozen" not in right:
        return result | {"line": f"nothing is timed: the frozen layer is {said['frozen']}"}
    for name, row in right.items():
        out[name] |= counts(row, gpu=True)
    parts = {name: row.parts() for name, row in right.items()}
    _note(interleaved(parts, seconds, visit.rounds, visit.clock), out)
    captured = {}
    for name, row in right.items():
        try:
            captured[name] = {"both": capture(row)}
        except RuntimeError as error:
            out[f"{name} (graph)"] = {"refused": first_line(error)}
    if "frozen" in captured:
        out |= {f"{name} (graph)": {"checked": out[name]["checked"]} for name in captured}
        times = interleaved(captured, seconds, visit.rounds, visit.clock)
        _note({f"{name} (graph)": t for name, t in times.items()}, out)
    return result | {"line": ", ".join(_cells(out))}


def _how(row: Row) -> str:
    return "without dropout" if row.checked else "yes"


def _note(times: dict[str, dict[str, list[float]]], out: dict[str, Any]) -> None:
    """Add medians, quartiles and ratios to the frozen row of the same kind."""
    floor = next(parts for name, parts in times.items() if name.startswith("frozen"))
    for name, parts in times.items():
        for part, spans in parts.items():
            out[name][part] = {"us": spread(spans), "over_frozen": ratios(spans, floor[part])}


def _cells(out: dict[str, Any]) -> list[str]:
    return [
        f"{name} REFUSED" if "refused" in row else f"{name} {row['both']['us']['median']:.1f} us"
        if name.startswith("frozen") else f"{name} {row['both']['over_frozen']['median']:.3f}"
        for name, row in out.items()
    ]  # fmt: skip


def profiled(visit: Visit, case: Case) -> dict[str, Any]:
    """Median device time of every kernel of each backend's forward and backward, by its name."""
    found = rows(case, problem(case, visit.device))
    out: dict[str, Any] = {}
    for name in found.keys() & {"frozen", *plan.BACKENDS}:
        found[name].results()
        times: dict[str, list[float]] = {}
        for kernel, us in kernels(found[name], 10):
            times.setdefault(kernel[:80], []).append(us)
        out[name] = {
            kernel: {"us": statistics.median(us), "calls": len(us) / 10}
            for kernel, us in times.items()
        }
    line = {k: round(v["us"], 1) for k, v in out.get("triton", {}).items() if k.endswith("_kernel")}
    return {"line": str(line), "kernels": out}


def gemms(visit: Visit, case: Case) -> dict[str, Any]:
    """cuBLAS alone: y = x W^T, the same added to what y holds, and the pair dx = dy W."""
    of = problem(case, visit.device)
    x, w, dy = of.x.detach(), of.weight, of.dy
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    runs: dict[str, Callable[[], object]] = {
        "mm": lambda: torch.mm(x, w.t(), out=y),
        "addmm": lambda: y.addmm_(x, w.t()),
        "mm dx": lambda: torch.mm(dy, w, out=dx),
        "addmm dx": lambda: dx.addmm_(dy, w),
    }
    times = interleaved({n: {"both": r} for n, r in runs.items()}, 0.5, visit.rounds, visit.clock)
    median = {name: statistics.median(t["both"]) for name, t in times.items()}
    tflops = {f"{n} tflop/s": 2e-6 * case.m * case.k * case.n / us for n, us in median.items()}
    return {n: round(v, 2) for n, v in (median | tflops).items()}


def tests(visit: Visit, seconds: float) -> dict[str, Any]:
    """Run TESTS on the installed package and count by (backend, dtype)."""
    files = ["test_packing.py"] if visit.tiny else TESTS
    paths = [str(ROOT / "tests/kernels" / name) for name in files]
    python = [sys.executable, "-P"]  # the installed package, not the folder's
    code = (
        "import fedms; from fedms.kernels import native;"
        "print(fedms.__file__); print(native.build_info()['cuda'])"
    )
    told = subprocess.run(
        [*python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    why = why_not_installed(Path(told[-2]), ROOT, told[-1])
    if why and not visit.tiny:
        raise RuntimeError(why)
    report = visit.out / "junit.xml"
    many = [] if visit.tiny else ["-n", str(min(12, os.cpu_count() or 1))]
    words = [*python, "-m", "pytest", *paths, "-q", "-p", "no:cacheprovider"]
    words += ["-m", "not slow", f"--junitxml={report}", "--continue-on-collection-errors", *many]
    words += ["-W", "default"]  # another version's warning there is no error of a kernel
    code, text = bounded(words, seconds, visit.out / "tests.log")
    if not report.exists():
        return {"refused": f"pytest ended with {code} and no report: {text[-300:]}"}
    verdicts = by_backend(ElementTree.parse(report).iter("testcase"))
    total = Counter(k for v in verdicts.values() for k in ("passed", "failed") for _ in v[k])
    cut = " CUT" if code is None else ""
    return {"line": f"{dict(total)}{cut}", "cut": code is None, "verdicts": verdicts}


def federated(visit: Visit) -> dict[str, Any]:
    """A federated round of 32 clients, 1, 8 and 32 of them side by side."""
    words = [sys.executable, str(ROOT / "bench/federated_speed.py"), "--random"]
    words += ["tiny", "--rounds", "1"] if visit.tiny else ["MiniLM"]
    return seconds_a_round(*bounded(words, visit.within(60.0), visit.out / "federated.log"))


def seconds_a_round(code: int | None, text: str) -> dict[str, Any]:
    """Seconds of each round by the clients side by side, from the exit code and the output.

    What was measured before an error or the end of the time stands beside "refused".
    """
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        if line.startswith('{"side_by_side"') and line.endswith("}"):
            took = json.loads(line)
            found.setdefault(str(took["side_by_side"]), []).append(took["seconds"])
    said = ", ".join(f"S = {s} {statistics.median(spans):.3f} s" for s, spans in found.items())
    result = {"line": said, "rounds": found}
    if code == 0:
        return result
    why = "CUT" if code is None else f"exit code {code}: {text[-300:].strip()}"
    return result | {"refused": f"{said or 'nothing'}, then {why}"}


def by_backend(tests: Iterable[ElementTree.Element]) -> dict[str, dict[str, list[str]]]:
    """ "backend dtype" -> names of the tests that passed, failed and were skipped.

    A backend's tests have it in their file's name; a dtype that is not in the test's own is "any".
    """
    found: dict[str, dict[str, list[str]]] = {}
    for test in tests:
        name = f"{test.get('classname')} {test.get('name')}"
        backend = next((b for b in plan.BACKENDS if b in name), None)
        backend = "triton" if "gemm_tiles" in name else backend or "other"
        dtypes = {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16"}
        dtypes |= {"float32": "fp32", "fp32": "fp32"}
        dtype = next((d for word, d in dtypes.items() if word in name), "any")
        kinds = {child.tag for child in test}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        outcome = "skipped" if "skipped" in kinds else outcome
        empty: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        found.setdefault(f"{backend} {dtype}", empty)[outcome].append(str(test.get("name")))
    return found
