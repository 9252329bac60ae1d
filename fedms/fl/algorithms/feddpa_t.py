"""FedDPA-T: in every round a local expert is trained beside the global one, then the global one.

arXiv 2403.19211; prediction as in FedDPA-F. The local expert trains in the mixture, on top of the
frozen global expert as it was received; then the global expert trains alone and is sent. The local
one's trained head, which the paper's language models do not have, starts as the global one's.

Trained: the local expert in the mixture, then the global expert: twice the steps of FedAvg.
Sent: the global expert.
Kept: the local expert.
Predicted: by both experts, mixed in every linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.fedavg_ft import under_global_head
from fedms.fl.algorithms.feddpa_f import Likeness, Mixed
from fedms.fl.algorithms.stage import Phase, Rounds, Stage
from fedms.fl.model.view import View
from fedms.fl.settings import Count, Section, Share


class Settings(Section):
    """FedDPA-T."""

    weight: Share = 0.5
    """w, the most that the local expert weighs at an answer; and its weight while it is trained."""
    examples: Annotated[int, Field(ge=1, le=1024)] = 5
    """Own training examples that an example is compared with."""
    local_steps: Count | None = None
    """Steps of the local expert in one visit; default: those of the stage."""


@dataclass(frozen=True)
class Joint:
    """Cross-entropy of both experts, mixed by a fixed weight in every linear, [S]."""

    weight: float

    def __call__(self, view: View) -> Tensor:
        local = view.first(view.constant(self.weight, 1))
        gates = torch.cat([1.0 - local, local], dim=-1)
        return view.mean(view.nll("global", "local", gates=gates))


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    local = Phase(("local.*",), Joint(settings.weight), steps=settings.local_steps)
    mixed = Mixed(Likeness(settings.weight, settings.examples))
    both = {"experts": ("global", "local"), "start": under_global_head, "predict": mixed}
    shared = [global_expert(*each) for each in rounds]
    return tuple(replace(s, phases=(local, *s.phases), **both) for s in shared)
