"""FedAvg-LoRA + balanced fine-tuning: the local expert's loss is the balanced softmax.

arXiv 2007.10740. Own label frequencies stand in the loss, so the local expert itself answers as if
all classes were alike, and what a client lacks is not unlearned; `prior` puts frequencies back.

Trained: stage 1 the global expert; stage 2 a local expert that starts from it.
Sent: stage 1 the global expert; stage 2 nothing.
Kept: the local expert.
Predicted: by the local expert.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.fedavg_ft import local_expert
from fedms.fl.algorithms.losses import BalancedSoftmax
from fedms.fl.algorithms.stage import Phase, Rounds, Stage


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    first, second = rounds
    phases = (Phase(("local.*",), BalancedSoftmax("local")),)
    return global_expert(*first), replace(local_expert(*second), phases=phases)
