"""Predictions and losses that more than one algorithm uses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedms.fl.model.view import View


@dataclass(frozen=True)
class Expert:
    """The prediction of one expert on the base; of the base alone without a name."""

    name: str = ""

    def __call__(self, view: View) -> Tensor:
        """Log-probabilities [P, C]."""
        return view.log_p(*filter(None, (self.name,)))


@dataclass(frozen=True)
class CrossEntropy:
    """The mean negative log-probability of the right answers by one expert."""

    expert: str

    def __call__(self, view: View) -> Tensor:
        """[S]."""
        return view.mean(view.nll(self.expert))
