"""Classification: one answer an example, by class names in words or by a trained linear head.

B examples, C classes, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedms.fl.tasks.task import Metric

ACCURACY = Metric("accuracy", 100.0, "%")


class ClassNames:
    """The zero-shot head, as CLIP's: logits are scaled cosines of an example and a class name.

    Args:
        scale: what the cosines are multiplied by.

    Attributes:
        weight: unit features of the class names [C, D], once they are known.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self.weight = torch.empty(0, 0)

    def features(self, pooled: Tensor) -> Tensor:
        """Pooled states [B, D] -> unit features."""
        return F.normalize(pooled, dim=-1)

    def fresh(self, width: int) -> Tensor | None:
        """Nothing: class names are not trained."""
        return None

    def trainable(self, width: int) -> Tensor:
        """The class names' features, for a method that trains a head from there on."""
        return self.weight

    def logits(self, z: Tensor, head: Tensor | None) -> Tensor:
        """Features [P, D] -> [P, C], by the class names or by what was trained from them."""
        return z @ (self.weight if head is None else head).T * self._scale


class Linear:
    """A head that every expert trains with itself: logits are features times weights [C, D].

    Args:
        num_classes: C. The weights start at zero, so that before any training all classes are
            alike, on every client.
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes

    def features(self, pooled: Tensor) -> Tensor:
        """Pooled states [B, D] as they are."""
        return pooled

    def fresh(self, width: int) -> Tensor | None:
        """Zeros [C, D]."""
        return torch.zeros(self._num_classes, width)

    trainable = fresh

    def logits(self, z: Tensor, head: Tensor | None) -> Tensor:
        """Features [P, D] -> [P, C]; without a head (the base alone) all classes are alike."""
        return z.new_zeros(len(z), self._num_classes) if head is None else z @ head.T


class Projected:
    """Class names for an encoder that has no text tower: every expert trains a projection with it.

    Logits are scaled cosines of the projected example and the class name, [D] @ [E, D]ᵀ -> [E]. So
    classes that few examples have gain from what their names say.

    Args:
        scale: what the cosines are multiplied by.
        width: E, of the names' features.

    Attributes:
        weight: unit features of the class names [C, E], once they are known.
    """

    def __init__(self, scale: float, width: int) -> None:
        self._scale, self._width = scale, width
        self.weight = torch.empty(0, 0)

    def features(self, pooled: Tensor) -> Tensor:
        """Pooled states [B, D] as they are."""
        return pooled

    def fresh(self, width: int) -> Tensor | None:
        """Orthogonal rows or columns [E, D], the same on every client: it keeps angles."""
        draw = torch.Generator().manual_seed(0)
        return nn.init.orthogonal_(torch.empty(self._width, width), generator=draw)

    trainable = fresh

    def logits(self, z: Tensor, head: Tensor | None) -> Tensor:
        """Features [P, D] -> [P, C]; without a head (the base alone) all classes are alike."""
        if head is None:
            return z.new_zeros(len(z), len(self.weight))
        return F.normalize(z @ head.T, dim=-1) @ self.weight.T * self._scale


def hits(log_p: Tensor, targets: Tensor) -> Tensor:
    """Scores [P]: 1.0 where the likeliest class of log_p [P, C] is the right one, else 0.0."""
    return (log_p.argmax(-1) == targets).to(log_p.dtype)
