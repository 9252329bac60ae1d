"""FedDPA-F: a global and a local expert in every linear, weighed by likeness to own examples.

arXiv 2403.19211. The local expert is fine-tuned from the federated one. At an answer the local
expert weighs w times the mean cosine of the example's features, under the local expert, with those
of a few of the client's own training examples; the global one weighs the rest.

Trained: stage 1 the global expert; stage 2 a local expert that starts from it.
Sent: stage 1 the global expert; stage 2 nothing.
Kept: the local expert.
Predicted: by both experts, mixed in every linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.fedavg_ft import local_expert
from fedms.fl.algorithms.stage import Rounds, Stage
from fedms.fl.model.view import View
from fedms.fl.settings import Section, Share


class Settings(Section):
    """FedDPA-F."""

    weight: Share = 0.5
    """w, the most that the local expert weighs."""
    examples: Annotated[int, Field(ge=1, le=1024)] = 5
    """Own training examples that an example is compared with."""


@dataclass(frozen=True)
class Likeness:
    """Weights [B, 2] of the global and the local expert."""

    weight: float
    examples: int

    def __call__(self, view: View) -> Tensor:
        known = view.own(self.examples)
        own, z = (F.normalize(v.first(v.features("local")), dim=-1) for v in (known, view))
        means = torch.stack([part.mean(0) for part in own.split(self.examples)])  # a client each
        local = self.weight * (z * means[view.first(view.slot)]).sum(-1)
        return torch.stack([1.0 - local, local], dim=-1)


@dataclass(frozen=True)
class Mixed:
    """Log-probabilities [P, C] of both experts, mixed in every linear."""

    weights: Likeness

    def __call__(self, view: View) -> Tensor:
        return view.log_p("global", "local", gates=self.weights(view))


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    first, second = rounds
    mixed = Mixed(Likeness(settings.weight, settings.examples))
    return global_expert(*first), replace(local_expert(*second), predict=mixed)
