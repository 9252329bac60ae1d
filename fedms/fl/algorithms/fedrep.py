"""FedRep: each client fits its head to the shared features, then moves the features a little.

arXiv 2102.07078. Many steps of the head cost one forward: its features do not change.

Trained: the client's head alone, then the global expert under it.
Sent: the global expert's LoRA.
Kept: the head.
Predicted: by the global expert under the client's head.
"""

from __future__ import annotations

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.fedper import BODY, HEAD, own_head
from fedms.fl.algorithms.losses import CrossEntropy
from fedms.fl.algorithms.stage import Phase, Rounds, Stage
from fedms.fl.settings import Count, Section


class Settings(Section):
    """FedRep."""

    head_steps: Count = 20
    """Full-batch steps of the head in one visit."""


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    body = Phase((BODY,), CrossEntropy("global"))
    head = body.fitting((HEAD,), settings.head_steps)
    return tuple(own_head(global_expert(*each), head, body) for each in rounds)
