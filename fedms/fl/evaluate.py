"""Scores of a round: every client's model on its own test split and on everyone's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedms.fl.algorithms import Stage
from fedms.fl.client import initial_kept, log_prior
from fedms.fl.data.federation import ClientData, Federation
from fedms.fl.data.sampling import generator
from fedms.fl.model.resident import Resident
from fedms.fl.runs.records import ClientScore, Spread
from fedms.fl.types import State


@dataclass(frozen=True)
class Scores:
    """All that is evaluated after a round; no global accuracy where there is no global expert."""

    global_accuracy: float | None
    clients: tuple[ClientScore, ...]


def spread(values: Sequence[float]) -> Spread | None:
    """Mean, population standard deviation, mean of the worst tenth and minimum, or None.

    The worst tenth is at least one value; None is for no values.
    """
    if not values:
        return None
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    worst = ordered[: max(1, math.ceil(len(ordered) / 10))]
    return Spread(
        float(ordered.mean()), float(ordered.std()), float(worst.mean()), float(ordered[0])
    )


def pooled_sample(federation: Federation, size: int, seed: int) -> np.ndarray:
    """Everyone's test examples, or ``size`` of them drawn once for the whole run."""
    everyone = np.sort(np.concatenate([client.test for client in federation.clients]))
    if not size or size >= len(everyone):
        return everyone
    return np.sort(generator(seed, "pooled").choice(everyone, size=size, replace=False))


@torch.no_grad()
def evaluate(
    resident: Resident,
    stage: Stage,
    server_state: State,
    kept: Mapping[str, State],
    federation: Federation,
    pooled: np.ndarray,
    advance: Callable[[int], object] = lambda n: None,
) -> Scores:
    """Score the global expert and every client's own model.

    Args:
        server_state: what the server holds; a client that has never been visited starts from it.
        kept: by client id, what each client holds of its own.
        pooled: the examples that stand for everyone's.
        advance: hears 1 after each client.
    """
    resident.load(server_state)
    unseen = {client.client_id for client in federation.unseen}
    personal = stage.predicts in ("local", "mixture")
    has_global = stage.predicts != "local" or "global." in stage.frozen
    path = () if stage.predicts == "base" else ("global",)
    hits: dict[int, bool] = {}
    if has_global:
        tests = np.unique(
            np.concatenate([*(client.test for client in federation.everyone.values()), pooled])
        )
        hits = dict(zip(tests.tolist(), _hits(resident, tests, path, frozen=personal), strict=True))
    scores: list[ClientScore] = []
    for client in federation.everyone.values():
        own, weight = hits, None
        if personal:
            resident.load(
                {**initial_kept(resident, stage, server_state), **kept.get(client.client_id, {})}
            )
            own, weight = _personal_hits(resident, stage, client, np.union1d(client.test, pooled))
        scores.append(
            ClientScore(
                client_id=client.client_id,
                seen=client.client_id not in unseen,
                num_test=len(client.test),
                accuracy=_mean(own, client.test),
                pooled_accuracy=_mean(own, pooled),
                gate_local=weight,
            )
        )
        advance(1)
    seen_tests = np.concatenate([client.test for client in federation.clients])
    return Scores(_mean(hits, seen_tests) if has_global else None, tuple(scores))


@torch.no_grad()
def global_score(resident: Resident, server_state: State, federation: Federation) -> float | None:
    """What SAL watches: the global expert's accuracy on all clients' validation examples.

    None where there are none.
    """
    examples = np.concatenate([client.val for client in federation.clients])
    if not len(examples):
        return None
    resident.load(server_state)
    return float(np.mean(_hits(resident, examples, ("global",), frozen=False)))


def _mean(hits: Mapping[int, bool], indices: np.ndarray) -> float:
    return float(np.mean([hits[i] for i in indices.tolist()]))


def _hits(
    resident: Resident, indices: np.ndarray, path: tuple[str, ...], *, frozen: bool
) -> list[bool]:
    z = resident.frozen_features(indices, path) if frozen else resident.all_features(indices, path)
    return (resident.log_probs(z).argmax(-1) == resident.labels[indices]).tolist()


def _personal_hits(
    resident: Resident, stage: Stage, client: ClientData, indices: np.ndarray
) -> tuple[dict[int, bool], float | None]:
    if stage.predicts == "local":
        return dict(
            zip(indices.tolist(), _hits(resident, indices, ("local",), frozen=False), strict=True)
        ), None
    size, prior = resident.config.eval.batch_size, log_prior(resident, client)
    hits: dict[int, bool] = {}
    weights: dict[int, float] = {}
    by_length = indices[np.argsort(resident.lengths[indices], kind="stable")]
    for start in range(0, len(by_length), size):
        batch = by_length[start : start + size]
        log_p, w = resident.mixture(batch, prior)
        hits.update(
            zip(batch.tolist(), (log_p.argmax(-1) == resident.labels[batch]).tolist(), strict=True)
        )
        weights.update(zip(batch.tolist(), w[:, 1].tolist(), strict=True))
    return hits, float(np.mean([weights[i] for i in client.test.tolist()]))
