"""Predictions and losses that more than one algorithm uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class BalancedSoftmax:
    """Cross-entropy of an expert's logits + log n_c, n_c the client's own examples of class c.

    What the expert itself then says is as if all classes were alike; a class that a client does not
    have is not unlearned there. arXiv 2007.10740.
    """

    expert: str

    def __call__(self, view: View) -> Tensor:
        """[S]."""
        return view.mean(view.over(balanced_nll, (self.expert,)))


def balanced_nll(view: View, slot: int, targets: Tensor, log_p: Tensor) -> Tensor:
    """[p], for p answers of one client."""
    log_counts = view.counts[slot].to(log_p.dtype).log()  # -inf: left out of the softmax
    return F.nll_loss(F.log_softmax(log_p + log_counts, dim=-1), targets, reduction="none")


@dataclass(frozen=True)
class NotTrue:
    """Cross-entropy + beta tau^2 KL(teacher || expert) over the classes that are not true.

    Both are softmaxes at temperature tau of the C - 1 other logits. arXiv 2106.03097.
    """

    expert: str
    teacher: str
    beta: float
    tau: float

    def __call__(self, view: View) -> Tensor:
        """[S]."""
        kl = view.over(NotTrueDivergence(self.tau), (self.expert,), (self.teacher,))
        return view.mean(view.nll(self.expert) + self.beta * self.tau**2 * kl)


@dataclass(frozen=True)
class NotTrueDivergence:
    """KL(teacher || expert) over the wrong classes [p], for p answers of one client."""

    tau: float

    def __call__(
        self, view: View, slot: int, targets: Tensor, expert: Tensor, teacher: Tensor
    ) -> Tensor:
        true = F.one_hot(targets, expert.shape[-1]).bool()
        log_q, log_p = (
            (log_p / self.tau).masked_fill(true, -torch.inf).log_softmax(-1)
            for log_p in (expert, teacher.detach())
        )
        return (log_p.exp() * (log_p - log_q).masked_fill(true, 0.0)).sum(-1)
