"""How the GPU suite measures: one case's rows in turn, and the two ceilings of a device.

A round runs every row once, each after a write over the whole L2 cache, so that a device that
speeds up or slows down does so for all of them. A ratio is the median over rounds of a row's time
over the frozen row's of the same round. Times are CUDA events around the call as a user makes it:
where launching takes longer than computing they show the launching, and the CUDA-graph rows beside
them show the device alone. Off a GPU (rehearsals) the wall clock stands in for the events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import Case
from gpu_rows import Row, Truth, default_backend
from torch.profiler import ProfilerActivity, profile

from fedms.kernels.agreement import BOUND, difference

FLUSH_BYTES = 256 << 20  # several times the 50 MB of an H100's L2
MOST_ROUNDS = 100

Parts = dict[str, Callable[[], object]]
"""A row's timed parts by name, in the order they run."""


class Clock:
    """Stamps on the device's time line; microseconds between two of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        size = FLUSH_BYTES if self.cuda else 0
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def evict(self) -> None:
        self._flush.zero_()

    def stamp(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def microseconds(self, begin: Any, end: Any) -> float:
        return 1e3 * begin.elapsed_time(end) if self.cuda else 1e6 * (end - begin)


def measure(case: Case, rows: dict[str, Row], clock: Clock, seconds: float) -> dict[str, Any]:
    """Check every row, then time those that are right for about `seconds`.

    Gives {"truth": dtype, "default": backend, "rows": {name: {...}}}; a row that is wrong or raised
    has "refused" with the reason and no number.
    """
    truth, right = Truth(), {}
    out: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        try:
            problem = truth.problem_with(row)
        except Exception as error:  # a compiler's, a launch's or the memory's own; the row says it
            problem = first_line(error)
        if problem:
            out[name] = {"refused": problem}
        else:
            right[name] = row
            out[name] = {"checked": "without dropout" if row.checked else "yes"}
    found = {
        "case": str(case),
        "truth": str(truth.dtype).removeprefix("torch."),
        "default": default_backend(case, clock.device),
        "rows": out,
    }
    del truth  # gigabytes of float64, which graphs' own pools could not use
    if clock.cuda:
        torch.cuda.empty_cache()
    if "frozen" not in right:
        return found
    for name, row in right.items():
        out[name] |= _counts(row, clock)
    times = _rounds({name: _eager(row) for name, row in right.items()}, clock, seconds)
    _note(case, times, out)
    if case.graphs:
        _graphs(case, right, out, clock, seconds / 2)
    return found


def _graphs(
    case: Case, rows: dict[str, Row], out: dict[str, dict[str, Any]], clock: Clock, seconds: float
) -> None:
    """The rows again as one CUDA graph each, as "<name> (graph)"."""
    captured: dict[str, Parts] = {}
    for name, row in rows.items():
        try:
            captured[name] = {"both": capture(row, clock.device)}
        except RuntimeError as error:
            out[f"{name} (graph)"] = {"refused": first_line(error)}
    if "frozen" in captured:
        times = _rounds(captured, clock, seconds)
        graph_rows = {name: {"checked": out[name]["checked"]} for name in captured}
        _note(case, times, graph_rows)
        out |= {f"{name} (graph)": row for name, row in graph_rows.items()}


def capture(row: Row, device: torch.device) -> Callable[[], None]:
    """The row's forward and backward as a CUDA graph whose replay gave the eager call's result."""
    if device.type != "cuda":
        raise RuntimeError("CUDA graphs need a GPU")
    run = lambda: row.problem.results(row.forward)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call sets up must not be captured
        for _ in range(3):
            eager = run()
        # A capture that fails leaves torch's generator unusable, so what would fail is found first.
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    for tensor in replayed:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    # Where torch draws a new dropout mask at every replay, only the eager check can be made.
    problem = "" if row.checked else difference(replayed, eager, BOUND[torch.bfloat16])
    if problem:
        raise RuntimeError(f"the graph's replay is not the eager call's result: {problem}")
    return graph.replay


def _eager(row: Row) -> Parts:
    kept: list[torch.Tensor] = []
    leaves, dy = row.problem.leaves(), row.problem.dy
    return {
        "forward": lambda: kept.append(row.forward()),
        "backward": lambda: torch.autograd.grad(kept.pop(), leaves, dy),
    }


def _rounds(
    rows: dict[str, Parts], clock: Clock, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Microseconds of every round, by row and part; "both" is their sum."""

    def one_round() -> dict[str, list[Any]]:
        stamps: dict[str, list[Any]] = {}
        for name, parts in rows.items():
            clock.evict()
            stamps[name] = [clock.stamp()]
            for run in parts.values():
                run()
                stamps[name].append(clock.stamp())
        clock.wait()
        return stamps

    one_round()
    begin = time.perf_counter()
    one_round()
    took = time.perf_counter() - begin
    least = 10 if clock.cuda else 3  # a rehearsal's times mean nothing
    count = min(max(int(seconds / max(took, 1e-6)), least), MOST_ROUNDS)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in rows}
    for _ in range(count):
        for name, stamps in one_round().items():
            spans = {
                part: clock.microseconds(a, b)
                for part, a, b in zip(rows[name], stamps, stamps[1:], strict=False)
            }
            spans["both"] = clock.microseconds(stamps[0], stamps[-1])
            for part, span in spans.items():
                times[name].setdefault(part, []).append(span)
    return times


