"""The one model that all clients share: its parts, and what has not been trained yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedms.fl.model.backbone import Backbone
from fedms.fl.model.prefix import Outputs, Prefix
from fedms.fl.model.slots import Slots
from fedms.fl.tasks.task import Task
from fedms.fl.types import ConfigError, State


@dataclass
class Model:
    """One model for all clients, and what belongs to it.

    Attributes:
        task: what an example is.
        backbone: the frozen model.
        slots: the experts on it.
        prefix: hidden states below the lowest awake block.
        outputs: features of frozen paths.
        rows: examples of a forward that needs no gradient.
        modules: small networks beside the backbone, as templates; their parameters are in states.
        head: what a trained head [C, D] starts from where a method trains one though the task's is
            frozen; None: the task has none that could be trained.
        frequencies: of everyone's labels [C], by :func:`fedms.fl.model.gate.mean_frequencies`;
            None: unknown.
    """

    task: Task
    backbone: Backbone
    slots: Slots
    prefix: Prefix
    outputs: Outputs
    rows: int = 64
    modules: dict[str, nn.Module] = field(default_factory=dict)
    head: Tensor | None = None
    frequencies: Tensor | None = None

    def build(self, modules: Mapping[str, Callable[[int, int], nn.Module]]) -> None:
        """Make the small networks of a stage; each is built from D and C."""
        self.modules = {}
        for name, build in modules.items():
            with torch.random.fork_rng(devices=[]):
                # Clients must agree on the start, or an average means nothing.
                torch.manual_seed(0)
                module = build(self.backbone.width, self.task.num_classes)
            module.to(self.backbone.device, self.backbone.master).requires_grad_(False)
            self.modules[name] = module

    def fresh(
        self,
        experts: Sequence[str],
        heads: Sequence[str] = (),
        routers: Sequence[tuple[str, int]] = (),
    ) -> State:
        """What has not been trained yet, the same for everybody: experts and small networks.

        Args:
            heads: names that have a head of their own even where the task's is frozen.
            routers: names and numbers of experts of :meth:`Slots.fresh_router`.

        Raises:
            ConfigError: the task has no head that could be trained.
        """
        state: State = {}
        for expert in experts:
            state.update(self.slots.fresh(expert))
        for name in heads:
            if self.head is None:
                raise ConfigError("the method trains a head, and this task has none to train")
            state.setdefault(f"{name}.head.weight", self.head)
        for name, num_experts in routers:
            state.update(self.slots.fresh_router(name, num_experts))
        for name, module in self.modules.items():
            state.update({f"{name}.{key}": value for key, value in module.named_parameters()})
        return state
