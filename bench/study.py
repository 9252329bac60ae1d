"""The study: every method on every task, at equal local steps, one JSON line a finished run.

    python bench/study.py [--jobs 2] [--tasks icd10] [--methods fedms fedavg_ft] [--seeds 0 1 2]
    python bench/study.py --only fedavg_ft icd10 0.3 0     # one cell again, beside its line
    python bench/study.py --report                         # docs/study.md's tables and pictures

What has a line in bench/results/study.jsonl is not run again, so the command goes on after a stop.
Runs are kept in runs/study/.

A method's learning rates and its knob on the label prior are chosen on the validation examples of
seed 0 (lines of kind "choice", `chosen` is the rule); nothing is chosen on test examples.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: processes, not threads, share a CPU

from study_cells import METHODS, TASKS, Cell, Group
from study_lines import LINES, Lines, commit, shown
from study_work import work


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    lines = Lines(args.lines)
    if args.report:
        from study_report import write_report

        for path in write_report(lines):
            print(path)
    elif args.only:
        _one_again(lines, args.runs / "again", *args.only)
    else:
        _run(args, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["icd10"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alphas", nargs="+", help="default: all of a task")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--again", action="store_true", help="run what has a line, too")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--only", nargs=4, metavar=("METHOD", "TASK", "ALPHA", "SEED"))
    return parser


def _one_again(lines: Lines, runs: Path, method: str, task: str, alpha: str, seed: str) -> None:
    cell = Cell(task, alpha, int(seed), method)
    (line,) = work(Group.of_runs([cell], lines), runs, commit(), None)
    for name, found in (("now", line), ("recorded", lines.runs().get(cell))):
        print(f"{name:9} {shown(found) if found else 'no line'}")


def _run(args: argparse.Namespace, lines: Lines) -> None:
    """Choices first, then the cells, each group of cells in a process of its own."""
    now, context = commit(), get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for task in args.tasks:
            before = None
            while (left := _untried(args, lines, task)) not in ([], before):
                size = math.ceil(len(left) / args.jobs)  # neighbours share first stages
                parts = [left[i : i + size] for i in range(0, len(left), size)]
                groups = [Group.of_choices(task, part) for part in parts]
                list(pool.map(work, *_spread(groups, args, now)))
                before = left  # what failed twice is left
        list(pool.map(work, *_spread(_left(args, lines), args, now)))


def _untried(args: argparse.Namespace, lines: Lines, task: str) -> list[tuple[str, float]]:
    """Methods and scales that the choices of a task still need."""
    return [(method, scale) for method in args.methods for scale in lines.untried(task, method)]


def _left(args: argparse.Namespace, lines: Lines) -> list[Group]:
    """The cells that have no line, by task, alpha and seed."""
    done = set() if args.again else set(lines.runs())
    groups = []
    for task in args.tasks:
        for alpha in TASKS[task].alphas:
            for seed in args.seeds if not args.alphas or alpha in args.alphas else ():
                cells = [Cell(task, alpha, seed, method) for method in args.methods]
                groups.append(Group.of_runs([c for c in cells if c not in done], lines))
    return groups


def _spread(groups: list[Group], args: argparse.Namespace, now: str) -> list[list]:
    """The arguments of `work`, one list each."""
    groups = [group for group in groups if group.cells]
    count = len(groups)
    same = (args.runs, now, args.lines, args.again)
    return [groups, *([value] * count for value in same)]


if __name__ == "__main__":
    main()