def _note(
    case: Case, times: dict[str, dict[str, list[float]]], out: dict[str, dict[str, Any]]
) -> None:
    """Add medians, quartiles, ratios to the frozen row and tokens a second to each row."""
    for name, parts in times.items():
        for part, spans in parts.items():
            floor = times["frozen"][part]
            ratios = [span / low for span, low in zip(spans, floor, strict=True)]
            out[name][part] = {"us": _spread(spans), "over_frozen": _spread(ratios)}
        out[name]["tokens_per_s"] = case.m / statistics.median(parts["both"]) * 1e6
        out[name]["rounds"] = len(parts["both"])


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


def _counts(row: Row, clock: Clock) -> dict[str, Any]:
    """Bytes kept for backward, peak bytes over what was there before, kernels launched."""
    run = lambda: row.problem.results(row.forward)  # noqa: E731
    run()
    clock.wait()
    counts: dict[str, Any] = {
        "saved_bytes": saved_bytes(row),
        "x_h_g_bytes": row.problem.x_h_g_bytes(),
        "peak_bytes": None,
    }
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        clock.wait()
        counts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    activity = ProfilerActivity.CUDA if clock.cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
        clock.wait()
    wanted = torch.autograd.DeviceType.CUDA if clock.cuda else torch.autograd.DeviceType.CPU
    events = [e for e in profiler.events() or () if e.device_type == wanted]
    # Off a GPU: calls of torch operators. None at all means that the profiler saw nothing.
    return counts | {"launches": len(events) or None}


def saved_bytes(row: Row) -> int:
    """Bytes of the storages that autograd keeps from forward to backward, W, A and B apart."""
    of = row.problem
    parameters = {t.untyped_storage().data_ptr() for t in (of.weight, *of.A, *of.B)}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        where = t.untyped_storage().data_ptr()
        if where not in parameters:
            kept[where] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = row.forward()
        total = sum(kept.values())
    del y
    return total


def ceilings(clock: Clock, size: int, copied: int) -> dict[str, float]:
    """GB/s of a copy of `copied` bytes (read + written) and TFLOP/s of a size³ bf16 product."""
    source = torch.empty(copied, dtype=torch.int8, device=clock.device).fill_(1)
    target = torch.empty_like(source)
    left, right = torch.randn(2, size, size, device=clock.device).bfloat16().unbind()
    out = torch.empty_like(left)
    runs: dict[str, Parts] = {
        "copy": {"both": lambda: target.copy_(source)},
        "matmul": {"both": lambda: torch.mm(left, right, out=out)},
    }
    times = _rounds(runs, clock, 1.0)
    copy, matmul = (statistics.median(times[name]["both"]) for name in runs)
    return {"copy_gb_per_s": 2e-3 * copied / copy, "matmul_tflop_per_s": 2e-6 * size**3 / matmul}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
