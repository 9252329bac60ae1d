"""A round of federated averaging with S clients side by side, on whatever device there is.

    python bench/federated_speed.py [--cohorts 1 8 32] [--rounds 3] [key=value ...]

32 clients, 2 local steps of 8 texts, the default model. Rounds of the settings are interleaved and
medians shown; each begins from the same state, and the losses must agree.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from fedms.fl.algorithms import stages_of
from fedms.fl.client import Visit, visit
from fedms.fl.config import load_config
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress

SMALL = [
    "method=fedavg", "rivals=[]", "data.num_clients=32", "data.unseen_clients=0",
    "data.max_per_category=1", "data.min_partition_size=8", "stage1.local_steps=2",
    "stage1.batch_size=8",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cohorts", type=int, nargs="+", default=[1, 8, 32], metavar="S")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    config = load_config(None, [*SMALL, *args.settings])
    with Progress(quiet=True) as progress:
        world = World(config, progress)
    model, (stage, *_) = world.model, stages_of(config)
    blocks = tuple(range(len(model.backbone.blocks)))[-config.sal.max_blocks :]
    model.slots.set_awake(blocks)
    model.prefix.keep([model.slots.depth])
    visits = [Visit(client, {}, blocks) for client in world.federation.clients]

    def one_round(cohort: int) -> tuple[float, float]:
        """Seconds, and the mean loss."""
        started, losses = time.perf_counter(), []
        for start in range(0, len(visits), cohort):
            for update in visit(model, stage, visits[start : start + cohort], {}, 1, config.seed):
                if isinstance(update, Exception):
                    raise update
                losses.append(update.train_loss)
        return time.perf_counter() - started, statistics.mean(losses)

    _, wanted = one_round(1)  # fills the prefix and warms up
    seconds: dict[int, list[float]] = {cohort: [] for cohort in args.cohorts}
    for _ in range(args.rounds):
        for cohort, times in seconds.items():
            took, loss = one_round(cohort)
            times.append(took)
            assert abs(loss - wanted) < 1e-2 * wanted, f"S = {cohort}: loss {loss}, not {wanted}"
    tokens = float(np.mean(model.task.lengths)) * stage.settings.batch_size
    place = f"{model.backbone.device}, base in {str(model.backbone.dtype).removeprefix('torch.')}"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {place}\n")
    print("| clients side by side | tokens a step | s a round | times as fast as one by one |")
    print("| --- | --- | --- | --- |")
    alone = statistics.median(seconds[args.cohorts[0]])
    best = min(args.cohorts, key=lambda cohort: statistics.median(seconds[cohort]))
    for cohort, times in seconds.items():
        median = statistics.median(times)
        print(f"| {cohort} | {tokens * cohort:.0f} | {median:.2f} | {alone / median:.2f} |")
    print(f"\nNo gain beyond S = {best}, {tokens * best:.0f} tokens a step, among those tried.")


if __name__ == "__main__":
    main()
