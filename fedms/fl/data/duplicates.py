"""Examples that occur more than once: a model must not be tested on what it was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedms.fl.data.federation import Dataset
from fedms.fl.data.images import Images


def contents(inputs: Sequence[Any]) -> tuple[str, ...] | None:
    """A string an example, equal for equal examples; None of what is neither text nor image."""
    if isinstance(inputs, Images):
        return inputs.digests
    return tuple(inputs) if len(inputs) and isinstance(inputs[0], str) else None


def repeated_examples(dataset: Dataset) -> str | None:
    """What a log should say about equal examples; None where there are none."""
    found = contents(dataset.inputs)
    kind = "images" if isinstance(dataset.inputs, Images) else "texts"
    counts = Counter(found)
    repeated = sum(count for count in counts.values() if count > 1)
    if not found or not repeated:
        return None
    if dataset.splits is not None:
        sides: dict[str, list[str]] = {"train": [], "test": []}
        for content, side in zip(found, dataset.splits, strict=True):
            sides[side].append(content)
        train, tests = set(sides["train"]), sides["test"]
        both = sum(content in train for content in tests)
        note = f"{both} of {len(tests)} test {kind} stand in training rows as well"
        return note if both else None
    groups = dataset.groups
    together = groups is not None and len(set(zip(found, groups.tolist(), strict=True))) == len(
        counts
    )
    return f"{repeated} of {len(dataset)} {kind} occur more than once; " + (
        "equal ones stay on one side of the split"
        if together
        else "equal ones may stand on both sides of the split"
    )
