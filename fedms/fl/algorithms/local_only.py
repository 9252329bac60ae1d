"""Every client on its own: a local expert on its own data from start to end, nothing sent."""

from __future__ import annotations

from fedms.fl.algorithms.losses import CrossEntropy, Expert
from fedms.fl.algorithms.stage import Phase, Rounds, Stage


def stages(rounds: Rounds) -> tuple[Stage, ...]:
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
