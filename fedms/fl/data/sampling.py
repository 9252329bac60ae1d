"""Randomness that depends on names, not on history.

The same (seed, purpose, round, client) draws the same numbers, so a run that was stopped and
resumed draws what a run without a stop would have drawn.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence

import numpy as np


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A generator of its own for ``names``, e.g. ``generator(seed, "cohort", round)``."""
    words = [name if isinstance(name, int) else zlib.crc32(name.encode()) for name in names]
    return np.random.default_rng([seed, *words])


def cohort_size(clients: int, fraction: float) -> int:
    """How many of the clients a round draws."""
    return max(1, math.ceil(fraction * clients - 1e-9))  # 0.07 * 100 is 7.000000000000001


def draw_cohort(client_ids: Sequence[str], fraction: float, seed: int, round: int) -> list[str]:
    """One round's clients, without replacement, at least one, in the order of ``client_ids``."""
    size = cohort_size(len(client_ids), fraction)
    chosen = generator(seed, "cohort", round).choice(len(client_ids), size=size, replace=False)
    positions: list[int] = sorted(chosen.tolist())
    return [client_ids[i] for i in positions]


def draw_each(client_ids: Sequence[str], probability: float, seed: int, round: int) -> list[str]:
    """One round's clients, each drawn by itself (Poisson sampling); sometimes nobody."""
    drawn = generator(seed, "cohort", round).random(len(client_ids)) < probability
    return [client_id for client_id, one in zip(client_ids, drawn, strict=True) if one]


def draw_batches(
    indices: np.ndarray, lengths: np.ndarray, batch_size: int, steps: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """``steps`` mini-batches of at most ``batch_size`` indices, texts of like length together.

    Every index is seen once before any is seen again. ``lengths`` [len(indices)] are in tokens:
    padding costs as much as text, and without grouping about half of a batch of short texts is
    padding. Ties and the order of the batches are random.
    """
    while steps > 0:
        order = rng.permutation(len(indices))
        order = indices[order[np.argsort(lengths[order], kind="stable")]]
        starts = rng.permutation(range(0, len(order), batch_size))[:steps]
        yield from (order[start : start + batch_size] for start in starts)
        steps -= len(starts)
