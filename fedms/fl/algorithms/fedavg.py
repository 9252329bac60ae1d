"""FedAvg-LoRA: federated averaging of A and of B (FedAvg, arXiv 1602.05629; FedIT, 2305.05644).

Averaging the factors is inexact: the mean of B times the mean of A is not the mean of BA.

Trained: the global expert.
Sent: the global expert.
Kept: nothing.
Predicted: by the global expert.
"""

from __future__ import annotations

from fedms.fl.algorithms.losses import CrossEntropy
from fedms.fl.algorithms.stage import Phase, Rounds, Stage, StageConfig


def global_expert(name: str, settings: StageConfig) -> Stage:
    """Rounds of federated averaging of the global expert."""
    return Stage(
        name=name,
        settings=settings,
        phases=(Phase(("global.*",), CrossEntropy("global")),),
        experts=("global",),
        shares=("global.*",),
    )


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    return tuple(global_expert(name, settings) for name, settings in rounds)
