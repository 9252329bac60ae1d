"""RoLoRA: odd rounds train and average B, even rounds A; arXiv 2409.02346.

While one factor stands still for everybody the mean of B A is the product of the means: averaging
is exact, as in FFA-LoRA, and A is trained all the same.

Trained: B in odd rounds, A in even ones (and a trained head in both).
Sent: what the round trains; both are sent back.
Kept: nothing.
Predicted: by the global expert.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.losses import CrossEntropy
from fedms.fl.algorithms.stage import Phase, Rounds, Stage

ALTERNATING = tuple(
    Phase((f"global.*.{factor}", "global.head.*"), CrossEntropy("global"), turn=turn)
    for factor, turn in (("lora_B", (1, 2)), ("lora_A", (0, 2)))
)


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    return tuple(replace(global_expert(*each), phases=ALTERNATING) for each in rounds)
