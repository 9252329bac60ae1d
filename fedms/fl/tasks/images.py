"""Images and their classes, on a vision encoder or on the image tower of a two-tower model.

B images, T positions of the encoder (patches, class token), D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedms.fl.data.federation import Dataset
from fedms.fl.tasks.classify import ACCURACY, ClassNames, Linear, Projected, hits
from fedms.fl.tasks.task import Batch

if TYPE_CHECKING:
    from PIL.Image import Image


class Preprocessor:
    """Images in RGB -> pixel values [B, 3, H, W] float32, as a transformers image processor does.

    Args:
        processor: the model's.
        size: width and height in pixels that take the place of its own; None: its own.
    """

    def __init__(self, processor: Any, size: int | None = None) -> None:
        self._processor, self._sizes = processor, {}
        if size is not None:
            square = {"height": size, "width": size}
            edge = processor.size is not None and "shortest_edge" in processor.size
            self._sizes = {"size": {"shortest_edge": size} if edge else square}
            if getattr(processor, "do_center_crop", False):
                self._sizes["crop_size"] = square

    def __call__(self, images: Sequence[Image]) -> Tensor:
        return self._processor(images=images, return_tensors="pt", **self._sizes)["pixel_values"]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """[3, H, W] of every image's pixel values."""
        from PIL import Image

        channels, height, width = self([Image.new("RGB", (64, 48))])[0].shape
        return channels, height, width


class ImageTask:
    """Classification of images; see :class:`fedms.fl.tasks.task.Task`.

    Images are decoded when a forward reads their pixels, so not at all where it starts from a kept
    prefix.

    Args:
        dataset: ``inputs`` are images.
        preprocess: the model's.
        positions: T.
        pooling: "cls", the first position, or "mean" over all of them.
        head: what turns pooled states into logits.
        names: features of the class names in the text tower [C, E], asked for once, by heads that
            read them.
    """

    metric = ACCURACY

    def __init__(
        self,
        dataset: Dataset,
        preprocess: Preprocessor,
        *,
        positions: int,
        head: ClassNames | Projected | Linear,
        names: Callable[[], Tensor] | None = None,
        pooling: Literal["cls", "mean"] = "cls",
    ) -> None:
        self._images, self._preprocess = dataset.inputs, preprocess
        self._labels = torch.from_numpy(dataset.labels)
        self._head, self._names, self._pooling = head, names, pooling
        self.num_classes = len(dataset.class_names)
        self.lengths = np.full(len(dataset), positions)

    def batch(self, indices: np.ndarray, device: torch.device) -> Batch:
        """Images [B] as pixel values [B, 3, H, W], decoded when they are read."""
        chosen = indices.tolist()
        pixels = Pixels(lambda: self._preprocess([self._images[i] for i in chosen]).to(device))
        nothing = torch.zeros((), device=device).expand(len(chosen), *self._preprocess.shape)
        return Batch(
            pixels,
            self._labels[indices].to(device, non_blocking=True),
            torch.arange(len(chosen), device=device),
            outline={"pixel_values": nothing},
        )

    def targets(self, indices: np.ndarray) -> np.ndarray:
        return self._labels[indices].numpy()

    def prepare(self, hidden: Callable[[Batch], Tensor]) -> None:
        """Ask for the class names' features, if the head reads them."""
        if self._names is not None and not isinstance(self._head, Linear):
            self._head.weight = self._names()

    def fresh_head(self, width: int) -> Tensor | None:
        return self._head.fresh(width)

    def trainable_head(self, width: int) -> Tensor | None:
        return self._head.trainable(width)

    def pool(self, hidden: Tensor, batch: Batch) -> Tensor:
        """States [B, T, D] -> features [B, D]."""
        return self._head.features(hidden[:, 0] if self._pooling == "cls" else hidden.mean(1))

    def logits(self, z: Tensor, head: Tensor | None) -> Tensor:
        return self._head.logits(z, head)

    def score(self, log_p: Tensor, targets: Tensor) -> Tensor:
        return hits(log_p, targets)


class Pixels(Mapping[str, Tensor]):
    """``{"pixel_values": ...}``, made when it is first read."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._made: Tensor | None = None

    def __getitem__(self, key: str) -> Tensor:
        if key != "pixel_values":
            raise KeyError(key)
        if self._made is None:
            self._made = self._make()
        return self._made

    def __iter__(self) -> Iterator[str]:
        return iter(("pixel_values",))

    def __len__(self) -> int:
        return 1
