"""Sparsely Activated LoRA (SAL): which blocks' LoRA is awake, and when the next one wakes.

FedMS, arXiv 2312.15926, gives the idea: low-rank matrices in the blocks are activated
progressively, when the capability of the model stops growing. Orders, triggers and scopes are this
library's reading; see DESIGN.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from fedms.fl.client import class_counts, learning
from fedms.fl.data.federation import ClientData
from fedms.fl.data.sampling import generator
from fedms.fl.model.model import Model
from fedms.fl.model.view import View
from fedms.fl.settings import Count, Finite, Section
from fedms.fl.types import ClientFailure, FedMSError


class SalConfig(Section):
    """Sparsely Activated LoRA: which blocks are awake."""

    enabled: bool = True
    """False: ``max_blocks`` blocks are awake from the first round."""
    order: Literal["deep_to_shallow", "shallow_to_deep", "random", "importance"] = "deep_to_shallow"
    """Which block wakes next; "importance": by the gradient norm of its fresh expert."""
    trigger: Literal["capability_queue", "every", "all_at_once"] = "capability_queue"
    """When blocks wake; "capability_queue": when the global expert stops getting better."""
    start_blocks: Count = 1
    """Blocks awake in the first round."""
    wake_blocks: Count = 2
    """Blocks woken at a time."""
    max_blocks: Count = 3
    """Blocks awake at most."""
    queue_length: Annotated[int, Field(ge=2, le=1_000_000)] = 2
    """Rounds whose scores the capability queue compares."""
    threshold: Finite = 0.2
    """The next blocks wake when the queue's last score is less than this above its first."""
    every: Count = 3
    """With ``trigger = "every"``: rounds between two wakings."""
    scope: Literal["global", "client"] = "global"
    """"client": a client trains no more awake blocks than its budget."""
    min_budget: Count = 1
    """With ``scope = "client"``: the least budget of a client.

    Client k trains at most b_k awake blocks, b_k drawn from min_budget..max_blocks.
    """

    @model_validator(mode="after")
    def _does_not_shrink(self) -> Self:
        if self.max_blocks < self.start_blocks:
            raise ValueError(
                f"max_blocks must be at least {self.start_blocks}, got {self.max_blocks}"
            )
        return self

    @model_validator(mode="after")
    def _has_budgets_between_its_limits(self) -> Self:
        if self.scope == "client" and self.min_budget > self.max_blocks:
            raise ValueError(
                f"min_budget must be at most sal.max_blocks = {self.max_blocks}, "
                f"got {self.min_budget}"
            )
        return self


PROBE_CLIENTS = 8
"""Clients whose gradients make a block's importance."""
PROBE_EXAMPLES = 32
"""Of each of them."""


def wake_order(
    config: SalConfig, num_blocks: int, seed: int, importance: Callable[[], Sequence[float]]
) -> list[int]:
    """The blocks in the order in which they wake, ``max_blocks`` of them at most.

    ``importance`` is asked only by ``order = "importance"``: one score per block, the highest wakes
    first.

    Raises:
        FedMSError: it is asked, and there are no scores.
    """
    blocks = list(range(num_blocks))
    if config.order == "deep_to_shallow":
        blocks.reverse()
    elif config.order == "random":
        blocks = generator(seed, "sal-order").permutation(num_blocks).tolist()
    elif config.order == "importance":
        scores = importance()
        if not scores:
            raise FedMSError('sal.order = "importance": none of the clients could be asked')
        blocks.sort(key=lambda block: -scores[block])
    return blocks[: config.max_blocks]


class Activation:
    """The awake blocks of a run and the capability queue that wakes more.

    Args:
        config: settings.
        order: from :func:`wake_order`.
    """

    def __init__(self, config: SalConfig, order: Sequence[int]) -> None:
        self._config = config
        self.order = list(order)
        at_once = not config.enabled or config.trigger == "all_at_once"
        self._count = len(self.order) if at_once else min(config.start_blocks, len(self.order))
        self._scores: deque[float] = deque(maxlen=config.queue_length)
        self._rounds = 0

    @property
    def awake(self) -> tuple[int, ...]:
        """The blocks that are awake now, ascending."""
        return tuple(sorted(self.order[: self._count]))

    @property
    def depths(self) -> list[int]:
        """Every lowest awake block there can be from now on: where a forward may have to start."""
        return sorted(
            {min(self.order[:count]) for count in range(self._count, len(self.order) + 1)}
        )

    def observe(self, score: float | None) -> bool:
        """Take in a round's global score (None: not measured); True if blocks woke."""
        self._rounds += 1
        if score is not None:
            self._scores.append(score)
        if self._count == len(self.order) or not self._is_due():
            return False
        self._count = min(self._count + self._config.wake_blocks, len(self.order))
        self._scores.clear()
        return True

    def _is_due(self) -> bool:
        if self._config.trigger == "every":
            return self._rounds % self._config.every == 0
        full = len(self._scores) == self._config.queue_length
        return full and self._scores[-1] - self._scores[0] < self._config.threshold

    def client_blocks(self, client_id: str, seed: int) -> tuple[int, ...]:
        """The awake blocks that a client trains: all, or the deepest within its own budget."""
        if self._config.scope == "global":
            return self.awake
        low = min(self._config.min_budget, len(self.order))
        budget = int(generator(seed, "sal-budget", client_id).integers(low, len(self.order) + 1))
        return self.awake[-budget:]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {
            "order": self.order,
            "count": self._count,
            "scores": list(self._scores),
            "rounds": self._rounds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.order, self._count, self._rounds = state["order"], state["count"], state["rounds"]
        self._scores.clear()
        self._scores.extend(state["scores"])


def block_importance(model: Model, client: ClientData) -> list[float]:
    """One score per block: the fresh global expert's squared gradient norm.

    Raises:
        ClientFailure: the gradient is not finite.
    """
    slots = model.slots
    before, blocks = slots.awake, range(len(model.backbone.blocks))
    slots.set_awake(blocks)
    slots.load([slots.fresh("global")])
    scores = [0.0] * len(blocks)
    with learning(slots.live.values()):
        view = View(model, [client.train[:PROBE_EXAMPLES]], class_counts(model, [client]))
        view.mean(view.nll("global")).sum().backward()
        for name, leaf in slots.live.items():
            block = slots.block_of(name)
            if leaf.grad is not None and block is not None:
                scores[block] += float(torch.sum(leaf.grad**2))
    slots.set_awake(before)
    if not all(map(math.isfinite, scores)):
        raise ClientFailure("the gradient of its loss is not finite")
    return scores
