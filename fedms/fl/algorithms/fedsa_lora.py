"""FedSA-LoRA: A and B are trained, A alone is sent; B stays with the client. arXiv 2410.01463.

Trained: A and B of one expert (and a trained head).
Sent: A.
Kept: B (and the head).
Predicted: by everybody's A and the client's own B.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.losses import Expert
from fedms.fl.algorithms.stage import Rounds, Stage


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    half = {"shares": ("global.*.lora_A",), "common": None, "predict": Expert("global")}
    return tuple(replace(global_expert(*each), **half) for each in rounds)
