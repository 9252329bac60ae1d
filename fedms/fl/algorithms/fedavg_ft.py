"""FedAvg-LoRA + fine-tuning: then every client trains its own copy; arXiv 2108.07313.

The strong simple rival.

Trained: stage 1 the global expert; stage 2 a local expert that starts from it.
Sent: stage 1 the global expert; stage 2 nothing.
Kept: the local expert.
Predicted: by the local expert.
"""

from __future__ import annotations

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.losses import CrossEntropy, Expert
from fedms.fl.algorithms.stage import Phase, Rounds, Stage, StageConfig
from fedms.fl.types import State, renamed, select


def from_global(received: State, kept: State) -> State:
    """A client's local expert starts as the global one."""
    return {**received, **renamed(received, "global.", "local."), **kept}


def under_global_head(received: State, kept: State) -> State:
    """A client's local expert starts fresh, under the global one's head where that is trained.

    A linear head starts from zero: a client that no cohort has drawn yet would answer by chance.
    """
    head = renamed(select(received, ("global.head.*",)), "global.", "local.")
    return {**received, **head, **kept}


def local_expert(name: str, settings: StageConfig) -> Stage:
    """Rounds in which clients train a local expert each, beside the frozen global one."""
    return Stage(
        name=name,
        settings=settings,
        phases=(Phase(("local.*",), CrossEntropy("local")),),
        experts=("global", "local"),
        frozen=("global.*",),
        start=from_global,
        predict=Expert("local"),
    )


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    first, second = rounds
    return global_expert(*first), local_expert(*second)
