"""Ratios to the frozen layer as a markdown table: `python bench/table.py [--smoke] [--seconds S]`.

The rows of a case run in turn; the table has the median over rounds of each row's time divided by
the frozen row's in the same round. `--threads 1 --cpu` counts one thread's processor time, for a
busy machine.

`extra` is what LoRA adds to the frozen layer's time as a share of what it adds in peft ("none"
where the layer with LoRA is the faster one); `over cast` is the native row over the `cast` row of
bf16 cases (rows.py). The tables behind it are microseconds of a tiny layer, where only the calls
count, and of decoding: forwards of peft's layer with few tokens.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from cases import DECODING, SHAPES, SMOKE, Case, cpu_cases
from layers import decoding_rows, same, tiny_rows
from rows import checked, problem, rows
from timing import Parts, Times, add_options, interleaved, ratios, set_up

ROWS = ["peft", "stacked", "native"]


def measured(case: Case, seconds: float, rounds: int, clock) -> Times:
    """The case's times, after a check of every row. Raises AssertionError for a wrong one."""
    found = rows(case, problem(case, torch.device("cpu")))
    found = {name: row for name, row in found.items() if name in ("frozen", "cast", *ROWS)}
    wrong = {name: said for name, said in checked(found).items() if said}
    if wrong:
        raise AssertionError(f"{case}: {wrong}")
    return interleaved({n: {"both": r.results} for n, r in found.items()}, seconds, rounds, clock)


def line(case: Case, times: dict[str, list[float]]) -> str:
    frozen = times["frozen"]
    cells = [str(case), f"{statistics.median(frozen) / 1e3:.2f}"]
    over = {name: ratios(times[name], frozen) for name in ROWS if name in times}
    for name in ROWS:
        r = over.get(name)
        cells.append(f"{r['median']:.2f} ({r['q1']:.2f}-{r['q3']:.2f})" if r else "-")
    if "native" in over:
        ours = over["native"]["median"]
        cells.append(f"{over['stacked']['median'] / ours:.2f}")
        extra = (ours - 1) / (over["peft"]["median"] - 1)
        cells.append("none" if ours < 1 else f"{extra:.2f}")
        cast = "cast" in times
        cells.append(f"{ratios(times['native'], times['cast'])['median']:.2f}" if cast else "")
    return "| " + " | ".join(cells) + " |"


def microseconds(name: str, runs: dict[str, Parts], seconds: float, rounds: int, clock) -> str:
    same(runs)
    times = interleaved(runs, seconds, rounds, clock)
    medians = [statistics.median(t["both"]) for t in times.values()]
    return f"| {name} | {' | '.join(f'{us:.0f}' for us in medians)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two small shapes")
    add_options(parser, seconds=2.0)
    parser.add_argument("--rounds", type=int, default=9, help="at least so many, 2 or more")
    args = parser.parse_args()
    clock = set_up(args)
    print(
        "| case | frozen, ms | peft | stacked | native | stacked / native | extra, native / peft "
        "| over cast |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in cpu_cases(SMOKE if args.smoke else SHAPES):
        if args.match in str(case):
            times = measured(case, args.seconds, args.rounds, clock)
            print(line(case, {n: t["both"] for n, t in times.items()}), flush=True)
    if args.match in "tiny":
        runs = tiny_rows()
        print(f"\n| forward + backward, us | {' | '.join(runs)} |")
        print("| --- " * (len(runs) + 1) + "|")
        print(microseconds("4x32x32 fp32 r4 E1", runs, args.seconds, 500, clock))
    if args.match in "decoding":
        print("\n| forward alone, us | frozen | peft | drop-in |\n| --- | --- | --- | --- |")
        for m, k, n in DECODING:
            name, runs = f"{m}x{k}x{n} fp32 r16 E1", decoding_rows(m, k, n, 16)
            print(microseconds(name, runs, args.seconds, 100, clock), flush=True)


if __name__ == "__main__":
    main()
