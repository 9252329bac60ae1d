"""What a federated algorithm is: a tuple of stages, each a value of patterns and functions.

A stage says what clients train, send, keep and predict with. The loop, the engines and the channel
know no algorithm by name; an algorithm that needs an `if` outside its file lacks a hook here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from fedms.fl.algorithms.losses import Expert
from fedms.fl.model.view import View
from fedms.fl.settings import Count, Natural, NotNegative, Positive, Section
from fedms.fl.types import Patterns, State, matches, select

Loss = Callable[[View], Tensor]
"""A view of S clients -> [S], each client's loss. Clients never mix: the caller sums."""
Predict = Callable[[View], Tensor]
"""A view -> log-probabilities [P, C]."""
GLOBAL = Expert("global")
Start = Callable[[State, State], State]
End = Callable[[State, State], State]
Group = Callable[[State, str], str]
Examples = Literal["train", "gate", "own"]
Build = Callable[[int, int], nn.Module]
"""The backbone's width D and the number of classes C -> a small network."""


class StageConfig(Section):
    rounds: Natural
    """Rounds of the stage; 0 leaves it out."""
    local_steps: Count
    """Mini-batches that a client trains on in one visit."""
    batch_size: Count = 32
    """Examples in a mini-batch."""
    lr: Positive = 0.002
    """AdamW's learning rate on the client."""
    head_lr: NotNegative = 0.0
    """AdamW's learning rate of a trained head; 0: ``lr`` for one that the task itself trains, 0.001
    for one that a method trains from the class names on."""
    head_steps: Natural = 0
    """Full-batch steps of the heads alone before the others of a visit, on features that are
    computed once. A linear head starts from zero: without these it is far behind its features."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""


Rounds = Sequence[tuple[str, StageConfig]]
"""The names and settings of a run's stages, in order."""


@dataclass(frozen=True)
class Phase:
    """One optimisation within a visit, by AdamW.

    Functions are module functions or frozen dataclasses with ``__call__``, so that equal stages of
    two algorithms are equal values.

    Attributes:
        trains: patterns of the names that it trains.
        loss: what it lowers.
        examples: of the client: "train", "gate" (kept out of the experts' training) or "own", both.
        whole: each step is on all of these examples at once, in one view.
        steps, lr, weight_decay: default: those of the stage's settings.
        rates: learning rates of their own for some patterns.
        turn: (k, n): it takes part in rounds whose number is k modulo n.
    """

    trains: Patterns
    loss: Loss
    examples: Examples = "own"
    whole: bool = False
    steps: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    rates: tuple[tuple[str, float], ...] = ()
    turn: tuple[int, int] = (0, 1)

    def fitting(self, heads: Patterns, steps: int) -> Phase:
        """The same loss, lowered by full-batch steps of these heads alone."""
        return replace(self, trains=heads, whole=True, steps=steps)


def received_and_kept(received: State, kept: State) -> State:
    """A visit begins with what the server sent, under what the client keeps."""
    return {**received, **kept}


def mean_statistics(sent: State) -> State:
    """What is summed over clients: the parameters as they were sent."""
    return sent


def mean_finish(server: State, sums: State, weights: dict[str, float]) -> State:
    """Every parameter that was sent becomes the senders' mean; others stay as they are."""
    return {**server, **{name: total / weights[name] for name, total in sums.items()}}


@dataclass(frozen=True)
class Aggregate:
    """How a round's updates become the server's next state.

    Attributes:
        statistics: an update's shared state -> what is summed, in fp64.
        finish: (server's state, sums, total weight by name) -> the server's next state; with
            ``each`` (server's state, statistics by client, weight by client).
        weight: what an update weighs: its number of examples, or 1.
        each: nothing is summed, ``finish`` is given every client's statistics. They are held until
            the round ends: memory follows the cohort.
        adds: what clients send is a change already, which ``finish`` adds to what the server holds.
            A codec then sends it as it is, not by how much it differs from what was received.
    """

    statistics: Callable[[State], State] = mean_statistics
    finish: Callable[..., State] = mean_finish
    weight: Literal["examples", "clients"] = "examples"
    each: bool = False
    adds: bool = False


def of_group(server: State, group: str) -> State:
    """The server's state as the members of a group see it; see :attr:`Stage.group`."""
    parts = {name: name.partition(".") for name in server} if group else {}
    own = {
        f"{part.removesuffix(f'-{group}')}.{rest}": server[name]
        for name, (part, _, rest) in parts.items()
        if part.endswith(f"-{group}")
    }
    return {**server, **own}


