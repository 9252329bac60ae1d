"""FedAvg-LoRA + not-true fine-tuning: distilled from the global expert over the wrong classes.

Fine-tuning with the loss of FedNTD (arXiv 2106.03097): the local expert learns the client's own
classes and keeps what the global one says about all others.

Trained: stage 1 the global expert; stage 2 a local expert that starts from it.
Sent: stage 1 the global expert; stage 2 nothing.
Kept: the local expert.
Predicted: by the local expert.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.fedavg_ft import local_expert
from fedms.fl.algorithms.losses import NotTrue
from fedms.fl.algorithms.stage import Phase, Rounds, Stage
from fedms.fl.settings import NotNegative, Positive, Section


class Settings(Section):
    """Not-true fine-tuning."""

    beta: NotNegative = 1.0
    """Weight of the divergence; 0: plain fine-tuning."""
    tau: Positive = 1.0
    """Temperature of both softmaxes."""


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    first, second = rounds
    loss = NotTrue("local", "global", settings.beta, settings.tau)
    tuned = replace(local_expert(*second), phases=(Phase(("local.*",), loss),))
    return global_expert(*first), tuned
