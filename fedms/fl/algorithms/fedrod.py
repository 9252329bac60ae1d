"""FedRoD: a generic head that learns all classes alike, and a personal one added to it.

arXiv 2107.00778. The balanced softmax trains features and generic head; the personal head is linear
in the same features, starts at zero, and no gradient of its loss reaches what is shared.

Trained: the global expert with the generic head, and the personal head beside them.
Sent: the global expert and the generic head.
Kept: the personal head.
Predicted: by the sum of both heads' logits; the generic head alone is the common model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.losses import BalancedSoftmax
from fedms.fl.algorithms.stage import Phase, Rounds, Stage
from fedms.fl.model.view import View
from fedms.fl.settings import Positive, Section


class Settings(Section):
    """FedRoD."""

    personal_lr: Positive = 0.01
    """AdamW's learning rate of the personal head."""


def personal_head(width: int, num_classes: int) -> nn.Module:
    head = nn.Linear(width, num_classes, bias=False)
    nn.init.zeros_(head.weight)
    return head


def both_heads(view: View) -> Tensor:
    """Log-probabilities [P, C] of generic + personal logits; gradients for the latter alone."""
    generic, z = view.log_p("global").detach(), view.features("global").detach()
    return F.log_softmax(generic + view.call("personal", z), dim=-1)


@dataclass(frozen=True)
class TwoHeads:
    """Balanced softmax of the generic head + cross-entropy of the sum, [S]."""

    def __call__(self, view: View) -> Tensor:
        own = F.nll_loss(both_heads(view), view.targets, reduction="none")
        return BalancedSoftmax("global")(view) + view.mean(own)


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    rates = (("personal.*", settings.personal_lr),)
    phases = (Phase(("global.*", "personal.*"), TwoHeads(), rates=rates),)
    heads = {"heads": ("global",), "modules": (("personal", personal_head),)}
    both = {"phases": phases, "predict": both_heads, **heads}
    return tuple(replace(global_expert(*each), **both) for each in rounds)
