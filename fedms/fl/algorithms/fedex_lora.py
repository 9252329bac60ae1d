"""FedEx-LoRA: averages are made exact by adding mean(BA) - mean(B) mean(A) to the base.

arXiv 2410.09432. The correction ``base.<layer>`` [N, K] is in units of B A: a layer scales it as it
scales its experts.

Trained: the global expert.
Sent: the global expert; it and the correction, as large as the layers, are sent back.
Kept: nothing.
Predicted: by the global expert on the corrected base.
"""

from __future__ import annotations

from dataclasses import replace

from fedms.fl.algorithms.fedavg import global_expert
from fedms.fl.algorithms.stage import Aggregate, Rounds, Stage, mean_finish
from fedms.fl.types import State


def products(state: State) -> State:
    """``base.<layer>``: B A [N, K] of every layer of the global expert."""
    layers = [n.split(".", 1)[1][: -len(".lora_A")] for n in state if n.endswith(".lora_A")]
    pairs = {layer: [state[f"global.{layer}.lora_{x}"] for x in "BA"] for layer in layers}
    return {f"base.{layer}": B @ A for layer, (B, A) in pairs.items()}


def with_products(sent: State) -> State:
    return {**sent, **products(sent)}


def finish(server: State, sums: State, weights: dict[str, float]) -> State:
    mean = mean_finish({}, sums, weights)
    inexact = products(mean)
    exact = {name: server.get(name, 0) + mean[name] - inexact[name] for name in inexact}
    return {**server, **mean, **exact}


def stages(rounds: Rounds) -> tuple[Stage, ...]:
    exact = {"receives": ("global.*", "base.*"), "aggregate": Aggregate(with_products, finish)}
    return tuple(replace(global_expert(*each), **exact) for each in rounds)
