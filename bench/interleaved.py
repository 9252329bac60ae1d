"""Interleaved timing for the CPU tables: their options, their clock and their loop.

Runs are taken in turn, round after round, so that a machine that speeds up or slows down does so
for all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import torch

Clock = Callable[[], float]


def add_options(parser: argparse.ArgumentParser, seconds: float) -> None:
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
    return time.thread_time if args.cpu else time.perf_counter


def measure(
    runs: Mapping[str, Callable[[], object]], seconds: float, rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of every round of every run, at least `rounds` of them after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            begin = clock()
            run()
            times[name].append(clock() - begin)
        done += 1
    return times
