"""Hostile clients against aggregates: the global model's accuracy, attack by rule, as a table.

    python bench/attacks.py [key=value ...] [--share 0.3] [--seeds 0 1] [--rules median ...]

Federated averaging on the default ICD-10 task with a short schedule, one awake block. A share of
the clients is hostile in every round:

    sign flip    they send the opposite of what they changed
    scaling      they send 20 times what they changed
    label flip   their own labels are wrong: class c became C - 1 - c

Two rows say what to compare with: without an attack, and without the hostile clients and their
data, which is all that a filter can reach that finds each of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from fedms.fl.algorithms import Stage
from fedms.fl.client import Visit, received
from fedms.fl.config import Config, load_config
from fedms.fl.data.sampling import generator
from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.world import World
from fedms.fl.journal.progress import Progress
from fedms.fl.journal.states import ClientStates
from fedms.fl.runs.method import run_method
from fedms.fl.runs.report import read_rounds
from fedms.fl.types import ClientFailure, State, Update

SETTINGS = [
    "method=fedavg", "rivals=[]", "data.unseen_clients=0", "data.alpha=1.0", "sal.enabled=false",
    "sal.max_blocks=1", "stage1.rounds=8", "stage2.rounds=0", "stage1.batch_size=16",
    "eval.every=1000", "eval.pooled_examples=0",
]  # fmt: skip
RULES = ("median", "trimmed_mean", "multi_krum", "bipartition")
NONE, LEFT_OUT, LABEL_FLIP = "none", "hostile ones left out", "label flip"
ATTACKS: dict[str, float | None] = {
    NONE: 1.0, LEFT_OUT: None, "sign flip": -1.0, "scaling": 20.0, LABEL_FLIP: 1.0,
}  # fmt: skip
"""What hostile clients multiply their change by; None: they send nothing."""


class Hostile(LocalEngine):
    """Some clients multiply what they changed, or stay away."""

    factor: float | None = 1.0
    hostile: frozenset[str] = frozenset()

    def __init__(
        self, config: Config, world: World, states: ClientStates, progress: Progress
    ) -> None:
        super().__init__(config, world, states, progress)
        self._world = world

    def visit(
        self, stage: Stage, visits: list[Visit], server: State, round: int
    ) -> list[Update | Exception]:
        began = received(self._world.model, stage, server)
        return [self._sent(one, began) for one in super().visit(stage, visits, server, round)]

    def _sent(self, update: Update | Exception, began: State) -> Update | Exception:
        if isinstance(update, Exception) or update.client_id not in self.hostile:
            return update
        if self.factor is None:
            return ClientFailure("it stays away")
        shared = {
            name: began[name] + self.factor * (tensor - began[name])
            for name, tensor in update.shared.items()
        }
        return replace(update, shared=shared)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    rules = ["mean", *args.rules]
    found: dict[tuple[str, str], list[float]] = {}
    for seed in args.seeds:
        settings = [*SETTINGS, f"seed={seed}", f"channel.hostile={args.share}", *args.settings]
        config = load_config(None, settings)
        world = World(config, Progress(quiet=True))
        ids = [client.client_id for client in world.federation.clients]
        count = round(args.share * len(ids))
        chosen = generator(seed, "hostile").choice(ids, count, replace=False).tolist()
        for attack, factor in ATTACKS.items():
            if attack == LABEL_FLIP:  # the last
                flip_labels(world, chosen)
            Hostile.factor, Hostile.hostile = factor, frozenset(chosen)
            for rule in rules if attack != LEFT_OUT else rules[:1]:
                run = config.replace(channel=config.channel.replace(aggregate=rule))
                found.setdefault((attack, rule), []).append(accuracy(run, world))
                print(seed, attack, rule, found[attack, rule][-1], file=sys.stderr, flush=True)
    print_table(found, rules, args)


def flip_labels(world: World, clients: list[str]) -> None:
    """Of what these clients train on; what anybody is scored on stays."""
    labels = world.federation.dataset.labels
    for client_id in clients:
        own = world.federation.client(client_id).own
        labels[own] = len(world.federation.dataset.class_names) - 1 - labels[own]


def accuracy(config: Config, world: World) -> float:
    world.outcomes.clear()  # of other attacks
    with tempfile.TemporaryDirectory() as place:
        run_method(config, world, Path(place), Progress(quiet=True), Hostile)
        score = read_rounds(Path(place))[-1].global_accuracy
    assert score is not None
    return 100 * score


def print_table(
    found: dict[tuple[str, str], list[float]], rules: list[str], args: argparse.Namespace
) -> None:
    print(
        f"Global accuracy in %, mean over seeds {', '.join(map(str, args.seeds))}; "
        f"{args.share:.0%} of the clients hostile; torch {torch.__version__}, "
        f"settings: {' '.join(args.settings) or 'defaults'}."
    )
    mean = {key: statistics.mean(scores) for key, scores in found.items()}
    print("\n| attack |", " | ".join(rules), "|\n|" + " --- |" * (1 + len(rules)))
    for attack in ATTACKS:
        row = [f"{mean[attack, rule]:.1f}" if (attack, rule) in mean else "–" for rule in rules]
        print(f"| {attack} |", " | ".join(row), "|")
    print()
    for rule in rules:
        worst = min(mean[attack, rule] for attack in ATTACKS if attack not in (NONE, LEFT_OUT))
        print(
            f"{rule}: at worst {worst - mean[NONE, 'mean']:+.1f} points from the mean without an "
            f"attack, {worst - mean[LEFT_OUT, 'mean']:+.1f} from that of the honest alone"
        )


if __name__ == "__main__":
    main()
