"""The foundation model as it is, scored once: the lower bound."""

from __future__ import annotations

from collections.abc import Sequence

from fedms.fl.algorithms.losses import Expert
from fedms.fl.algorithms.stage import Stage
from fedms.fl.config import StageConfig


def stages(rounds: Sequence[tuple[str, StageConfig]]) -> tuple[Stage, ...]:
    _, settings = rounds[0]
    return (Stage("zero_shot", settings.replace(rounds=1), common=Expert()),)
