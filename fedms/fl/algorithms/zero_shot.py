"""zero-shot: the foundation model as it is, scored once; the lower bound.

Trained: nothing.
Sent: nothing.
Kept: nothing.
Predicted: by the base with its frozen head.
"""

from __future__ import annotations

from fedms.fl.algorithms.losses import Expert
from fedms.fl.algorithms.stage import Rounds, Stage


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    _, settings = rounds[0]
    return (Stage("zero_shot", settings.replace(rounds=1), common=Expert()),)
