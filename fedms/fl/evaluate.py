"""Scores of a round: S clients' models side by side, on their own tests and on everyone's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Strict
from torch import Tensor

from fedms.fl.algorithms import Stage
from fedms.fl.algorithms.stage import Predict
from fedms.fl.client import class_counts, received
from fedms.fl.data.federation import ClientData, Federation
from fedms.fl.data.sampling import generator
from fedms.fl.journal.records import ClientScore, Spread
from fedms.fl.model.model import Model
from fedms.fl.model.view import MOST_LOGITS, View
from fedms.fl.settings import Count, Finite, Natural, Section
from fedms.fl.types import Advance, Failure, State


class EvalConfig(Section):
    batch_size: Count = 64
    """Examples in one forward of an evaluation."""
    every: Count = 1
    """Rounds between two evaluations; the last round of each stage is always evaluated."""
    split: Literal["test", "val"] = "test"
    """What clients are scored on; "val": their validation examples, while settings are chosen."""
    clients: Natural = 200
    """Clients whose models are scored, and unseen ones, drawn once for the run; 0 for all."""
    pooled_examples: Natural = 200
    """Everyone's test examples that each client's model is scored on; 0 for all of them."""
    val_examples: Natural = 2000
    """Everyone's validation examples that SAL watches; 0 for all of them."""
    priors: Annotated[tuple[Finite, ...], Strict(False)] = ()
    """More values of ``prior`` at which clients' models are scored, in ``clients.jsonl``."""


@dataclass(frozen=True)
class Tally:
    """A sum of scores over some examples; two of other examples can be added."""

    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float | None:
        """None of no examples."""
        return self.total / self.count if self.count else None

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.total + other.total, self.count + other.count)


@dataclass(frozen=True)
class Scores:
    """All that is evaluated after a round.

    Attributes:
        common: the common model on the tests of those who take part; empty where there is none.
        clients: each client's own model.
        failed: who could not be scored, and why.
    """

    common: Tally
    clients: tuple[ClientScore, ...]
    failed: tuple[Failure, ...] = ()

    @staticmethod
    def merged(parts: Sequence[Scores], clients: Iterable[str]) -> Scores:
        """Those of some clients each as one, in the order of ``clients``.

        A client stands once among those who failed, with its first reason.
        """
        found = {score.client_id: score for part in parts for score in part.clients}
        failed = {each.client_id: each for part in reversed(parts) for each in part.failed}
        common = sum((part.common for part in parts), Tally())
        return Scores(
            common,
            tuple(found[client] for client in clients if client in found),
            tuple(failed[client] for client in sorted(failed)),
        )

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_bytes(content: bytes) -> Scores:
        """What :meth:`to_bytes` wrote; ValueError if it is something else."""
        try:
            record = json.loads(content)
            clients = tuple(ClientScore(**client) for client in record["clients"])
            failed = tuple(Failure(**each) for each in record["failed"])
            return Scores(Tally(**record["common"]), clients, failed)
        except (LookupError, TypeError) as error:
            raise ValueError(f"no scores: {error}") from error


def spread(values: Sequence[float]) -> Spread | None:
    """Mean, population standard deviation, mean of the worst tenth and minimum, or None.

    The worst tenth is at least one value; None is for no values.
    """
    if not values:
        return None
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    worst = ordered[: max(1, math.ceil(len(ordered) / 10))]
    return Spread(
        mean=float(ordered.mean()),
        std=float(ordered.std()),
        worst10=float(worst.mean()),
        min=float(ordered[0]),
        clients=len(ordered),
    )


def pooled_sample(federation: Federation, size: int, seed: int) -> np.ndarray:
    """Everyone's test examples, or ``size`` of them drawn once for the whole run."""
    return _sample([client.test for client in federation.clients], size, seed, "pooled")


def val_sample(federation: Federation, size: int, seed: int) -> np.ndarray:
    """Everyone's validation examples, or ``size`` of them drawn once for the whole run."""
    return _sample([client.val for client in federation.clients], size, seed, "validation")


def scored_sample(clients: Sequence[str], unseen: Sequence[str], size: int, seed: int) -> list[str]:
    """The clients that are scored, then unseen ones: all, or ``size`` of each drawn once."""
    found: list[str] = []
    for ids, name in ((clients, "scored"), (unseen, "scored unseen")):
        if ids:
            chosen: list[int] = _sample([np.arange(len(ids))], size, seed, name).tolist()
            found += [ids[i] for i in chosen]
    return found


def _sample(parts: Sequence[np.ndarray], size: int, seed: int, name: str) -> np.ndarray:
    """``size`` of all the indices, sorted; all of them for 0."""
    everything = np.sort(np.concatenate(parts))
    if not size or size >= len(everything):
        return everything
    return np.sort(generator(seed, name).choice(everything, size=size, replace=False))


