"""FlexLoRA: the clients' products B A are averaged and cut back to rank r; arXiv 2402.11505.

The mean of B A has a rank of up to r times the clients; its singular value decomposition U S V'
gives the best B = U S and A = V' of rank r. (The paper's clients may differ in r; here all have
one.) FedEx-LoRA keeps what is cut off here, on the base.

Trained: the global expert.
Sent: the global expert, both ways.
Kept: nothing.
Predicted: by the global expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.fedex_lora import with_products
from fedms.fl.algorithms.stage import Aggregate, Rounds, Stage, mean_finish
from fedms.fl.types import State


def finish(server: State, sums: State, weights: dict[str, float]) -> State:
    mean = mean_finish({}, sums, weights)
    for name in [name for name in mean if name.startswith("base.")]:
        U, S, Vh = torch.linalg.svd(mean.pop(name), full_matrices=False)
        layer = name.replace("base.", "global.", 1)
        r = len(mean[f"{layer}.lora_A"])
        mean[f"{layer}.lora_A"] = Vh[:r].contiguous()
        mean[f"{layer}.lora_B"] = U[:, :r] * S[:r]
    return {**server, **mean}


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    exact = Aggregate(with_products, finish)
    return tuple(replace(global_expert(*each), aggregate=exact) for each in rounds)
