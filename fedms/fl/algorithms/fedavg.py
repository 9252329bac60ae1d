"""Federated averaging of LoRA, A and B separately (FedAvg; FedIT).

FedAvg is arXiv 1602.05629, FedIT arXiv 2305.05644.

Averaging the factors is inexact: the mean of B times the mean of A is not the mean of BA.
"""

from __future__ import annotations

from fedms.fl.algorithms.stage import Stage
from fedms.fl.config import Config, StageConfig


def global_expert(name: str, settings: StageConfig) -> Stage:
    """Rounds of federated averaging of the global expert."""
    return Stage(name=name, settings=settings, trains=("global.",), shares=("global.",))


def stages(config: Config) -> tuple[Stage, ...]:
    return (global_expert("stage1", config.stage1), global_expert("stage2", config.stage2))
