"""FedAvg of LoRA, then every client fine-tunes its own copy (FedAvg-FT, arXiv 2108.07313).

The strong simple rival.
"""

from __future__ import annotations

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.losses import CrossEntropy, Expert
from fedms.fl.algorithms.stage import Phase, Rounds, Stage, StageConfig
from fedms.fl.types import State, renamed


def from_global(received: State, kept: State) -> State:
    """A client's local expert starts as the global one."""
    return {**received, **renamed(received, "global.", "local."), **kept}


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
