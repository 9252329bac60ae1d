"""Ditto: a personal model is pulled to the global one, without changing it. arXiv 2012.04221.

Trained: the global expert, then a local one: twice the steps of FedAvg.
Sent: the global expert.
Kept: the local expert.
Predicted: by the local expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.fedavg_ft import from_global
from fedms.fl.algorithms.losses import Expert
from fedms.fl.algorithms.stage import Phase, Rounds, Stage
from fedms.fl.model.view import View
from fedms.fl.settings import NotNegative, Section
from fedms.fl.types import renamed


class Settings(Section):
    pull: NotNegative = 0.1
    """The paper's lambda: weight of half the squared distance from the received global model."""


@dataclass(frozen=True)
class Personal:
    """The local expert's cross-entropy + lambda / 2 |v - w_received|^2, [S]."""

    pull: float

    def __call__(self, view: View) -> Tensor:
        received = renamed(view.began, "global.", "local.")
        return view.mean(view.nll("local")) + self.pull / 2 * view.drift("local.*", received)


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    personal = Phase(("local.*",), Personal(settings.pull))
    shared = [global_expert(*each) for each in rounds]
    more = {"experts": ("global", "local"), "start": from_global, "predict": Expert("local")}
    return tuple(replace(s, phases=(*s.phases, personal), **more) for s in shared)
