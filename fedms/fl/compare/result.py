"""A finished run's scores and costs: what folders of runs and the lines of a study both become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

from fedms.fl.tasks.task import Metric


class Block(NamedTuple):
    """What methods are compared within: the same clients, model, steps and mini-batches.

    Attributes:
        setting: all of it but the seed, in words.
    """

    setting: str
    seed: int


@dataclass(frozen=True)
class Point:
    """Mean scores over clients, more is better: shares in [0, 1], or log2 p a token.

    Attributes:
        own: on a client's own test examples.
        worst10: of them, the mean of the worst tenth of clients.
        everyone: on everyone's; None where nobody has them.
        unseen: of clients that took no part, on their own; None where there are none.
    """

    own: float
    worst10: float
    everyone: float | None
    unseen: float | None


@dataclass(frozen=True)
class Result:
    """One method's finished run.

    Attributes:
        method: names the row that it belongs to in every block.
        label: the same for people.
        algorithm: what the row is a variant of.
        scores: as the method answers.
        by_knob: the same at other values of ``prior``.
        bytes_up, bytes_down: of all clients in all rounds.
        seconds: of the rounds; None: they say nothing, as other work ran beside them.
        cpu_seconds: processor time of the clients' training alone; None: not measured.
        trained_share: of the model's parameters, the most in any round.
        gate: mean weight of the local expert; None where there is no gate.
        knob: the value of ``prior`` that it answers at.
    """

    block: Block
    method: str
    label: str
    algorithm: str
    metric: Metric
    scores: Point
    by_knob: Mapping[float, Point]
    bytes_up: int
    bytes_down: int
    seconds: float | None
    cpu_seconds: float | None
    trained_share: float
    gate: float | None
    knob: float = 0.0

    def at(self, knob: float) -> Point:
        """The scores at a value of the knob."""
        return self.scores if knob == self.knob else self.by_knob[knob]

    @property
    def sent(self) -> int:
        """Bytes either way."""
        return self.bytes_up + self.bytes_down


def balance(point: Point) -> float | None:
    """The mean of own and everyone's."""
    return None if point.everyone is None else (point.own + point.everyone) / 2


class Place(NamedTuple):
    """A point of a frontier."""

    knob: float
    everyone: float
    own: float


def frontier(results: Iterable[Result]) -> list[Place]:
    """Means over runs by rising knob, at the values that all of them were scored at.

    Empty where one of them has no score on everyone's data.
    """
    results = list(results)
    knobs = set[float].intersection(*({result.knob, *result.by_knob} for result in results))
    places = []
    for knob in sorted(knobs):
        points = [result.at(knob) for result in results]
        everyone = [point.everyone for point in points if point.everyone is not None]
        if len(everyone) < len(points):
            return []
        places.append(Place(knob, mean(everyone), mean(point.own for point in points)))
    return places


def own_at(curve: Sequence[Place], everyone: float) -> float | None:
    """The highest own score on a frontier, straight between its knobs, that leaves at least
    ``everyone`` on everyone's data; None where it does not reach that.
    """
    reached = [place.own for place in curve if place.everyone >= everyone]
    for a, b in pairwise(curve):
        if min(a.everyone, b.everyone) < everyone < max(a.everyone, b.everyone):
            share = (everyone - a.everyone) / (b.everyone - a.everyone)
            reached.append(a.own + (b.own - a.own) * share)
    return max(reached, default=None)
