"""A middle expert a cluster of like clients on the frozen global one: HiLoRA's second tier.

Clients are alike where their experts write alike. In the first round everybody trains from the same
fresh expert, so B is what a client alone adds to the global one. With U_i the left singular vectors
of client i's B [N, r] in a linear, two clients' affinity is ||U_i' U_j||^2 / r, averaged over the
linears: one minus HiLoRA's distance (which is of a moving average over the rounds before). Clusters
are told apart by the normalised affinity's leading eigenvectors, as many as were asked for or as
the largest gap of its eigenvalues says. From then on each cluster is averaged by itself.

The server holds cluster 0's expert as ``cluster-0.*`` and a client's cluster as
``clusters.<client>``. A client is sent its own cluster's expert alone, as ``cluster.*``. One that
is in no cluster has a fresh expert, which adds nothing: with its first update it joins the cluster
whose expert writes most like its own, and counts there from its next one on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedms.fl.algorithms.stage import Aggregate, Examples, Phase, Stage, StageConfig, of_group
from fedms.fl.model.view import View
from fedms.fl.types import QuorumError, State, renamed, select

PATH = ("cluster", "global")
"""Both experts, whose outputs are added; a trained head stays the global expert's."""


def predict(view: View) -> Tensor:
    """Log-probabilities [P, C] of the cluster's expert on the global one."""
    return view.log_p(*PATH)


def loss(view: View) -> Tensor:
    """Its cross-entropy, [S]."""
    return view.mean(view.nll(*PATH))


def affinity(experts: Sequence[State], others: Sequence[State] | None = None) -> Tensor:
    """[n, m] in [0, 1]: how much the column spaces of B agree, the mean over the linears."""
    others = experts if others is None else others
    found: list[Tensor] = []
    for name in select(experts[0], ("*.lora_B",)):
        left, right = (_directions([each[name] for each in some]) for some in (experts, others))
        r, each = left.shape[-1], right.movedim(0, 1).flatten(1)  # [N, m r]
        rows = [(U.mT @ each).square().sum(0).view(-1, r).sum(-1) for U in left]
        found.append(torch.stack(rows) / r)
    return torch.stack(found).mean(0)


def _directions(B: Sequence[Tensor]) -> Tensor:
    """Left singular vectors [n, N, r], in fp64."""
    return torch.linalg.svd(torch.stack([*B]).double(), full_matrices=False).U


def spectral(affinity: Tensor, clusters: int, eigengap: bool = False) -> list[int]:
    """The cluster of each row of an affinity [n, n], numbered in the order of their first rows.

    Rows go to clusters by a pivoted QR of the eigenvectors (Damle, Minden and Ying, arXiv
    1609.08251): nothing is drawn, and nothing is iterated.

    Args:
        clusters: how many, at most n.
        eigengap: rather as many, from two up to ``clusters``, as stand before the largest gap of
            the eigenvalues. The first gap is left out: real clients have so much in common that it
            is always the largest.
    """
    scale = affinity.sum(1).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * affinity * scale)
    values, vectors = values.flip(0), vectors.flip(1)
    clusters = min(clusters, len(affinity))
    gaps = -values.diff()[1:clusters]
    if eigengap and len(gaps):
        clusters = 2 + int(gaps.argmax())
    coordinates = vectors[:, :clusters]
    left, _, right = torch.linalg.svd(coordinates[_pivots(coordinates)].mT)
    labels = (coordinates @ (left @ right)).abs().argmax(1).tolist()
    order = [*dict.fromkeys(labels)]
    return [order.index(label) for label in labels]


def _pivots(rows: Tensor) -> list[int]:
    """The k of n rows [n, k] that each lie farthest from the span of those before."""
    left, found = rows.clone(), list[int]()
    for _ in range(rows.shape[1]):
        found.append(int(left.norm(dim=1).argmax()))
        direction = left[found[-1]] / left[found[-1]].norm()
        left = left - (left @ direction)[:, None] * direction
    return found


def cluster_of(server: State, client: str) -> str:
    """The number of a client's cluster; "" for none."""
    found = server.get(f"clusters.{client}")
    return "" if found is None else str(int(found))


@dataclass(frozen=True)
class ByCluster:
    """The ``finish`` of an aggregate that is given each client's update: clusters, their means."""

    clusters: int
    eigengap: bool

    @property
    def least(self) -> int:
        """Updates that it takes to make the clusters."""
        return min(self.clusters, 2) if self.eigengap else self.clusters

    def __call__(self, server: State, each: dict[str, State], weights: dict[str, float]) -> State:
        """The server's next state.

        Raises:
            QuorumError: too few updates in the round that makes the clusters.
        """
        cluster = {client: cluster_of(server, client) for client in each}
        new = [client for client in each if not cluster[client]]
        known = sorted({str(int(t)) for t in select(server, ("clusters.*",)).values()})
        joined = dict(zip(new, self._places(server, known, [each[c] for c in new]), strict=True))
        if not known:
            cluster |= joined
        after = {**server, **{f"clusters.{c}": torch.tensor(int(n)) for c, n in joined.items()}}
        for number in sorted({*cluster.values()} - {""}):
            members = [client for client in each if cluster[client] == number]
            mean = _mean([each[c] for c in members], [weights[c] for c in members])
            after |= renamed(mean, "cluster.", f"cluster-{number}.")
        return after

    def _places(self, server: State, known: list[str], sent: list[State]) -> list[str]:
        """The clusters that newcomers join by their first updates."""
        if not sent:
            return []
        if known:
            experts = [select(of_group(server, number), ("cluster.*",)) for number in known]
            return [known[i] for i in affinity(sent, experts).argmax(1).tolist()]
        if len(sent) < self.least:
            raise QuorumError(
                f"{self.least} updates at least make the clusters of mofm.clusters = "
                f"{self.clusters}, {len(sent)} came; lower it or raise server.fraction_train"
            )
        return [str(label) for label in spectral(affinity(sent), self.clusters, self.eigengap)]


def _mean(states: Sequence[State], weights: Sequence[float]) -> State:
    """Summed in fp64."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return {
        name: torch.tensordot(shares, torch.stack([s[name].double() for s in states]), 1).to(
            t.dtype
        )
        for name, t in states[0].items()
    }


def clustered(settings: StageConfig, clusters: int, eigengap: bool, examples: Examples) -> Stage:
    """Rounds in which each cluster trains an expert of its own."""
    finish = ByCluster(clusters, eigengap)
    return Stage(
        name="clusters",
        settings=settings,
        phases=(Phase(("cluster.*.lora_?",), loss, examples),),
        experts=PATH,
        shares=("cluster.*.lora_?",),
        frozen=("global.*",),
        aggregate=Aggregate(finish=finish, each=True),
        group=cluster_of,
        predict=predict,
        budgets=False,  # affinity is one of whole experts
        least=finish.least,
    )
