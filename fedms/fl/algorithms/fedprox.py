"""FedProx: a proximal term keeps a client near what it received. arXiv 1812.06127.

Trained: the global expert.
Sent: the global expert.
Kept: nothing.
Predicted: by the global expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.stage import Phase, Rounds, Stage
from fedms.fl.model.view import View
from fedms.fl.settings import NotNegative, Section


class Settings(Section):
    mu: NotNegative = 0.01
    """Weight of half the squared distance from the received parameters."""


@dataclass(frozen=True)
class Proximal:
    """Cross-entropy + mu / 2 |w - w_received|^2, [S]."""

    mu: float

    def __call__(self, view: View) -> Tensor:
        return view.mean(view.nll("global")) + self.mu / 2 * view.drift("global.*")


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    phases = (Phase(("global.*",), Proximal(settings.mu)),)
    return tuple(replace(global_expert(*each), phases=phases) for each in rounds)
