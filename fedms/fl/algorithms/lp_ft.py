"""LP-FT: after FedAvg-LoRA each client fits a head alone, then that head and its expert.

arXiv 2202.10054: a head that fits already lets fine-tuning leave the features in place. A head of
class names is trained from the names on.

Trained: stage 1 the global expert; stage 2 a head on fixed features, then it and a local expert.
Sent: stage 1 the global expert; stage 2 nothing.
Kept: the local expert and its head.
Predicted: by the local expert and its head.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.fedavg_ft import local_expert
from fedms.fl.algorithms.losses import CrossEntropy
from fedms.fl.algorithms.stage import Phase, Rounds, Stage
from fedms.fl.settings import Count, Section


class Settings(Section):
    """LP-FT."""

    probe_steps: Count = 20
    """Full-batch steps of the head alone in one visit, on features that are computed once."""


def stages(settings: Settings, rounds: Rounds) -> tuple[Stage, ...]:
    first, second = rounds
    tune = Phase(("local.*",), CrossEntropy("local"))
    probe = tune.fitting(("local.head.*",), settings.probe_steps)
    return (
        global_expert(*first),
        replace(local_expert(*second), heads=("local",), phases=(probe, tune)),
    )