@dataclass(frozen=True)
class Stage:
    """Some rounds with one rule.

    Attributes:
        name: as written in the metrics.
        settings: rounds, local steps, batch size, learning rate.
        phases: what a client does in a visit, in order; () visits nobody.
        experts: those that take part; each starts from :meth:`fedms.fl.model.slots.Slots.fresh`.
        heads: names that have a trained head of their own, ``<name>.head.weight``, even where the
            task's is frozen; it then starts from that one.
        shares: patterns of the names that a client sends. What a visit leaves and does not share
            stays with the client.
        receives: patterns that the cohort is sent every round; default ``shares``.
        frozen: patterns that nobody trains any more; sent once, to whoever lacks them.
        routers: by name, for how many experts; see :meth:`fedms.fl.model.slots.Slots.fresh_router`.
        modules: small networks beside the backbone, by name; asked by :meth:`View.call`.
        start: (received, kept) -> what a visit, an evaluation and a prediction begin with.
            ``received``: what the server sent, over fresh experts and modules.
        end: (now, began) -> what a visit leaves; default: what its phases trained.
        aggregate: how the server puts the updates together.
        group: (server's state, client) -> the group that it is in, "" for none. What the server
            holds as ``<expert>-<group>.<name>`` the group's members are sent as ``<expert>.<name>``
            and nobody else is. None: all are sent the same.
        common: the model that all clients share; None where there is none.
        predict: a client's own model; None: the common one.
        prior: how far its answers are moved towards its own labels; see :meth:`View.adjusted`.
        priors: more such numbers, at which the clients' models are scored too.
        weights: [P, 2], how much the global and the local expert weigh in ``predict``, for records.
        pooled: one visit a round, on the examples of everybody together: no federation.
        wakes: whether SAL watches the common model in these rounds; without such a stage all its
            blocks are awake from the start.
        budgets: whether a client may train some of the awake blocks only (``sal.scope``).
        least: clients that a cohort must have.
    """

    name: str
    settings: StageConfig
    phases: tuple[Phase, ...] = ()
    experts: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    shares: Patterns = ()
    receives: Patterns | None = None
    frozen: Patterns = ()
    routers: tuple[tuple[str, int], ...] = ()
    modules: tuple[tuple[str, Build], ...] = ()
    start: Start = received_and_kept
    end: End | None = None
    aggregate: Aggregate = field(default_factory=Aggregate)
    group: Group | None = None
    common: Predict | None = GLOBAL
    predict: Predict | None = None
    prior: float = 0.0
    priors: tuple[float, ...] = ()
    weights: Predict | None = None
    pooled: bool = False
    wakes: bool = False
    budgets: bool = True
    least: int = 1

    @property
    def trains(self) -> Patterns:
        """What any of the phases trains."""
        return tuple(pattern for phase in self.phases for pattern in phase.trains)

    @property
    def sends_every_round(self) -> Patterns:
        """What the cohort is sent every round."""
        return self.shares if self.receives is None else self.receives

    def heads_of(self, phase: Phase, of_task: bool) -> Patterns:
        """The heads that a phase trains. of_task: the task has a trained one in every expert."""
        return tuple(
            f"{expert}.head.*"
            for expert in self.experts
            if (of_task or expert in self.heads) and matches(f"{expert}.head.weight", phase.trains)
        )

    def with_fitted_heads(self, of_task: bool) -> Stage:
        """The stage whose visits begin with ``settings.head_steps``, if it trains heads.

        A phase under a head that the one before it has fitted is left as it is.
        """
        steps, phases = self.settings.head_steps, list[Phase]()
        for phase in self.phases:
            heads = self.heads_of(phase, of_task)
            fitted = phase.whole or any(before.whole for before in phases[-1:])
            if steps and heads and not fitted:
                phases.append(phase.fitting(heads, steps))
            phases.append(phase)
        return replace(self, phases=tuple(phases))

    def in_round(self, round: int) -> Stage:
        """The stage with the phases whose turn it is; rounds of a run count from 1."""
        phases = tuple(p for p in self.phases if round % p.turn[1] == p.turn[0])
        return replace(self, phases=phases)

    @property
    def answer(self) -> Predict:
        """A client's own model before ``prior``: :attr:`predict`, else the common one."""
        found = self.predict or self.common
        assert found is not None, f"stage {self.name} has neither a common model nor clients' own"
        return found

    def leaves(self, now: State, began: State) -> State:
        """What a visit leaves, by :attr:`end`."""
        return select(now, self.trains) if self.end is None else self.end(now, began)
