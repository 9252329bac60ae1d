"""Texts that occur more than once: a model must not be tested on what it was trained on."""

from __future__ import annotations

from collections import Counter

from fedms.fl.data.federation import Dataset


def repeated_texts(dataset: Dataset) -> str | None:
    """What a log should say about equal texts; None where there are none, or no texts."""
    if not len(dataset) or not isinstance(dataset.inputs[0], str):
        return None
    counts = Counter(dataset.inputs)
    repeated = sum(count for count in counts.values() if count > 1)
    if not repeated:
        return None
    if dataset.splits is not None:
        sides: dict[str, list[str]] = {"train": [], "test": []}
        for text, side in zip(dataset.inputs, dataset.splits, strict=True):
            sides[side].append(text)
        train, tests = set(sides["train"]), sides["test"]
        both = sum(text in train for text in tests)
        note = f"{both} of {len(tests)} test texts stand in training rows as well"
        return note if both else None
    together = dataset.groups is not None and len(
        set(zip(dataset.inputs, dataset.groups.tolist(), strict=True))
    ) == len(counts)
    return f"{repeated} of {len(dataset)} texts occur more than once; " + (
        "equal ones stay on one side of the split"
        if together
        else "equal ones may stand on both sides of the split"
    )
