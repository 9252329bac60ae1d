"""centralised: one expert on everybody's examples in one place, the reference without a federation.

In a round it takes as many steps as that many clients take together; AdamW begins anew each round.

Trained: the global expert, on the examples of all clients that take part.
Sent: the expert, by the one place that has them; what the examples themselves weigh is not counted.
Kept: nothing.
Predicted: by the global expert.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.stage import Rounds, Stage
from fedms.fl.settings import Count, Section


class Settings(Section):
    """Centralised training."""

    clients: Count = 20
    """Clients whose local steps a round stands for."""


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    def together(stage: Stage) -> Stage:
        steps = stage.settings.local_steps * settings.clients
        settings_of_all = stage.settings.replace(local_steps=steps)
        return replace(stage, settings=settings_of_all, pooled=True, budgets=False)

    return tuple(together(global_expert(*each)) for each in rounds)
