"""One resident model: all visits and evaluations run on it; clients are states swapped in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedms.fl.config import Config
from fedms.fl.data.federation import Dataset
from fedms.fl.model.backbone import Foundation
from fedms.fl.model.gate import Gate, combine, gate_width, statistics
from fedms.fl.model.prefix import PrefixCache
from fedms.fl.types import State

Path = tuple[str, ...]


class Resident:
    """The foundation model, the data in tokens, and what of them is the same in every round.

    Attributes:
        head: class features times the logit scale, [C, D].
        labels: int64 [N].
        lengths: int64 [N], in tokens.
    """

    def __init__(self, foundation: Foundation, dataset: Dataset, config: Config) -> None:
        self.foundation = foundation
        rows = foundation.tokenize(dataset.inputs)
        self.lengths = np.array([len(row) for row in rows])
        self.cache = PrefixCache(foundation, rows, config.engine.prefix_cache_mb * 2**20)
        self.head = foundation.encode_classes(dataset.class_names) * config.model.logit_scale
        self.labels = torch.from_numpy(dataset.labels)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take another method's settings; data, model and LoRA must be those of before."""
        self.config = config
        self.gate = Gate(
            gate_width(config.mofm.gate_input, self.head.shape[1]), config.mofm.bottleneck
        ).requires_grad_(False)
        self.forget_outputs()

    # States ---------------------------------------------------------------------------------------

    def parameters(self, prefixes: Sequence[str]) -> State:
        """Live parameters whose names start with one of ``prefixes``.

        The prefixes are ``global.``, ``local.`` (awake ones), ``gate.``.
        """
        live = {
            **self.foundation.expert_parameters("global", awake_only=True),
            **self.foundation.expert_parameters("local", awake_only=True),
            **{f"gate.{name}": parameter for name, parameter in self.gate.named_parameters()},
        }
        return {
            name: parameter for name, parameter in live.items() if name.startswith(tuple(prefixes))
        }

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Copy every parameter of ``state`` into the model; others stay as they are."""
        live = self.parameters(("global.", "local.", "gate."))
        for name, tensor in state.items():
            if name in live:
                live[name].copy_(tensor)

    def forget_outputs(self) -> None:
        """Forget outputs of the frozen paths: the global expert or the awake blocks changed."""
        self._kept: dict[Path, tuple[Tensor, Tensor]] = {}

    # Outputs --------------------------------------------------------------------------------------

    def features(self, indices: np.ndarray, path: Path) -> Tensor:
        """Features [B, D] of examples through the base and the experts of ``path``."""
        tokens, hidden, depth = self.cache.batch(indices)
        with self.foundation.route(path):
            return self.foundation.features(tokens, hidden, depth)

    @torch.no_grad()
    def frozen_features(self, indices: np.ndarray, path: Path) -> Tensor:
        """The same for a path frozen for now: computed once if ``engine.cache_global``."""
        with self.foundation.without_dropout():
            if not self.config.engine.cache_global:
                return self.all_features(indices, path)
            if path not in self._kept:
                self._kept[path] = (
                    torch.zeros(len(self.labels), self.head.shape[1]),
                    torch.zeros(len(self.labels), dtype=torch.bool),
                )
            store, known = self._kept[path]
            missing = indices[~known[indices].numpy()]
            if len(missing):
                store[missing] = self.all_features(missing, path)
                known[missing] = True
            return store[indices]

    @torch.no_grad()
    def all_features(self, indices: np.ndarray, path: Path) -> Tensor:
        """Features of any number of examples, in batches of ``eval.batch_size`` of like length."""
        size = self.config.eval.batch_size
        order = np.argsort(self.lengths[indices], kind="stable")
        z = self.head.new_empty(len(indices), self.head.shape[1])
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            z[chosen] = self.features(indices[chosen], path)
        return z

    def expert_pair(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features of the global expert (never with a gradient) and the local one, [B, D] each."""
        if (
            self.config.engine.cache_global
            or not self.config.engine.shared_trunk
            or torch.is_grad_enabled()
        ):
            return self.frozen_features(indices, ("global",)), self.features(indices, ("local",))
        tokens, hidden, depth = self.cache.batch(indices)
        with self.foundation.route(("global",), ("local",)):
            z = self.foundation.features(
                tokens.repeat(2), None if hidden is None else hidden.repeat(2, 1, 1), depth
            )
        return z[: len(indices)], z[len(indices) :]

    def log_probs(self, z: Tensor) -> Tensor:
        """Features [B, D] -> log-probabilities [B, C] of the zero-shot head."""
        return F.log_softmax(z @ self.head.T, dim=-1)

    def gate_weights(
        self, indices: np.ndarray, log_prior: Tensor, z_g: Tensor | None, z_l: Tensor | None
    ) -> Tensor:
        """Weights [B, 2] of the two experts.

        Their features are read only where ``mofm.gate_input`` asks for them.
        """
        mofm = self.config.mofm
        if mofm.gate == "fixed":
            return self.head.new_full((len(indices), 2), 0.5)
        inputs: list[Tensor] = []
        if z_g is not None and z_l is not None and mofm.gate_input != "base":
            inputs.append(statistics(self.log_probs(z_g), self.log_probs(z_l.detach()), log_prior))
        if mofm.gate_input != "experts":
            inputs.append(self.frozen_features(indices, ()))
        return self.gate(torch.cat(inputs, dim=-1))

    def mixture(self, indices: np.ndarray, log_prior: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, C] of the mixture and its weights [B, 2]."""
        if self.config.mofm.combine == "layer":
            weights = self.gate_weights(indices, log_prior, None, None)
            tokens, hidden, depth = self.cache.batch(indices)
            with self.foundation.route(("global", "local"), gates=weights):
                return self.log_probs(self.foundation.features(tokens, hidden, depth)), weights
        return self.mixture_of(indices, log_prior, *self.expert_pair(indices))

    def mixture_of(
        self, indices: np.ndarray, log_prior: Tensor, z_g: Tensor, z_l: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same from the experts' features, for every ``mofm.combine`` but "layer"."""
        weights = self.gate_weights(indices, log_prior, z_g, z_l)
        return combine(self.config.mofm.combine, weights, z_g, z_l, self.head), weights
