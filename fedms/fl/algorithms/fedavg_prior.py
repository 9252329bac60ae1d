"""The prior-adjusted global expert: FedAvg-LoRA, then Bayes' rule for each client's own labels.

Saerens et al., Neural Computation 14 (2002); logit adjustment is arXiv 2007.07314. No client trains
anything of its own: log p = log p_global + tau (log n_c / n - log of everyone's), in closed form.

Trained: the global expert.
Sent: the global expert; once, the client's label frequencies, of which the mean is sent back.
Kept: nothing.
Predicted: by the global expert, moved by the client's own label frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.stage import GLOBAL, Rounds, Stage
from fedms.fl.model.view import View
from fedms.fl.settings import NotNegative, Section


class Settings(Section):
    """The prior-adjusted global expert."""

    tau: NotNegative = 1.0
    """Strength of the client's label frequencies; 1: as Bayes' rule has it, 0: FedAvg-LoRA."""


@dataclass(frozen=True)
class Adjusted:
    """The global expert's log-probabilities [P, C] for each client's own label frequencies."""

    tau: float

    def __call__(self, view: View) -> Tensor:
        return view.adjusted(GLOBAL(view), self.tau)


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    predict = Adjusted(settings.tau)
    return tuple(replace(global_expert(*each), predict=predict) for each in rounds)
