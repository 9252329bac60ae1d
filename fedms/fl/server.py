"""The server's half of a round: refuse what is no update, then the example-weighted fp32 mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedms.fl.types import ClientFailure, QuorumError, State, Update


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


def aggregate(state: State, updates: Iterable[Update]) -> State:
    """``state`` with every parameter that was sent replaced by the senders' mean.

    The mean is weighted by num_examples and summed in fp32. A parameter that nobody sent stays as
    it is, as the same tensor.
    """
    totals: State = {}
    weights: dict[str, float] = {}
    for update in updates:
        for name, tensor in update.shared.items():
            term = tensor.float() * update.num_examples
            totals[name] = totals[name] + term if name in totals else term
            weights[name] = weights.get(name, 0.0) + update.num_examples
    means = {name: (total / weights[name]).to(state[name].dtype) for name, total in totals.items()}
    return {**state, **means}


def require_quorum(returned: int, cohort: int, quorum: float) -> None:
    """Raise QuorumError unless at least ``quorum`` of the cohort came back."""
    if returned < quorum * cohort - 1e-9:  # 0.55 * 20 is 11.000000000000002
        raise QuorumError(
            f"{returned} of {cohort} clients came back, fewer than server.quorum = {quorum} "
            "of them; the round does not count. "
            "The last checkpoint holds the round before; `fedms resume` tries this round again"
        )
