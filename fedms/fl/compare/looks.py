"""Which colour, marker and number a method has in all pictures, and whether it stands out.

FedMS and its variants are blues, the others have the other hues of Okabe and Ito's palette, which
colour-blind readers tell apart; markers and numbers differ as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, zip_longest
from statistics import mean

import numpy as np

from fedms.fl.compare.comparison import Comparison
from fedms.fl.compare.result import balance

STAND_OUT = 12
"""Methods that are told apart by colour; the others are pale, and told by their numbers."""
BLUES = ("#003a5d", "#0072B2", "#56B4E9", "#1f4fd8", "#00a3a3", "#7f8fe0")
OTHERS = ("#E69F00", "#CC79A7", "#009E73", "#D55E00", "#8c564b", "#b09c00", "#7b3294", "#555555")
PALE = {True: "#a9c9e2", False: "#cfc6bb"}
"""By whether it is FedMS's."""
MARKERS = "osD^PXv*<h>p"


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Attributes:
        number: its place in the key, from 1: FedMS and its variants, then the others.
    """

    number: int
    label: str
    color: str
    marker: str
    stands_out: bool


def looks_of(comparison: Comparison, first: Sequence[str] = ()) -> dict[str, Look]:
    """A look for every method, by number.

    Args:
        first: methods that stand out in any case. The places left go to those that are beaten
            least, to FedMS's variants and to the others in turn.
    """
    families = families_of(comparison, first)
    named = [method for method in first if method in comparison.labels]
    others = ([method for method in family if method not in named] for family in families)
    turns = [method for pair in zip_longest(*others) for method in pair if method is not None]
    shown = {*named, *turns[: max(0, STAND_OUT - len(named))]}
    looks: dict[str, Look] = {}
    for family, hues in zip(families, (BLUES, OTHERS), strict=True):
        hue, marker = cycle(hues), cycle(MARKERS)
        for method in family:
            bold = method in shown
            looks[method] = Look(
                len(looks) + 1,
                comparison.labels[method],
                next(hue) if bold else PALE[hues is BLUES],
                next(marker) if bold else ".",
                bold,
            )
    return looks


def families_of(comparison: Comparison, first: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """FedMS's variants and the others: those of ``first``, then as :func:`beaten` says."""
    share = beaten(comparison)
    places = {method: place for place, method in enumerate(first)}
    algorithms = {
        m: run.algorithm for runs in comparison.blocks.values() for m, run in runs.items()
    }
    ordered = sorted(comparison.labels, key=lambda m: (places.get(m, len(places)), share[m]))
    ours = [method for method in ordered if algorithms[method] == "fedms"]
    return ours, [method for method in ordered if method not in ours]


def beaten(comparison: Comparison) -> dict[str, float]:
    """By how many of the others in its blocks a method is beaten: a share, mean over blocks.

    By own + everyone's, by own where a block has no others. Unlike a rank it needs no full table.
    """
    shares: dict[str, list[float]] = {method: [] for method in comparison.labels}
    for runs in comparison.blocks.values():
        scores = {method: balance(run.scores) for method, run in runs.items()}
        if None in scores.values():
            scores = {method: run.scores.own for method, run in runs.items()}
        ranked = np.array(list(scores.values()), dtype=np.float64)
        above = (ranked[None] > ranked[:, None]).sum(1) / max(1, len(ranked) - 1)
        for method, share in zip(runs, above.tolist(), strict=True):
            shares[method].append(share)
    return {method: mean(found) for method, found in shares.items()}
