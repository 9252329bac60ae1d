"""One timing loop, three clocks, and what else is counted of a row.

A round runs every row once, in turn, so that a machine that speeds up or slows down does so for all
of them; a ratio is the median over rounds of a row's time over another's of the same round. The
clocks: the wall's, one thread's processor time (for a busy machine), and CUDA events, which write
over the whole L2 cache before every row. Eager times of a GPU are those of a call as a user makes
it: where launching takes longer than computing they show the launching, and the graph rows beside
them show the device alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rows import Row
from torch.profiler import ProfilerActivity, profile

from fedms.kernels.agreement import BOUND, difference

FLUSH_BYTES = 256 << 20  # several times the 50 MB of an H100's L2
MOST_ROUNDS = 10_000

Parts = Mapping[str, Callable[[], object]]
"""A row's timed parts by name, in the order they run."""

Times = dict[str, dict[str, list[float]]]
"""Microseconds of every round, by row and part; "both" is their sum."""


class Clock:
    """Stamps on a time line; microseconds between two of them. This one reads `read` in seconds."""

    def __init__(self, read: Callable[[], float] = time.perf_counter) -> None:
        self.read = read

    def evict(self) -> None:
        """Take what a row could find in a cache of the device."""

    def stamp(self) -> Any:
        return self.read()

    def wait(self) -> None:
        """Until every stamp has its time."""

    def microseconds(self, begin: Any, end: Any) -> float:
        return 1e6 * (end - begin)


class Events(Clock):
    """CUDA events."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def evict(self) -> None:
        self._flush.zero_()

    def stamp(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def microseconds(self, begin: Any, end: Any) -> float:
        return 1e3 * begin.elapsed_time(end)


def add_options(parser: argparse.ArgumentParser, seconds: float) -> None:
    """The CPU tables' options."""
    parser.add_argument("--seconds", type=float, default=seconds, help="time a row")
    parser.add_argument("--match", default="", help="only rows whose name contains this")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cpu", action="store_true", help="processor time of this thread")


def set_up(args: argparse.Namespace) -> Clock:
    """The clock that the options ask for; torch has the threads that they ask for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.cpu:
        torch.autograd.set_multithreading_enabled(False)
    return Clock(time.thread_time if args.cpu else time.perf_counter)


def interleaved(rows: Mapping[str, Parts], seconds: float, rounds: int, clock: Clock) -> Times:
    """The rows round after round for `seconds`, `rounds` times at least, after one to warm up."""
    times: Times = {name: {} for name in rows}
    _round(rows, clock)
    begin, done = time.perf_counter(), 0
    while done < rounds or (time.perf_counter() - begin < seconds and done < MOST_ROUNDS):
        for name, stamps in _round(rows, clock).items():
            spans = {
                part: clock.microseconds(a, b)
                for part, a, b in zip(rows[name], stamps, stamps[1:], strict=False)
            }
            spans["both"] = clock.microseconds(stamps[0], stamps[-1])
            for part, span in spans.items():
                times[name].setdefault(part, []).append(span)
        done += 1
    return times


def _round(rows: Mapping[str, Parts], clock: Clock) -> dict[str, list[Any]]:
    stamps: dict[str, list[Any]] = {}
    for name, parts in rows.items():
        clock.evict()
        stamps[name] = [clock.stamp()]
        for run in parts.values():
            run()
            stamps[name].append(clock.stamp())
    clock.wait()
    return stamps


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


def ratios(over: list[float], under: list[float]) -> dict[str, float]:
    """The spread of one row's times over another's of the same rounds."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def capture(row: Row) -> Callable[[], None]:
    """The row's forward and backward as a CUDA graph whose replay gave the eager call's result.

    Raises RuntimeError where it did not, or where something in the row waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call sets up must not be captured
        for _ in range(3):
            eager = row.results()
        with _waiting_raises():
            row.results()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = row.results()
    for tensor in replayed:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    # Where torch draws a new dropout mask at every replay, only the eager check can be made.
    problem = "" if row.checked else difference(replayed, eager, BOUND[torch.bfloat16])
    if problem:
        raise RuntimeError(f"the graph's replay is not the eager call's result: {problem}")
    return graph.replay


@contextmanager
def _waiting_raises() -> Iterator[None]:
    """A capture that fails leaves torch's generator unusable: what would fail is found before."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def counts(row: Row, gpu: bool) -> dict[str, Any]:
    """Bytes kept for backward, peak bytes over what was there before, kernels launched."""
    row.results()
    found: dict[str, Any] = {
        "saved_bytes": saved_bytes(row),
        "x_h_g_bytes": row.problem.x_h_g_bytes(),
    }
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        row.results()
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found | {"launches": len(kernels(row, 1))}


def kernels(row: Row, calls: int) -> list[tuple[str, float]]:
    """Name and microseconds of every kernel of `calls` calls; off a GPU of every torch operator."""
    name = "CUDA" if row.problem.x.is_cuda else "CPU"
    with profile(activities=[getattr(ProfilerActivity, name)]) as profiler:
        for _ in range(calls):
            row.results()
        if name == "CUDA":
            torch.cuda.synchronize()
    wanted = getattr(torch.autograd.DeviceType, name)
    return [
        (e.name, float(e.device_time if name == "CUDA" else e.cpu_time))
        for e in profiler.events() or ()
        if e.device_type == wanted
    ]


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


def ceilings(clock: Clock, device: torch.device, size: int, copied: int) -> dict[str, float]:
    """GB/s of a copy of `copied` bytes (read + written) and TFLOP/s of a size³ bf16 product."""
    source = torch.empty(copied // 2, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    left, right = torch.randn(2, size, size, device=device).bfloat16().unbind()
    out = torch.empty_like(left)
    runs: dict[str, Parts] = {
        "copy": {"both": lambda: target.copy_(source)},
        "matmul": {"both": lambda: torch.mm(left, right, out=out)},
    }
    times = interleaved(runs, 0.2, 5, clock)
    copy, matmul = (statistics.median(times[name]["both"]) for name in runs)
    return {"copy_gb_per_s": 1e-3 * copied / copy, "matmul_tflop_per_s": 2e-6 * size**3 / matmul}
