"""The server's half of a round: what it sends, what it refuses, how it adds up what it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedms.fl.algorithms.stage import Aggregate, Stage, of_group
from fedms.fl.client import prepare, received
from fedms.fl.model.model import Model
from fedms.fl.settings import PositiveShare, Section
from fedms.fl.tasks.task import Metric
from fedms.fl.types import ClientFailure, Failure, Patterns, QuorumError, State, Update, select


class ServerConfig(Section):
    fraction_train: PositiveShare = 1.0
    """Share of the clients drawn into each round's cohort."""
    quorum: PositiveShare = 0.5
    """Share of a cohort that must come back for the round to count."""


class Server:
    """What the server holds, and what it sends of it.

    Args:
        model: for names, shapes and what nobody has trained yet.

    Attributes:
        state: what clients have trained and sent, put together.
        num_blocks, parameter_count: of the model without experts.
        metric: how scores are shown.
    """

    def __init__(self, model: Model) -> None:
        self._model, self.state = model, State()
        self.num_blocks = len(model.backbone.blocks)
        self.parameter_count = model.backbone.parameter_count

    @property
    def metric(self) -> Metric:
        return self._model.task.metric

    def group(self, stage: Stage, client: str) -> str:
        """Which group of clients, all sent the same, a client is in."""
        return "" if stage.group is None else stage.group(self.state, client)

    def sends(self, stage: Stage, awake: Sequence[int], group: str = "") -> tuple[State, State]:
        """What every client of a group is sent, and what only those are who lack it."""
        prepare(self._model, stage, awake)
        state = received(self._model, stage, of_group(self.state, group))
        return self._awake(state, stage.sends_every_round), self._awake(state, stage.frozen)

    def trainable_parameters(self, stage: Stage, awake: Sequence[int]) -> int:
        """Numbers that a client trains."""
        prepare(self._model, stage, awake)
        start = stage.start(received(self._model, stage, self.state), {})
        return sum(tensor.numel() for tensor in self._awake(start, stage.trains).values())

    def _awake(self, state: State, patterns: Patterns) -> State:
        awake = self._model.slots.is_awake
        return {name: t for name, t in select(state, patterns).items() if awake(name)}


@dataclass(frozen=True)
class Sent:
    """What a client sends after a visit: its :class:`Update` without what stays with it.

    ``kept`` says whether something did, which a round's commit has to know. No ``train_loss``: the
    client does not tell.
    """

    client_id: str
    round: int
    num_examples: int
    shared: State
    kept: bool
    train_loss: float | None


def expected(model: Model, stage: Stage, sent: State) -> State:
    """What an update may hold, by name and shape, of a client that was sent ``sent``.

    Values are those that a change is told from: what visits begin with, or zeros where the
    aggregate adds.
    """
    start = stage.start(received(model, stage, sent), {})
    shared = select(stage.leaves(start, start), stage.shares)
    shared = {name: tensor for name, tensor in shared.items() if model.slots.is_awake(name)}
    return {n: torch.zeros_like(t) for n, t in shared.items()} if stage.aggregate.adds else shared


def owed(model: Model, expected: State, blocks: Sequence[int]) -> State:
    """What a client sends that trains no more than these blocks."""
    return {
        name: tensor
        for name, tensor in expected.items()
        if model.slots.block_of(name) in (None, *blocks)
    }


def check_values(update: Update | Sent) -> None:
    """Refuse what cannot be averaged though it has the right form.

    Raises:
        ClientFailure: no examples, or a value that is not finite.
    """
    if update.num_examples < 1:
        raise ClientFailure(f"it says it trained on {update.num_examples} examples")
    for name, tensor in update.shared.items():
        if not torch.isfinite(tensor).all():
            raise ClientFailure(f"its {name} is not finite")


class Totals:
    """Updates added up one by one as an aggregate says, or held one by one where it asks for each.

    Sums are in fp64, in which they are nearly exact: how clients are shared out to processes does
    not show. What comes of them is in the dtype that was sent, fp32 at least.

    Attributes:
        sums, weights: by name.
        each: where the aggregate wants them, statistics by client. ``weights`` are by client then.
    """

    def __init__(self, aggregate: Aggregate) -> None:
        self._aggregate = aggregate
        self.sums: State = {}
        self.weights: dict[str, float] = {}
        self.each: dict[str, State] = {}
        self.dtype = torch.float32

    def add(self, update: Update | Sent) -> None:
        """Add what an update shares."""
        weight = float(update.num_examples) if self._aggregate.weight == "examples" else 1.0
        found = self._aggregate.statistics(update.shared)
        for tensor in found.values():
            self.dtype = torch.promote_types(self.dtype, tensor.dtype)
        if self._aggregate.each:
            self.each[update.client_id] = found
            self.weights[update.client_id] = weight
            return
        self._put({name: t.double() * weight for name, t in found.items()})
        self._weigh(dict.fromkeys(found, weight))

    def merge(self, other: Totals) -> None:
        """Add what another process has added up."""
        self.dtype = torch.promote_types(self.dtype, other.dtype)
        self.each.update(other.each)
        self._put(other.sums)
        self._weigh(other.weights)

    def finish(self, server: State) -> State:
        """The server's next state; what nobody sent stays, as the same tensor."""
        if self.each:
            clients = sorted(self.each)  # whoever came first: sums over them must not depend on it
            after = self._aggregate.finish(
                server, {c: self.each[c] for c in clients}, {c: self.weights[c] for c in clients}
            )
        else:
            after = self._aggregate.finish(server, self.sums, self.weights)
        return {n: t if server.get(n) is t else t.to(self.dtype) for n, t in after.items()}

    def _put(self, sums: State) -> None:
        for name, term in sums.items():
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def _weigh(self, weights: dict[str, float]) -> None:
        for name, weight in weights.items():
            self.weights[name] = self.weights.get(name, 0.0) + weight


def require_quorum(cohort: int, failed: Sequence[Failure], quorum: float) -> None:
    """Raise QuorumError unless at least ``quorum`` of a cohort's clients came back.

    The message says why the others did not, the most frequent reason first.
    """
    returned = cohort - len(failed)
    if returned < quorum * cohort - 1e-9:  # 0.55 * 20 is 11.000000000000002
        first_lines = (failure.reason.partition("\n")[0][:200] for failure in failed)
        reasons = Counter(first_lines).most_common(3)
        why = "; ".join(f"{reason} ({count} clients)" for reason, count in reasons)
        raise QuorumError(
            f"{returned} of {cohort} clients came back, fewer than server.quorum = {quorum} "
            f"of them; the round does not count. What stopped the others: {why}. A resume draws "
            "the same clients and batches and ends here again unless the cause is gone (memory, a "
            "disk); otherwise begin a new run with other settings, or lower server.quorum in the "
            "folder's config.toml"
        )
