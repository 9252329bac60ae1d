"""What of the GPU suite runs kernels in a process of its own: `tune`, `time` and `exercise`.

A kernel that hangs, or an illegal access, which leaves a process without its device, must cost one
case and not the suite. So the item in work is written to the file first, an alarm ends the process
when it takes too long, and the next worker marks that item as refused and goes on behind it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gpu_cases import Case, matrix, rehearsal
from gpu_results import Results
from gpu_rows import Truth, problem, rows, tuned_shape
from gpu_timing import Clock, ceilings, first_line, measure

from fedms.kernels import tiles
from fedms.kernels.tune import tune

FINISHED, CUT, DEVICE_LOST = 0, 10, 11
ALARM = {"tune": 240, "time": 90}  # seconds an item may take; most of it is compiling


class Worker:
    """Runs a section's items in order, each once, until they end or the time does."""

    def __init__(self, results: Results, section: str, until: float, device: torch.device) -> None:
        self.results, self.until, self.device = results, until, device
        self.section = results.section(section)
        self.items: dict[str, Any] = self.section.setdefault("items", {})
        self.limit = ALARM[section]
        lost = self.section.pop("running", None)
        if lost is not None:
            self.items[lost] = {"refused": "the process died in it or it took too long"}

    def run(self, todo: dict[str, Callable[[], dict[str, Any]]]) -> int:
        """An exit code of this module."""
        for name, work in todo.items():
            if name in self.items:
                continue
            if time.time() >= self.until:
                self.section["left_out"] = [name for name in todo if name not in self.items]
                self.results.write()
                return CUT
            self.section["running"] = name
            self.results.write()
            signal.alarm(self.limit)
            try:
                self.items[name] = work()
            except Exception as error:  # whatever a compiler or a launch raises; the file says it
                self.items[name] = {"refused": first_line(error)}
            finally:
                signal.alarm(0)
            del self.section["running"]
            self.section["left_out"] = []
            self.results.write()
            print(f"  {name}: {self.items[name].get('refused', 'done')}", flush=True)
            if not self._device_works():
                return DEVICE_LOST
        return FINISHED

    def _device_works(self) -> bool:
        try:
            return 0.0 <= torch.rand(1, device=self.device).item() < 1.0
        except RuntimeError:
            return False


def tune_items(
    cases: list[Case], plan: Path, device: torch.device
) -> dict[str, Callable[[], dict[str, Any]]]:
    """One item for every row of the plan's table that a case reads, in the cases' order."""

    def work(case: Case) -> dict[str, Any]:
        tuned = tune(case.m, case.k, case.n, [case.r] * case.experts, device=device)
        tiles.save({tuned.shape: tuned.choice}, plan)
        attempts = [asdict(attempt) for attempt in tuned.attempts]
        return {"choice": asdict(tuned.choice), "attempts": attempts}

    shapes: dict[tiles.Shape, Case] = {}
    for case in cases:
        shapes.setdefault(tuned_shape(case, device), case)
    return {f"{s.m}x{s.k}x{s.n} r{s.r}": lambda case=case: work(case) for s, case in shapes.items()}


def time_items(
    cases: list[Case], device: torch.device, seconds: float, ceiling: tuple[int, int]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """The ceilings, then one item a case."""
    clock = Clock(device)

    def work(case: Case) -> dict[str, Any]:
        found = rows(case, problem(case, device))
        return measure(case, found, clock, seconds)

    return {"ceilings": lambda: ceilings(clock, *ceiling)} | {
        str(case): lambda case=case: work(case) for case in cases
    }


def exercise(backend: str, device: torch.device) -> None:
    """Forward and backward of small problems of every kind; raises RuntimeError when one is off."""
    for case in rehearsal():
        found = rows(replace(case, compiled=False), problem(case, device))
        if backend not in found:
            raise RuntimeError(f"backend {backend!r} cannot run on {device}")
        wrong = Truth().problem_with(found[backend])
        if wrong:
            raise RuntimeError(f"{case}: {wrong}")
        print(f"  {case}: right", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=("tune", "time", "exercise"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--until", type=float, help="seconds since the epoch")
    parser.add_argument("--backend")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.rehearse else "cuda")
    if args.section == "exercise":
        exercise(args.backend, device)
        return FINISHED
    cases = rehearsal() if args.rehearse else matrix()
    worker = Worker(Results(args.results), args.section, args.until, device)
    if args.section == "tune":
        return worker.run(tune_items(cases[:1] if args.rehearse else cases, args.plan, device))
    if args.plan.exists():  # the suite gave this process a folder of its own for the user's table
        tiles.save(tiles.parse(args.plan.read_text("utf-8"), str(args.plan)), tiles.user_table())
    seconds, ceiling = (0.1, (64, 1 << 20)) if args.rehearse else (1.0, (8192, 4 << 30))
    return worker.run(time_items(cases, device, seconds, ceiling))


if __name__ == "__main__":
    sys.exit(main())
