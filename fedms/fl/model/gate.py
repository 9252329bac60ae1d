"""The Mixture of Foundation Models (MoFM): two experts and the gate network that weighs them.

FedMS, arXiv 2312.15926: a global and a local expert are joined by a gate network with an inserted
gate adapter, and that adapter takes part in the aggregation of every round of stage 2. What the
gate reads and where the experts meet is this library's reading; see DESIGN.md.

Shapes: B examples, C classes, D features. Weights are [B, 2], column 0 the global expert, column 1
the local one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_STATISTICS = 10


class Gate(nn.Module):
    """Adapter (bottleneck, residual), then a linear and a softmax over the two experts.

    Parameters named ``adapter.*`` are the gate adapter: sent and averaged. ``linear.*`` stays on
    its client. Starts at one half each.
    """

    def __init__(self, num_inputs: int, bottleneck: int) -> None:
        super().__init__()
        self.adapter = nn.Sequential(
            nn.Linear(num_inputs, bottleneck), nn.GELU(), nn.Linear(bottleneck, num_inputs)
        )
        self.linear = nn.Linear(num_inputs, 2)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [B, F] -> weights [B, 2] that sum to one."""
        return self.linear(inputs + self.adapter(inputs)).softmax(-1)


def gate_width(gate_input: str, num_features: int) -> int:
    """F, the number of inputs of the gate for a setting of ``mofm.gate_input``."""
    return {"experts": NUM_STATISTICS, "base": num_features, "both": NUM_STATISTICS + num_features}[
        gate_input
    ]


def statistics(log_g: Tensor, log_l: Tensor, log_prior: Tensor) -> Tensor:
    """What the two experts say about an example, for a rule that clients with other labels share.

    Args:
        log_g, log_l: log-probabilities of the global and local expert, [B, C].
        log_prior: the client's own log label frequencies, smoothed, [C]. They never leave it.

    Returns:
        [B, 10], each about -1..1: per expert the entropy over log C, the two largest probabilities,
        and how familiar the client is with what the expert predicts (expected log prior against the
        uniform one); then whether the two agree on the class, and the Bhattacharyya overlap of
        their distributions.
    """
    scale = math.log(log_g.shape[-1])
    columns: list[Tensor] = []
    for log_p in (log_g, log_l):
        p = log_p.exp()
        columns += [
            -(p * log_p).sum(-1) / scale,
            *p.topk(2, dim=-1).values.unbind(-1),
            (p @ log_prior) / scale + 1.0,
        ]
    agree = (log_g.argmax(-1) == log_l.argmax(-1)).to(log_g.dtype)
    return torch.stack([*columns, agree, (0.5 * (log_g + log_l)).exp().sum(-1)], dim=-1)


def log_prior_of_counts(counts: Tensor) -> Tensor:
    """Log label frequencies [..., C] of examples per class [..., C], with one more for each."""
    smoothed = counts + 1.0
    return (smoothed / smoothed.sum(-1, keepdim=True)).log()


def mean_frequencies(counts: Iterable[np.ndarray]) -> Tensor:
    """float64 [C], sum 1: the mean over clients of their label frequencies.

    Args:
        counts: each client's examples per class [C]; smoothed as by :func:`log_prior_of_counts`.
    """
    total, number = torch.zeros(()), 0
    for own in counts:
        total = total + log_prior_of_counts(torch.from_numpy(own).double()).exp()
        number += 1
    return total / number


def mixed_log_p(how: str, weights: Tensor, log_g: Tensor, log_l: Tensor) -> Tensor:
    """Log-probabilities [B, C] of the mixture of two experts' distributions.

    Args:
        how: "probabilities": w_g p_g + w_l p_l; "logits": softmax of the weighted logits (which
            differ from log-probabilities by a constant a row, so those serve).
        weights: [B, 2].
        log_g, log_l: the experts' log-probabilities, [B, C].
    """
    w_g, w_l = weights[:, :1], weights[:, 1:]
    if how == "logits":
        return F.log_softmax(w_g * log_g + w_l * log_l, dim=-1)
    # at a weight of exactly 0 the log's gradient would be NaN
    least = torch.finfo(weights.dtype).tiny
    return torch.logaddexp(w_g.clamp(min=least).log() + log_g, w_l.clamp(min=least).log() + log_l)


def mixed_features(weights: Tensor, z_g: Tensor, z_l: Tensor) -> Tensor:
    """The weighted sum of two experts' features [B, D], at the weighted mean of their lengths.

    For unit features that is the normalised sum.
    """
    w_g, w_l = weights[:, :1], weights[:, 1:]
    length = w_g * z_g.norm(dim=-1, keepdim=True) + w_l * z_l.norm(dim=-1, keepdim=True)
    return F.normalize(w_g * z_g + w_l * z_l, dim=-1) * length
