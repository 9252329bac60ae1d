"""FFA-LoRA: A stays as it was drawn, B alone is trained and sent. arXiv 2403.12313.

With one A for everybody the mean of B A is the mean of B times A: averaging is exact.

Trained: B of the global expert (and a trained head).
Sent: what is trained.
Kept: nothing.
Predicted: by the global expert.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.losses import CrossEntropy
from fedms.fl.algorithms.stage import Phase, Rounds, Stage

TRAINED = ("global.*.lora_B", "global.head.*")


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    phases = (Phase(TRAINED, CrossEntropy("global")),)
    return tuple(replace(global_expert(*r), phases=phases, shares=TRAINED) for r in rounds)
