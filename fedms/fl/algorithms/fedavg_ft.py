"""FedAvg of LoRA, then every client fine-tunes its own copy (FedAvg-FT, arXiv 2108.07313).

The strong simple rival.
"""

from __future__ import annotations

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.stage import Stage
from fedms.fl.config import Config


def stages(config: Config) -> tuple[Stage, ...]:
    return (
        global_expert("stage1", config.stage1),
        Stage(
            name="stage2",
            settings=config.stage2,
            trains=("local.",),
            frozen=("global.",),
            predicts="local",
        ),
    )
