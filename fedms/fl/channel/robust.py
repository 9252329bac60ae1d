"""Aggregates that some hostile clients cannot steer: they need every client's update at once.

    median         of each value (Yin et al., arXiv 1803.01498)
    trimmed_mean   of each value, without the f largest and f smallest (the same)
    multi_krum     the mean of the n - f updates whose n - f - 2 nearest neighbours are nearest
                   (Blanchard et al., NeurIPS 2017)
    bipartition    the mean of the larger of two groups into which clients fall by the direction of
                   what they changed (Sattler et al., ICASSP 2020), f at most in the smaller; none
                   counts for more than a median length (Nguyen et al., USENIX Security 2022)

Honest changes may be nearly at right angles, and yet all lie on one side. Turned round they are no
farther from honest ones than those are from each other, so no distance tells; nor are they all
among those farthest out along the direction in which clients differ most (DnC: Shejwalkar &
Houmansadr, NDSS 2021), which is where the search for the groups begins. The sum over many small
cosines tells. Clients who learn the same wrong labels are more alike than honest ones, and the
smaller group all the same. A long change of an honest direction may stay, and counts for one.

f is how many clients of the cohort may be hostile. Clients count alike, since a hostile one can say
any number of examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedms.fl.channel.codec import unflatten
from fedms.fl.types import QuorumError, State

_ROUNDING = 1e-12  # of a sum of cosines


@dataclass(frozen=True)
class Robust:
    """The ``finish`` of an aggregate that is given each client's update, all of the same names.

    Attributes:
        rule: "median", "trimmed_mean", "multi_krum" or "bipartition".
        hostile: f.
        reference: what clients began with, for the rule that looks at what they changed.
    """

    rule: str
    hostile: int
    reference: State

    def __call__(self, server: State, each: dict[str, State], weights: dict[str, float]) -> State:
        """The server's next state.

        Raises:
            QuorumError: too few came back for so many hostile ones.
        """
        sent = [*each.values()]
        names = sorted(sent[0]) if sent else []  # messages name their tensors in any order
        if not names:
            return server  # nobody was drawn, or nothing is shared
        if self.rule in ("median", "trimmed_mean"):
            combine = median if self.rule == "median" else trimmed_mean
            return {**server, **{n: combine(_stack(sent, n), self.hostile) for n in names}}
        vectors = torch.stack([_vector(state, names) for state in sent])
        if self.rule == "multi_krum":
            after = vectors[multi_krum(vectors, self.hostile)].mean(0)
        else:
            began = _vector(self.reference, names)
            after = began + bipartition(vectors - began, self.hostile)
        return {**server, **unflatten(after, {n: list(sent[0][n].shape) for n in names})}


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


def bipartition(changes: Tensor, hostile: int) -> Tensor:
    """[n, d] -> [d], the mean of the larger group, those longer than the median of all n cut to it.

    Of two lengths in the middle that is the shorter.

    Raises:
        QuorumError: half of them may be hostile.
    """
    _require("bipartition", len(changes), hostile)
    lengths = changes.norm(dim=1, keepdim=True).clamp(min=1e-30)
    directions = changes / lengths
    chosen = larger_group(directions @ directions.T, hostile)
    return ((lengths.median() / lengths).clamp(max=1) * changes)[chosen].mean(0)


def larger_group(cosines: Tensor, hostile: int) -> list[int]:
    """n - f of n clients or more, in order, so that groups are most alike within, least across.

    Sought is the most that the cosines [n, n] within groups less those across them sum to (Sattler
    et al. make the largest across least: where all are small, that hangs on one pair). From the f
    that lie farthest out where clients differ most, one or two change sides while that raises it.
    """
    n = len(cosines)
    centred = cosines - cosines.mean(dim=0)
    outward = torch.linalg.eigh(centred - centred.mean(dim=1, keepdim=True)).eigenvectors[:, -1]
    side = torch.ones_like(outward)
    side[outward.abs().argsort(descending=True, stable=True)[:hostile]] = -1
    others = cosines - cosines.diag().diag()  # nobody speaks for itself
    for _ in range(n * n):
        pull = others @ side
        least_fit, leaves = pull.where(side > 0, math.inf).min(dim=0)
        fittest, joins = pull.where(side < 0, -math.inf).max(dim=0)
        if fittest > _ROUNDING:
            side[joins] = 1
        elif least_fit < -_ROUNDING and (side < 0).sum() < hostile:
            side[leaves] = -1
        elif fittest - least_fit > 2 * others[leaves, joins] + _ROUNDING:
            side[leaves], side[joins] = -1, 1
        else:
            break
    return (side > 0).nonzero().flatten().tolist()


def _require(rule: str, n: int, hostile: int) -> None:
    if n < least(rule, hostile):
        raise QuorumError(
            f"{rule} against {hostile} hostile clients needs {least(rule, hostile)} updates, "
            f"{n} came; lower channel.hostile or raise server.fraction_train"
        )


def _vector(state: State, names: list[str]) -> Tensor:
    """These of its tensors as one, fp64 [d]."""
    return torch.cat([state[name].flatten().double() for name in names])


def _stack(sent: list[State], name: str) -> Tensor:
    """[n, ...] in fp32 or wider."""
    values = torch.stack([state[name] for state in sent])
    return values.float() if values.dtype.itemsize < 4 else values
