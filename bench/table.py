"""Ratios to the frozen layer as a markdown table: `python bench/table.py [--smoke] [--seconds S]`.

The rows of a case run in turn, round after round, so that a machine that speeds up or slows down
does so for all of them; the table has the median over rounds of each row's time divided by the
frozen row's in the same round.
`--threads 1 --cpu` counts one thread's processor time, for a busy machine.

`extra` is what LoRA adds to the frozen layer's time as a share of what it adds in peft ("none"
where the layer with LoRA is the faster one); `over cast` is the native row over the `cast` row of
bf16 cases (gated_lora_cases.py). The tables behind it are microseconds of a tiny layer, where only
the calls count, and of decoding: forwards of peft's layer with few tokens.
"""

from __future__ import annotations

import argparse
import statistics

from gated_lora_cases import (
    DECODING,
    SHAPES,
    SMOKE,
    Case,
    cases,
    check,
    decoding_rows,
    rows,
    tiny_rows,
)
from interleaved import add_options, measure, set_up

ROWS = ["peft", "stacked", "native"]


def line(case: Case, times: dict[str, list[float]]) -> str:
    frozen = times["frozen"]
    cells = [str(case), f"{statistics.median(frozen) * 1e3:.2f}"]
    ratios = {}
    for name in ROWS:
        if name not in times:
            cells.append("-")
            continue
        each = [t / f for t, f in zip(times[name], frozen, strict=True)]
        ratios[name] = statistics.median(each)
        low, _, high = statistics.quantiles(each, n=4)
        cells.append(f"{ratios[name]:.2f} ({low:.2f}-{high:.2f})")
    if "native" in ratios:
        cells.append(f"{ratios['stacked'] / ratios['native']:.2f}")
        extra = (ratios["native"] - 1) / (ratios["peft"] - 1)
        cells.append("none" if ratios["native"] < 1 else f"{extra:.2f}")
        over = [n / c for n, c in zip(times["native"], times.get("cast", []), strict=False)]
        cells.append(f"{statistics.median(over):.2f}" if over else "")
    return "| " + " | ".join(cells) + " |"


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
    listed = cases(SMOKE if args.smoke else SHAPES)
    if not args.smoke:
        listed += [Case(1576, 768, 768, 8, 1, False, bf16, 0.1) for bf16 in (False, True)]
    for case in filter(lambda c: args.match in str(c), listed):
        found = rows(case)
        check(found, case)
        times = measure(found, args.seconds, args.rounds, clock)
        print(line(case, times), flush=True)
    if args.match in "tiny":
        found = tiny_rows()
        check(found)
        print(f"\n| forward + backward, us | {' | '.join(found)} |")
        print("| --- " * (len(found) + 1) + "|")
        print(microseconds("4x32x32 fp32 r4 E1", measure(found, args.seconds, 500, clock)))
    if args.match in "decoding":
        print("\n| forward alone, us | frozen | peft | drop-in |\n| --- | --- | --- | --- |")
        for m, k, n in DECODING:
            found = decoding_rows(m, k, n, 16)
            check(found)
            times = measure(found, args.seconds, 100, clock)
            print(microseconds(f"{m}x{k}x{n} fp32 r16 E1", times), flush=True)


def microseconds(name: str, times: dict[str, list[float]]) -> str:
    return f"| {name} | {' | '.join(f'{statistics.median(t) * 1e6:.0f}' for t in times.values())} |"


if __name__ == "__main__":
    main()
