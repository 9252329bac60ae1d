"""The foundation model as it is, scored once: the lower bound."""

from __future__ import annotations

from fedms.fl.algorithms.stage import Stage
from fedms.fl.config import Config


def stages(config: Config) -> tuple[Stage, ...]:
    return (
        Stage(
            name="zero_shot", settings=config.stage1.replace(rounds=1), trains=(), predicts="base"
        ),
    )
