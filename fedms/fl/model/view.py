"""What a loss or a prediction may ask about a batch of S clients side by side.

S slots, B examples, P answers, T positions, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from fedms.fl.model.gate import log_prior_of_counts
from fedms.fl.model.model import Model
from fedms.fl.model.slots import Path
from fedms.fl.tasks.task import Batch
from fedms.fl.types import ConfigError, State, select

MOST_LOGITS = 2**24
"""Logits that are held at once; more are made in pieces of answers."""

OfAnswers = Callable[..., Tensor]
"""See :meth:`View.over`."""


class View:
    """A batch of S clients, side by side: the only door of an algorithm to the model.

    Every result is kept until :meth:`forget_trained`, and for the life of the view where nobody
    trains what it went through: 30 steps of a gate on one view cost one forward.

    Args:
        model: its slots hold the clients' parameters.
        rows: each client's examples, as indices into the dataset.
        counts: int64 [S, C], each client's own training examples by class.
        began: the leaves as they were when the visit began; the live ones by default.
        own: all of each client's own training examples, for :meth:`own`.
        seeds: a generator a client, where experts in training drop out.

    Attributes:
        live, began: leaves by name, [S, ...] or [1, ...], now and when the visit began.
        indices: int64 [B], the examples, one client after the other.
        targets: int64 [P], the right answers; a client's stand together, in the order of clients.
        slot: int64 [P], whose each answer is.
        counts: as given.
    """

    def __init__(
        self,
        model: Model,
        rows: Sequence[np.ndarray],
        counts: Tensor,
        began: State | None = None,
        seeds: Sequence[torch.Generator] | None = None,
        own: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.live = model.slots.live
        self.began = self.live if began is None else began
        self.counts = counts
        self._model, self._seeds, self._own = model, seeds, own
        self._trained = {_part(name) for name, t in self.live.items() if t.requires_grad}
        self._rows = [len(own) for own in rows]
        self.indices = np.concatenate(rows)
        self._batch = model.task.batch(self.indices, model.backbone.device)
        self.targets = self._batch.targets
        each = np.asarray(self._batch.answers or [1] * len(self.indices))
        self._each = each.tolist()
        ends = np.concatenate([[0], np.cumsum(each)])[np.cumsum([0, *self._rows])]
        self._ends: list[int] = ends.tolist()
        """Client s has the answers _ends[s]:_ends[s + 1]."""
        self._known: dict[tuple[object, ...], Tensor] = {}
        self._known_frozen: dict[tuple[object, ...], Tensor] = {}

    @cached_property
    def slot(self) -> Tensor:
        sizes = torch.tensor(self._ends).diff()
        return torch.repeat_interleave(sizes).to(self.targets.device, non_blocking=True)

    def forget_trained(self) -> None:
        """The trained leaves have changed: forget what went through them."""
        self._known.clear()

    # Through the model ----------------------------------------------------------------------------

    def features(
        self, *path: str, gates: Tensor | None = None, router: str | None = None
    ) -> Tensor:
        """What the head reads, [P, D], through the base and the experts of ``path``.

        Args:
            gates: [B, len(path)]: weights of the experts' outputs in every linear, an example each.
            router: in place of gates, the router that weighs them, per layer and token.
        """
        if gates is not None:
            return self._forward(self.indices, self._rows, self._batch, path, gates)

        parts = path if router is None else (*path, router)

        def compute() -> Tensor:
            if self._is_trained(parts):
                return self._forward(self.indices, self._rows, self._batch, path, router=router)
            return self._frozen(path, router)

        return self._once(("features", path, router), parts, compute)

    def log_p(
        self,
        *path: str,
        head: str | None = None,
        gates: Tensor | None = None,
        router: str | None = None,
    ) -> Tensor:
        """Log-probabilities [P, C] of the experts of ``path``, by a head: of the last of them."""
        return self._mixed(_log_p, path, head, gates, router)

    def log_p_of(self, z: Tensor, expert: str) -> Tensor:
        """Log-probabilities [P, C] of features [P, D] by an expert's head."""
        return self._in_pieces(_log_p, [z], [expert])

    def nll(
        self,
        *path: str,
        head: str | None = None,
        gates: Tensor | None = None,
        router: str | None = None,
    ) -> Tensor:
        """Negative log-probabilities [P] of the right answers; a large [P, C] is never held."""
        return self._mixed(_nll, path, head, gates, router)

    def over(
        self,
        function: OfAnswers,
        *paths: Path,
        heads: Sequence[str | None] | None = None,
        router: str | None = None,
        detached: bool = False,
    ) -> Tensor:
        """A function of the answers' distributions, [P, ...], some answers at a time.

        Args:
            function: (view, slot, targets [p], log_p [p, C] of each path ...) -> [p, ...], for p
                answers of one client. Equal functions give equal results.
            heads: whose head each path ends in; None: that of its last expert.
            router: weighs the experts of every path; see :meth:`features`.
            detached: no gradient goes back through the features.
        """
        last = [path[-1] if path else "" for path in paths]
        if heads is not None:
            last = [end if own is None else own for own, end in zip(heads, last, strict=True)]

        def compute() -> Tensor:
            z = [self.features(*path, router=router) for path in paths]
            z = [each.detach() for each in z] if detached else z
            return self._in_pieces(function, z, last)

        parts = *sum(paths, ()), *(f"{name}.head" for name in last), router or ""
        return self._once((function, paths, tuple(last), router, detached), parts, compute)

    def call(self, module: str, inputs: Tensor) -> Tensor:
        """Each client's own small network on its answers: inputs [P, F] -> [P, ...]."""
        network, prefix = self._model.modules[module], module + "."
        parameters = {
            name.removeprefix(prefix): leaf
            for name, leaf in self.live.items()
            if name.startswith(prefix)
        }
        slots = len(self._rows)
        if slots == 1:
            own = {name: leaf[0] for name, leaf in parameters.items()}
            return functional_call(network, own, (inputs,))
        stacked = {name: leaf.expand(slots, *leaf.shape[1:]) for name, leaf in parameters.items()}
        padded = nn.utils.rnn.pad_sequence(self.split(inputs), batch_first=True)
        output = vmap(lambda own, rows: functional_call(network, own, (rows,)))(stacked, padded)
        return torch.cat([rows[:n] for rows, n in zip(output, self._sizes, strict=True)])

    def adjusted(self, log_p: Tensor, strength: float) -> Tensor:
        """Log-probabilities [P, C] moved towards what each client's own labels are.

        log p + strength * (log of the client's label frequencies - log of everyone's), normalised.
        For a model that everyone's examples trained, 1 is Bayes' rule for a client whose classes
        are as likely as its labels say (Saerens et al., 2002; logit adjustment, arXiv 2007.07314).
        Frequencies are smoothed by one example a class.
        """
        if strength == 0.0:
            return log_p
        everyone = self._model.frequencies
        assert everyone is not None, "whoever made the model did not say what everyone's labels are"
        shift = log_prior_of_counts(self.counts.to(log_p.dtype)) - everyone.to(log_p.dtype).log()
        return F.log_softmax(log_p + strength * shift[self.slot], dim=-1)

    def own(self, count: int) -> View:
        """``count`` of each client's own training examples, evenly spread over all of them.

        Raises:
            ConfigError: the view was made without them.
        """
        if self._own is None:
            raise ConfigError("the method compares with a client's own examples: none are at hand")
        rows = [own[np.linspace(0, len(own) - 1, count).astype(np.int64)] for own in self._own]
        return View(self._model, rows, self.counts, self.began)

    def first(self, values: Tensor) -> Tensor:
        """Values [P, ...] -> [B, ...], of each example's first answer.

        What weighs a whole text may know no token that is still to be predicted.
        """
        if self._batch.answers is None:
            return values
        each = torch.tensor(self._each)
        return values[(each.cumsum(0) - each).to(values.device)]

    # Numbers a client -----------------------------------------------------------------------------

    def split(self, values: Tensor) -> list[Tensor]:
        """Values [P, ...] of each client."""
        return list(values.split(self._sizes))

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """[S], each client's mean of ``values`` [P], weighted by ``weights`` [P]; 0 of nothing."""
        if weights is None:
            return torch.stack([v.mean() if len(v) else v.sum() for v in self.split(values)])
        least = torch.finfo(weights.dtype).tiny
        return torch.stack(
            [
                (v * w).sum() / w.sum().clamp(min=least)
                for v, w in zip(self.split(values), self.split(weights), strict=True)
            ]
        )

    def by_example(self, values: Tensor) -> list[Tensor]:
        """Values [P] -> for each client the mean over each of its examples' answers."""
        if self._batch.answers is not None:
            values = torch.stack([own.mean() for own in values.split(self._each)])
        return list(values.split(self._rows))

    def drift(self, pattern: str, to: State | None = None) -> Tensor:
        """[S], the squared distance of the live leaves of ``pattern`` from ``to`` or ``began``."""
        to = self.began if to is None else to
        moved = [
            (leaf - to[name]).flatten(1).square().sum(1)
            for name, leaf in select(self.live, (pattern,)).items()
        ]
        return torch.stack(moved).sum(0)

    def class_counts(self) -> Tensor:
        """[P], how many of the client's answers in this view have the same right answer."""
        place = self.slot * self._model.task.num_classes + self.targets
        counts = torch.zeros(
            len(self._rows) * self._model.task.num_classes,
            dtype=self._model.backbone.master,
            device=place.device,
        )
        return counts.index_add(0, place, torch.ones_like(place, dtype=counts.dtype))[place]

    def constant(self, value: float, width: int) -> Tensor:
        """[P, width] of one value."""
        return torch.full(
            (len(self.targets), width),
            value,
            dtype=self._model.backbone.master,
            device=self.targets.device,
        )

    # Inside ---------------------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> list[int]:
        return [end - start for start, end in pairwise(self._ends)]

    def _is_trained(self, path: Path) -> bool:
        return torch.is_grad_enabled() and not self._trained.isdisjoint(path)

    def _once(self, key: tuple[object, ...], parts: Path, compute: Callable[[], Tensor]) -> Tensor:
        known = self._known_frozen if self._trained.isdisjoint(parts) else self._known
        if key not in known:
            known[key] = compute()
        return known[key]

    def _mixed(
        self,
        function: OfAnswers,
        path: Path,
        head: str | None,
        gates: Tensor | None,
        router: str | None,
    ) -> Tensor:
        """A function of one path's answers; under gates it is not kept."""
        if gates is None:
            return self.over(function, path, heads=(head,), router=router)
        features = self.features(*path, gates=gates)
        return self._in_pieces(function, [features], [path[-1] if head is None else head])

    def _forward(
        self,
        indices: np.ndarray,
        rows: Sequence[int],
        batch: Batch,
        path: Path,
        gates: Tensor | None = None,
        router: str | None = None,
    ) -> Tensor:
        model, depth = self._model, self._model.slots.depth
        entry = model.prefix.entry(indices, batch, depth)
        seeds = self._seeds if self._is_trained(path) else None
        with model.slots.routed(path, rows, gates, seeds, router):
            return model.task.pool(model.backbone.hidden(batch, entry, depth), batch)

    @torch.no_grad()
    def _frozen(self, path: Path, router: str | None = None) -> Tensor:
        """Features [P, D] of any number of examples, kept over views where the path allows it."""
        outputs = self._model.outputs
        missing = None if router else outputs.missing(path, np.unique(self.indices))
        if missing is None:
            return torch.cat(self._in_chunks(self.indices, self._rows, path, router))
        if len(missing):
            outputs.put(path, missing, self._in_chunks(missing, [len(missing)], path))
        return outputs.get(path, self.indices)

    def _in_chunks(
        self, indices: np.ndarray, rows: Sequence[int], path: Path, router: str | None = None
    ) -> list[Tensor]:
        """Each example's features [answers, D], from forwards of like length."""
        task, size = self._model.task, self._model.rows
        owner = np.repeat(np.arange(len(rows)), rows)
        order = np.argsort(task.lengths[indices], kind="stable")
        features: dict[int, Tensor] = {}
        for start in range(0, len(order), size):
            chosen = np.sort(order[start : start + size])  # a client's examples stand together
            batch = task.batch(indices[chosen], self._model.backbone.device)
            own = np.bincount(owner[chosen], minlength=len(rows)).tolist()
            z = self._forward(indices[chosen], own, batch, path, router=router)
            features.update(
                zip(chosen.tolist(), z.split(batch.answers or [1] * len(chosen)), strict=True)
            )
        return [features[i] for i in range(len(indices))]

    def _in_pieces(
        self, function: OfAnswers, z: Sequence[Tensor], experts: Sequence[str]
    ) -> Tensor:
        task = self._model.task
        heads = [self.live.get(f"{expert}.head.weight") for expert in experts]

        def piece(slot: int, begin: int, end: int) -> Tensor:
            log_p = [
                F.log_softmax(
                    task.logits(
                        each[begin:end],
                        None if head is None else head[slot if len(head) > 1 else 0],
                    ),
                    dim=-1,
                )
                for each, head in zip(z, heads, strict=True)
            ]
            return function(self, slot, self.targets[begin:end], *log_p)

        most = max(1, MOST_LOGITS // task.num_classes)
        pieces = [
            (slot, begin, min(begin + most, end))
            for slot, (start, end) in enumerate(pairwise(self._ends))
            for begin in range(start, end, most)
        ]
        if len(pieces) <= len(self._rows) or not torch.is_grad_enabled():
            return torch.cat([piece(*place) for place in pieces])
        # A piece's logits are made again in the backward: only one piece's are held.
        return torch.cat([checkpoint(piece, *place, use_reentrant=False) for place in pieces])


def _part(name: str) -> str:
    """What is trained together with a parameter: an expert's layers, or its head."""
    return name.removesuffix(".weight") if ".head." in name else name.partition(".")[0]


def _log_p(view: View, slot: int, targets: Tensor, log_p: Tensor) -> Tensor:
    return log_p


def _nll(view: View, slot: int, targets: Tensor, log_p: Tensor) -> Tensor:
    return -log_p.gather(-1, targets[:, None]).squeeze(-1)