@torch.no_grad()
def evaluate(
    model: Model,
    stage: Stage,
    server: State,
    kept: Callable[[str], State],
    federation: Federation,
    clients: Sequence[ClientData],
    pooled: np.ndarray,
    cohort: int = 1,
    advance: Advance = lambda n: None,
) -> Scores:
    """Score the common model and the clients' own models.

    Args:
        server: what the server holds.
        kept: what a client holds of its own.
        clients: those that are scored.
        pooled: the examples that stand for everyone's; none where nobody has them.
        cohort: S, clients side by side.
        advance: hears how many clients are done.
    """
    unseen = {client.client_id for client in federation.unseen}
    if not clients:
        return Scores(Tally(), ())
    sent = received(model, stage, server)
    common: Mapping[int, float] = {}
    tests = [client.test for client in clients if client.client_id not in unseen]
    if stage.common is not None:
        examples = np.unique(np.concatenate([*(client.test for client in clients), pooled]))
        model.slots.load([stage.start(sent, {})])
        common = _score(model, stage.common, None, [clients[0]], [examples])[0][0][0]
    alike = stage.predict is None and stage.prior == 0.0 and not stage.priors
    scores: list[ClientScore] = []
    for start in range(0, len(clients), cohort):
        side_by_side = clients[start : start + cohort]
        if alike:
            found = [([common], {})] * len(side_by_side)
        else:
            model.slots.load([stage.start(sent, kept(c.client_id)) for c in side_by_side])
            examples = [np.union1d(client.test, pooled) for client in side_by_side]
            priors = stage.prior, *stage.priors
            found = _score(model, stage.answer, stage.weights, side_by_side, examples, priors)
        for client, ((own, *others), weights) in zip(side_by_side, found, strict=True):
            scores.append(
                ClientScore(
                    client_id=client.client_id,
                    seen=client.client_id not in unseen,
                    num_test=len(client.test),
                    accuracy=_mean(own, client.test),
                    pooled_accuracy=_mean(own, pooled) if len(pooled) else None,
                    gate_local=_mean(weights, client.test) if weights else None,
                    by_prior={
                        str(prior): (_mean(other, client.test), _mean(other, pooled))
                        for prior, other in zip(stage.priors, others, strict=True)
                    },
                )
            )
        advance(len(side_by_side))
    return Scores(_tally(common, tests), tuple(scores))


def leaving_out(
    score: Callable[[Sequence[ClientData], np.ndarray], Scores],
    clients: Sequence[ClientData],
    examples: np.ndarray,
    everyone: Iterable[ClientData],
    part: Callable[[ClientData], np.ndarray],
) -> Scores:
    """``score(clients, examples)`` without those by whom it fails, and without their examples.

    Args:
        score: of some clients, and of examples that stand for everyone's.
        everyone: whose examples these are.
        part: which ones a client may have among them: its test, or its val.

    Raises:
        Exception: of ``score``, where nobody alone is its cause, or all of several clients are.
    """
    try:
        return score(clients, examples)
    except Exception:
        owners = {each.client_id: each for each in everyone if np.isin(part(each), examples).any()}
        failed: dict[str, Failure] = {}
        for name, client in ({each.client_id: each for each in clients} | owners).items():
            try:
                score([client], np.intersect1d(examples, part(client)))
            except Exception as error:
                failed[name] = Failure(name, f"{type(error).__name__}: {error}")
        able = [client for client in clients if client.client_id not in failed]
        if not failed or (len(clients) > 1 and not able):
            raise
    lost = [part(owner) for name, owner in owners.items() if name in failed]
    left = np.setdiff1d(examples, np.concatenate(lost)) if lost else examples
    return replace(score(able, left), failed=tuple(failed.values()))


@torch.no_grad()
def common_score(
    model: Model, stage: Stage, server: State, federation: Federation, examples: np.ndarray
) -> Tally:
    """What SAL watches: the common model's score on the clients' validation ``examples``.

    Empty where there is no such model.
    """
    if not len(examples) or stage.common is None:
        return Tally()
    model.slots.load([stage.start(received(model, stage, server), {})])
    (scores,), _ = _score(model, stage.common, None, federation.clients[:1], [examples])[0]
    return _tally(scores, [examples])


def _mean(scores: Mapping[int, float], indices: np.ndarray) -> float:
    return float(np.mean([scores[i] for i in indices.tolist()]))


def _tally(scores: Mapping[int, float], parts: Sequence[np.ndarray]) -> Tally:
    """The sum over all examples of ``parts``; of nothing where nothing was scored."""
    values = [scores[i] for part in parts for i in part.tolist()] if scores else []
    return Tally(math.fsum(values), len(values))


ByExample = dict[int, float]


def _score(
    model: Model,
    predict: Predict,
    weigh: Predict | None,
    clients: Sequence[ClientData],
    examples: Sequence[np.ndarray],
    priors: Sequence[float] = (0.0,),
) -> list[tuple[list[ByExample], ByExample]]:
    """For each client, means over answers by example.

    Of the score, once for each of ``priors``; and of the local expert's weight.
    """
    counts = class_counts(model, clients)
    own_examples = [client.own for client in clients]
    most = max(1, MOST_LOGITS // (model.task.num_classes * int(model.task.lengths.max())))
    size = min(model.rows, most)
    by_length = [own[np.argsort(model.task.lengths[own], kind="stable")] for own in examples]
    scores: list[list[Tensor]] = [[] for _ in clients]  # [len(priors), n] each
    weights: list[list[Tensor]] = [[] for _ in clients]
    for start in range(0, max(map(len, examples)), size):
        rows = [own[start : start + size] for own in by_length]
        view = View(model, rows, counts, own=own_examples)
        log_p = predict(view)
        each = [model.task.score(view.adjusted(log_p, a), view.targets) for a in priors]
        values = zip(*map(view.by_example, each), strict=True)
        for own, found in zip(scores, values, strict=True):
            own.append(torch.stack(found))
        if weigh is not None:
            for own, found in zip(weights, view.by_example(weigh(view)[:, 1]), strict=True):
                own.append(found)
    return [
        (
            [
                dict(zip(indices.tolist(), values, strict=True))
                for values in torch.cat(own, dim=1).tolist()
            ],
            dict(zip(indices.tolist(), torch.cat(local).tolist(), strict=True)) if local else {},
        )
        for indices, own, local in zip(by_length, scores, weights, strict=True)
    ]
