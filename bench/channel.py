"""What the channel costs in accuracy: bytes by codec, and privacy by epsilon, as two tables.

    python bench/channel.py [key=value ...] [--seeds 0 1] [--tables bytes privacy]

Both on the default ICD-10 task with a short schedule. Codecs: FedMS, two awake blocks. Privacy: 200
clients of which half are drawn in a round, one awake block, rank 1, and FFA-LoRA beside FedAvg: the
noise grows with the root of the number of values and falls with the number of clients, and what
twenty clients can hide one of them under would leave nothing of the rest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fedms.fl.config import Config, load_config
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.records import RoundRecord
from fedms.fl.runs.method import run_method
from fedms.fl.runs.report import read_rounds

COMMON = [
    "rivals=[]", "data.unseen_clients=0", "sal.trigger=all_at_once", "eval.every=1000",
    "eval.clients=0", "eval.pooled_examples=400",
]  # fmt: skip
BYTES = ["sal.max_blocks=2", "stage1.rounds=5", "stage2.rounds=2"]
CODECS = {
    "none": [],
    "fp16": ["channel.codec=fp16"],
    "int8": ["channel.codec=int8"],
    "top 5 %": ["channel.codec=topk"],
    "int8, and fp16 down": ["channel.codec=int8", "channel.codec_down=fp16"],
}
PRIVACY = [
    "data.num_clients=200", "data.min_partition_size=5", "data.alpha=1.0", "sal.max_blocks=1",
    "lora.r=1", "lora.alpha=2.0", "server.fraction_train=0.5", "server.quorum=0.1",
    "stage1.rounds=20", "stage2.rounds=0", "stage1.batch_size=16", "channel.privacy.clip=0.2",
    "channel.privacy.delta=1e-3",
]  # fmt: skip
BUDGETS = (math.inf, 8.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tables", nargs="+", default=["bytes", "privacy"])
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    print(
        f"Accuracy in %, mean over seeds {', '.join(map(str, args.seeds))}; torch "
        f"{torch.__version__}, settings: {' '.join(args.settings) or 'the defaults'}."
    )
    if "bytes" in args.tables:
        found = last_rounds([*COMMON, *BYTES, *args.settings], list(CODECS.values()), args.seeds)
        print_bytes(dict(zip(CODECS, found, strict=True)))
    if "privacy" in args.tables:
        settings = [*COMMON, *PRIVACY, *args.settings]
        rows = {
            (method, epsilon): [f"method={method}", f"channel.privacy.epsilon={epsilon}"]
            for method in ("fedavg", "ffa_lora")
            for epsilon in BUDGETS
        }
        plain = ["method=fedavg", "channel.privacy.clip=0.0"]
        found = last_rounds(settings, [plain, *rows.values()], args.seeds)
        print_privacy(found[0], dict(zip(rows, found[1:], strict=True)))


def last_rounds(
    settings: list[str], rows: Sequence[list[str]], seeds: Sequence[int]
) -> list[list[list[RoundRecord]]]:
    """The rounds of each row, by seed."""
    found: list[list[list[RoundRecord]]] = [[] for _ in rows]
    for seed in seeds:
        world: World | None = None
        for row, runs in zip(rows, found, strict=True):
            config = load_config(None, [*settings, f"seed={seed}", *row])
            world = world or World(config, Progress(quiet=True))
            runs.append(rounds_of(config, world))
    return found


def rounds_of(config: Config, world: World) -> list[RoundRecord]:
    with tempfile.TemporaryDirectory() as place:
        run_method(config, world, Path(place), Progress(quiet=True))
        return read_rounds(Path(place))


def print_bytes(found: dict[str, list[list[RoundRecord]]]) -> None:
    print("\n| codec | kB up | kB down | own data | everyone's data |")
    print("| --- | --- | --- | --- | --- |")
    for codec, runs in found.items():
        up = statistics.mean(sum(line.bytes_up for line in run) for run in runs) / 1e3
        down = statistics.mean(sum(line.bytes_down for line in run) for run in runs) / 1e3
        print(f"| {codec} | {up:,.0f} | {down:,.0f} | {own(runs)} | {pooled(runs)} |")


def print_privacy(
    plain: list[list[RoundRecord]], found: dict[tuple[str, float], list[list[RoundRecord]]]
) -> None:
    print("\n| method | epsilon | spent | accuracy of the shared model |")
    print("| --- | --- | --- | --- |")
    print(f"| fedavg | no privacy | – | {shared(plain)} |")
    for (method, epsilon), runs in found.items():
        spent = runs[0][-1].epsilon
        what = "inf (clipped)" if math.isinf(epsilon) else f"{epsilon:g}"
        print(
            f"| {method} | {what} | {'–' if spent is None else f'{spent:.2f}'} | {shared(runs)} |"
        )


def own(runs: list[list[RoundRecord]]) -> str:
    return mean([each.mean for run in runs if (each := run[-1].personalized_accuracy)])


def pooled(runs: list[list[RoundRecord]]) -> str:
    return mean([each.mean for run in runs if (each := run[-1].pooled_accuracy)])


def shared(runs: list[list[RoundRecord]]) -> str:
    return mean([each for run in runs if (each := run[-1].global_accuracy) is not None])


def mean(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}" if values else "–"


if __name__ == "__main__":
    main()
