"""Every client on its own: a local expert on its own data from start to end, nothing sent."""

from __future__ import annotations

from collections.abc import Sequence

from fedms.fl.algorithms.losses import CrossEntropy, Expert
from fedms.fl.algorithms.stage import Phase, Stage
from fedms.fl.config import StageConfig


def stages(rounds: Sequence[tuple[str, StageConfig]]) -> tuple[Stage, ...]:
    return tuple(
        Stage(
            name=name,
            settings=settings,
            phases=(Phase(("local.*",), CrossEntropy("local")),),
            experts=("local",),
            common=None,
            predict=Expert("local"),
        )
        for name, settings in rounds
    )
