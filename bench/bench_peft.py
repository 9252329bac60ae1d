"""Training steps of peft models, fused against peft's own layers; checked before they are timed.

    pytest bench -k smoke                          one tiny layer, seconds: for CI
    pytest bench/bench_peft.py -k "not smoke"      every layer and model
    python bench/bench_peft.py                     medians and their ratios as a markdown table

The table's rows are taken in turn, so that a machine that slows down does so for both sides.
`--threads 1 --cpu` counts one thread's processor time, for a busy machine.
"""

from __future__ import annotations

import argparse
import statistics

import pytest
from peft_cases import LAYERS, MODELS, ON_CPU, check, pair, saved_bytes, step
from timing import Clock, add_options, interleaved, ratios, set_up

SIDES = ["peft", "fedms"]
ALL = [*LAYERS, *(name for name in MODELS if "32 images" not in name)]


def _bench(benchmark, name: str, setting: str, side: str, rounds: int) -> None:
    check(name, setting)
    training = pair(name, setting)[side]
    benchmark.group = f"{name}, {setting}"
    benchmark.extra_info |= {"side": side, "saved_bytes": saved_bytes(training)}
    benchmark.pedantic(step(training), rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("setting", ON_CPU)
def test_smoke(benchmark, setting, side):
    _bench(benchmark, "smoke", setting, side, rounds=5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("setting", ON_CPU)
@pytest.mark.parametrize("name", ALL)
def test_step(benchmark, name, setting, side):
    _bench(benchmark, name, setting, side, rounds=7)


def line(name: str, setting: str, seconds: float, clock: Clock) -> str:
    difference = check(name, setting)
    sides = pair(name, setting)
    kept = {side: saved_bytes(training) for side, training in sides.items()}
    runs = {side: {"both": step(sides[side])} for side in SIDES}
    times = {s: t["both"] for s, t in interleaved(runs, seconds, 5, clock).items()}
    medians = {side: statistics.median(values) for side, values in times.items()}
    gain = ratios(times["peft"], times["fedms"])
    cells = [
        name, setting, *(f"{medians[side] / 1e3:.1f}" for side in SIDES),
        f"**{medians['peft'] / medians['fedms']:.2f}** ({gain['q1']:.2f}-{gain['q3']:.2f})",
        *(f"{kept[side] / 2**20:.2f}" for side in SIDES),
        f"{1 - kept['fedms'] / kept['peft']:.0%}", f"{difference:.0e}", str(len(times["peft"])),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, seconds=4.0)
    parser.add_argument("--settings", nargs="+", default=ON_CPU, choices=ON_CPU)
    args = parser.parse_args()
    clock = set_up(args)
    print(
        "| step | setting | peft, ms | fedms, ms | peft / fedms (quartiles) | peft saves, MB | "
        "fedms saves, MB | less | loss curves differ by | rounds |"
    )
    print("| --- " * 10 + "|")
    for name in (one for one in ALL if args.match in one):
        for setting in args.settings:
            print(line(name, setting, args.seconds, clock), flush=True)


if __name__ == "__main__":
    main()
