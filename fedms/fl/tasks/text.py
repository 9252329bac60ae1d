"""Texts and their classes: what the default run and every table of texts are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedms.fl.data.federation import Dataset
from fedms.fl.tasks.classify import ACCURACY, ClassNames, Linear, hits
from fedms.fl.tasks.task import Batch


class TextTask:
    """Classification of texts; see :class:`fedms.fl.tasks.task.Task`.

    Args:
        dataset: ``inputs`` are texts.
        tokenizer: the backbone's.
        max_tokens: texts are cut there.
        pooling: "mean" over the tokens, or "cls", the first one.
        head: "names": the class names through the same backbone; "linear": trained.
        prompt: what is encoded for a class name, ``{}`` stands for the name.
        logit_scale: "names" only: logits are this times the cosine of text and class.
    """

    metric = ACCURACY

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Any,
        *,
        max_tokens: int,
        pooling: Literal["mean", "cls"] = "mean",
        head: Literal["names", "linear"] = "names",
        prompt: str = "{}",
        logit_scale: float = 20.0,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._pooling = pooling
        self._labels = dataset.labels
        self._rows = self._tokenize(dataset.inputs)
        self._prompts = [prompt.replace("{}", name) for name in dataset.class_names]
        self._head = Linear(len(self._prompts)) if head == "linear" else ClassNames(logit_scale)
        self.num_classes = len(self._prompts)
        self.lengths = np.array([len(row) for row in self._rows])

    def batch(self, indices: np.ndarray, device: torch.device) -> Batch:
        """Texts [B] as ids and mask [B, T]."""
        targets = torch.from_numpy(self._labels[indices])
        return self._pad([self._rows[i] for i in indices], targets).to(device)

    def targets(self, indices: np.ndarray) -> np.ndarray:
        return self._labels[indices]

    def prepare(self, hidden: Callable[[Batch], Tensor]) -> None:
        """Encode the class names."""
        if isinstance(self._head, ClassNames):
            self._head.weight = self.name_features(hidden)

    def name_features(self, hidden: Callable[[Batch], Tensor]) -> Tensor:
        """Features of the class names in the prompt [C, D], by the untuned backbone."""
        names = self._pad(self._tokenize(self._prompts), torch.arange(self.num_classes))
        return self.pool(hidden(names), names)

    def fresh_head(self, width: int) -> Tensor | None:
        return self._head.fresh(width)

    def trainable_head(self, width: int) -> Tensor | None:
        return self._head.trainable(width)

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """States [B, T, D] -> features [B, D]."""
        if self._pooling == "cls":
            return self._head.features(hidden[:, 0])
        weights = batch.inputs["attention_mask"].to(hidden.dtype).unsqueeze(-1)
        return self._head.features((hidden * weights).sum(1) / weights.sum(1))

    def logits(self, z: Tensor, head: Tensor | None) -> Tensor:
        return self._head.logits(z, head)

    def score(self, log_p: Tensor, targets: Tensor) -> Tensor:
        return hits(log_p, targets)

    def _tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids [T_i] of each text."""
        if not texts:
            return []
        cut = {"truncation": True, "max_length": self._max_tokens}
        return [torch.tensor(row) for row in self._tokenizer(list(texts), **cut)["input_ids"]]

    @staticmethod
    def _pad(rows: Sequence[Tensor], targets: Tensor) -> Batch:
        ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return Batch({"input_ids": ids, "attention_mask": mask}, targets, torch.arange(len(rows)))


def recorded_pooling(path: str) -> Literal["mean", "cls"]:
    """What sentence-transformers wrote beside the model in the folder ``path``, else the mean."""
    record = Path(path) / "1_Pooling" / "config.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")).get(
        "pooling_mode_cls_token"
    ):
        return "cls"
    return "mean"
