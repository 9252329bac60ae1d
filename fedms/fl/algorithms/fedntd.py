"""FedNTD: what the global model knew of the wrong classes is kept by distillation.

arXiv 2106.03097. FedAvg forgets, on each client, the classes that the client lacks; the loss adds
the divergence from the received model over the classes that are not true.

Trained: the global expert.
Sent: the global expert.
Kept: nothing.
Predicted: by the global expert.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.losses import NotTrue
from fedms.fl.algorithms.stage import Phase, Rounds, Stage
from fedms.fl.settings import NotNegative, Positive, Section
from fedms.fl.types import State, renamed


class Settings(Section):
    """FedNTD."""

    beta: NotNegative = 1.0
    """Weight of the divergence; 0: FedAvg-LoRA."""
    tau: Positive = 1.0
    """Temperature of both softmaxes."""


def with_anchor(received: State, kept: State) -> State:
    """The received global expert stays beside the one that is trained, as "anchor"."""
    return {**received, **renamed(received, "global.", "anchor."), **kept}


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    phases = (Phase(("global.*",), NotTrue("global", "anchor", settings.beta, settings.tau)),)
    return tuple(replace(global_expert(*r), phases=phases, start=with_anchor) for r in rounds)
