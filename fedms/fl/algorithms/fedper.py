"""FedPer: the features are everybody's, the head is each client's own; arXiv 1912.00818.

A head of class names is trained from the names on; a newcomer has that head.

Trained: the global expert and the client's head, together.
Sent: the global expert's LoRA.
Kept: the head.
Predicted: by the global expert under the client's head.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.losses import CrossEntropy, Expert
from fedms.fl.algorithms.stage import Phase, Rounds, Stage

HEAD, BODY = "global.head.*", "global.*.lora_?"


def own_head(stage: Stage, *phases: Phase) -> Stage:
    """The stage of federated averaging with a head that stays with its client."""
    heads = {"heads": ("global",), "shares": (BODY,), "common": None, "predict": Expert("global")}
    return replace(stage, phases=phases, **heads)


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    together = Phase((BODY, HEAD), CrossEntropy("global"))
    return tuple(own_head(global_expert(*each), together) for each in rounds)
