"""Aggregates that some hostile clients cannot steer: they need every client's update at once.

    median         of each value (Yin et al., arXiv 1803.01498)
    trimmed_mean   of each value, without the f largest and f smallest (the same)
    multi_krum     the mean of the n - f updates whose n - f - 2 nearest neighbours are nearest
                   (Blanchard et al., NeurIPS 2017)

f is how many clients of the cohort may be hostile. Clients count alike, since a hostile one can say
any number of examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedms.fl.types import QuorumError, State


@dataclass(frozen=True)
class Robust:
    """The ``finish`` of an aggregate that is given each client's update, all of the same names.

    Attributes:
        rule: "median", "trimmed_mean" or "multi_krum".
        hostile: f.
    """

    rule: str
    hostile: int

    def __call__(self, server: State, each: dict[str, State], weights: dict[str, float]) -> State:
        """The server's next state.

        Raises:
            QuorumError: too few came back for so many hostile ones.
        """
        if not each:
            return server  # nobody was drawn
        sent = [*each.values()]
        if self.rule == "multi_krum":
            vectors = [torch.cat([state[n].flatten().double() for n in sent[0]]) for state in sent]
            chosen = multi_krum(torch.stack(vectors), self.hostile)
            return {**server, **{n: _stack(sent, n)[chosen].mean(0) for n in sent[0]}}
        combine = median if self.rule == "median" else trimmed_mean
        return {**server, **{n: combine(_stack(sent, n), self.hostile) for n in sent[0]}}


def bound(cohort: int, hostile: float) -> int:
    """f, of a cohort of which this share may be hostile."""
    return math.floor(hostile * cohort + 1e-9)  # 0.29 * 100 is 28.999999999999996


def least(rule: str, hostile: int) -> int:
    """Updates that a rule needs against so many hostile clients."""
    return 2 * hostile + (3 if rule == "multi_krum" else 1)


def trimmed_mean(values: Tensor, hostile: int) -> Tensor:
    """[n, ...] -> [...], the mean without the f largest and smallest of each value.

    Raises:
        QuorumError: nothing is left.
    """
    _require("trimmed_mean", len(values), hostile)
    return values.sort(dim=0).values[hostile : len(values) - hostile].mean(0)


def median(values: Tensor, hostile: int) -> Tensor:
    """[n, ...] -> [...], of each value; the mean of the two in the middle where n is even.

    Raises:
        QuorumError: half of them may be hostile.
    """
    _require("median", len(values), hostile)
    return trimmed_mean(values, (len(values) - 1) // 2)


def multi_krum(vectors: Tensor, hostile: int) -> list[int]:
    """The n - f rows of [n, d] that multi-Krum chooses, in order.

    Raises:
        QuorumError: n < 2 f + 3, fewer than the proof needs.
    """
    n = len(vectors)
    _require("multi_krum", n, hostile)
    distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    distances.fill_diagonal_(math.inf)  # no row is its own neighbour
    scores = distances.sort(dim=1).values[:, : n - hostile - 2].sum(dim=1)
    return sorted(scores.argsort(stable=True)[: n - hostile].tolist())


def _require(rule: str, n: int, hostile: int) -> None:
    if n < least(rule, hostile):
        raise QuorumError(
            f"{rule} against {hostile} hostile clients needs {least(rule, hostile)} updates, "
            f"{n} came; lower channel.hostile or raise server.fraction_train"
        )


def _stack(sent: list[State], name: str) -> Tensor:
    """[n, ...] in fp32 or wider."""
    values = torch.stack([state[name] for state in sent])
    return values.float() if values.dtype.itemsize < 4 else values
