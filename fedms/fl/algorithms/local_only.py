"""local only: every client trains an expert on its own data from start to end.

Trained: a local expert.
Sent: nothing.
Kept: the local expert.
Predicted: by the local expert.
"""

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
