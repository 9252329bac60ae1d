"""The server's half of a round: refuse what is no update, then the example-weighted fp32 mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from fedms.fl.algorithms.stage import Aggregate
from fedms.fl.types import ClientFailure, Failure, QuorumError, State, Update


def check_update(update: Update, expected: State) -> None:
    """Refuse an update that cannot be averaged.

    Raises:
        ClientFailure: no examples, an unknown name, another shape, or a value that is not finite.
    """
    if update.num_examples < 1:
        raise ClientFailure(f"it says it trained on {update.num_examples} examples")
    for name, tensor in update.shared.items():
        if name not in expected:
            raise ClientFailure(f"it sent {name}, which the server does not know")
        if tensor.shape != expected[name].shape:
            raise ClientFailure(
                f"it sent {name} of shape {list(tensor.shape)}, "
                f"expected {list(expected[name].shape)}"
            )
    for name, tensor in {**update.shared, **update.kept}.items():
        if not torch.isfinite(tensor).all():
            raise ClientFailure(f"its {name} is not finite")


class Totals:
    """A round's updates, added up one by one as a stage's aggregate says.

    Only sums are held, in fp32 or wider, whatever the updates were sent in.
    """

    def __init__(self, aggregate: Aggregate) -> None:
        self._aggregate = aggregate
        self._sums: State = {}
        self._weights: dict[str, float] = {}

    def add(self, update: Update) -> None:
        """Add what an update shares."""
        weight = float(update.num_examples) if self._aggregate.weight == "examples" else 1.0
        for name, tensor in self._aggregate.statistics(update.shared).items():
            wide = tensor.float() if tensor.dtype.itemsize < 4 else tensor
            term = wide * weight
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def finish(self, server: State) -> State:
        """The server's next state; what nobody sent stays, as the same tensor."""
        return self._aggregate.finish(server, self._sums, self._weights) if self._sums else server


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
