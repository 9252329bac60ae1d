"""How a dataset becomes clients: split it into train, gate, val and test, then share it out.

The split is drawn once for all clients, by group where the dataset has groups. Partitioners have
the names and ways of flwr-datasets': ``iid``, ``dirichlet``, ``pathological`` and ``column`` (the
natural clients of the data). The first three draw one matrix of shares [num_classes, num_clients]
and deal every split by it, so a client's train, gate, val and test have the same label distribution
up to rounding. Every example lands in exactly one split of one client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np

from fedms.fl.data.federation import ClientData, Dataset, Federation
from fedms.fl.data.sampling import generator
from fedms.fl.types import DataError

PARTITIONERS = ("iid", "dirichlet", "pathological", "column")
MAX_DRAWS = 100

_SPLIT, _SHARE, _UNSEEN = range(3)  # a random stream each, so that one does not depend on another


@dataclass(frozen=True)
class Fractions:
    """Shares of the data, summing to 1. ``gate`` is kept out of both experts' training.

    By default that is a fifth of what train and gate have together.
    """

    train: float = 0.60
    gate: float = 0.15
    val: float = 0.05
    test: float = 0.20

    def __post_init__(self) -> None:
        values = astuple(self)
        if not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-6:
            raise DataError(f"fractions must not be negative and must sum to 1, got {self}")
        if self.train == 0 or self.test == 0:
            raise DataError(f"the fractions train and test must be above 0, got {self}")


class Split(NamedTuple):
    """Sorted int64 indices into a dataset; each example is in exactly one of the four."""

    train: np.ndarray
    gate: np.ndarray
    val: np.ndarray
    test: np.ndarray


def make_federation(
    dataset: Dataset,
    *,
    partitioner: str = "dirichlet",
    num_clients: int = 20,
    alpha: float = 0.3,
    classes_per_client: int = 2,
    min_partition_size: int = 10,
    unseen_clients: int = 0,
    fractions: Fractions | None = None,
    seed: int = 0,
) -> Federation:
    """Share a dataset out to ``num_clients`` clients and ``unseen_clients`` more that never train.

    Args:
        partitioner: "iid", "dirichlet", "pathological" or "column".
        num_clients: clients that take part. "column" takes all that the data has instead.
        alpha: of "dirichlet"; the smaller, the fewer classes make up most of a client.
        classes_per_client: of "pathological".
        min_partition_size: fewest training examples of a client. "column" does not read it.
        unseen_clients: held out, chosen among all clients by the seed.
        fractions: of the split, ``Fractions()`` by default; see split_dataset.
        seed: the same seed gives the same federation.

    Returns:
        Clients named "client-00" and so on, or as in the client column. Each has at least one train
        and one test example; gate and val may be empty where a client is too small for them.

    Raises:
        DataError: a setting is out of range, or a client would be left without examples.
    """
    if partitioner not in PARTITIONERS:
        raise DataError(f"partitioner must be one of {PARTITIONERS}, got {partitioner!r}")
    if num_clients < 1:
        raise DataError(f"num_clients must be at least 1, got {num_clients}")
    if unseen_clients < 0:
        raise DataError(f"unseen_clients must not be negative, got {unseen_clients}")
    natural = partitioner == "column"
    split = split_dataset(dataset, fractions or Fractions(), seed=seed, by_client=natural)
    if natural:
        names, owner = np.unique(np.array(dataset.clients), return_inverse=True)
        clients = _clients([str(name) for name in names], owner, split)
        _check_natural(clients)
    else:
        total = num_clients + unseen_clients
        if total > len(split.train):
            raise DataError(
                f"{total} clients need at least {total} training examples, got {len(split.train)}"
            )
        rng = np.random.default_rng([seed, _SHARE])
        labels = np.unique(dataset.labels, return_inverse=True)[1]
        num_classes = labels.max() + 1
        draw = {
            "iid": lambda: iid_shares(num_classes, total),
            "dirichlet": lambda: dirichlet_shares(num_classes, total, alpha, rng),
            "pathological": lambda: pathological_shares(
                num_classes, total, classes_per_client, rng
            ),
        }[partitioner]
        owner = _owners(labels, split, draw, total, min_partition_size, rng)
        digits = max(2, len(str(total - 1)))
        clients = _clients([f"client-{k:0{digits}d}" for k in range(total)], owner, split)
    if unseen_clients >= len(clients):
        raise DataError(
            f"unseen_clients must be below the number of clients, {len(clients)}, "
            f"got {unseen_clients}"
        )
    unseen_rng = np.random.default_rng([seed, _UNSEEN])
    held_out = set(unseen_rng.choice(len(clients), unseen_clients, replace=False))
    return Federation(
        dataset=dataset,
        clients=tuple(client for k, client in enumerate(clients) if k not in held_out),
        unseen=tuple(client for k, client in enumerate(clients) if k in held_out),
    )


def split_dataset(
    dataset: Dataset, fractions: Fractions, *, seed: int, by_client: bool = False
) -> Split:
    """Split by group, or by example where there are no groups.

    Fractions count groups. Stratified by class: a class of four groups or more has some in every
    split, one of two has train and test, one of one has train. ``by_client`` stratifies by client
    instead, and spreads a client's classes evenly over the splits, in a way that depends on its own
    rows alone. A group of mixed classes (or clients) counts as its first example's. Where
    ``dataset.splits`` is given, its test rows are the test split and train, gate and val share the
    others in proportion.

    Raises:
        DataError: no clients to go by, no training rows, or ``dataset.splits`` tears a group.
    """
    if by_client and dataset.clients is None:
        raise DataError("partitioner 'column' needs a client column, the dataset has no clients")
    if seed < 0:
        raise DataError(f"seed must not be negative, got {seed}")
    rng = np.random.default_rng([seed, _SPLIT])
    shares = np.array(astuple(fractions))
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    strata = np.array(dataset.clients) if by_client else dataset.labels
    free = np.arange(len(dataset))
    if dataset.splits is not None:
        is_test = np.array(dataset.splits) == "test"
        torn = np.intersect1d(groups[is_test], groups[~is_test])
        if len(torn):
            raise DataError(f"a group must be all train or all test, got {len(torn)} that are both")
        free, shares = free[~is_test], np.array([*shares[:3], 0]) / shares[:3].sum()
    if len(free) == 0:
        raise DataError("the dataset has no training rows")

    _, first, unit = np.unique(groups[free], return_index=True, return_inverse=True)
    strata, labels = strata[free][first], dataset.labels[free][first]  # one per group from here on
    side = np.empty(len(first), dtype=np.int64)
    order = np.lexsort((rng.random(len(first)), labels, strata))
    starts = np.unique(strata[order], return_index=True)[1]
    for members in np.split(order, starts[1:]):
        if by_client:  # by its own draws: its site, which has no other rows, splits them alike
            rng = generator(seed, "split", str(strata[members[0]]))
            members = np.sort(members)
            members = members[np.lexsort((rng.random(len(members)), labels[members]))]
        slots = _spread(_split_counts(len(members), shares))
        side[members] = np.roll(slots, rng.integers(len(slots)))

    sides = np.full(len(dataset), 3)
    sides[free] = side[unit]
    return Split(*(np.flatnonzero(sides == s) for s in range(4)))


def iid_shares(num_classes: int, num_clients: int) -> np.ndarray:
    """Equal shares of every class: float64 [num_classes, num_clients], rows sum to 1."""
    return np.full((num_classes, num_clients), 1 / num_clients)


def dirichlet_shares(
    num_classes: int, num_clients: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    """Dirichlet(alpha) shares of every class: float64 [num_classes, num_clients], rows sum to 1."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise DataError(f"alpha must be a finite number above 0, got {alpha}")
    return rng.dirichlet(np.full(num_clients, alpha), size=num_classes)


def pathological_shares(
    num_classes: int, num_clients: int, classes_per_client: int, rng: np.random.Generator
) -> np.ndarray:
    """``classes_per_client`` random classes a client, each shared equally by those that have it.

    A client takes those classes that the fewest have so far, so that none is left over.
    Returns float64 [num_classes, num_clients], rows sum to 1.
    """
    if not 1 <= classes_per_client <= num_classes:
        raise DataError(
            f"classes_per_client must be from 1 to {num_classes}, the number of classes, "
            f"got {classes_per_client}"
        )
    if num_clients * classes_per_client < num_classes:
        raise DataError(
            f"{num_clients} clients with {classes_per_client} classes each leave some of "
            f"{num_classes} classes to nobody: raise classes_per_client or num_clients"
        )
    has = np.zeros((num_classes, num_clients))
    for k in range(num_clients):
        by_need = np.lexsort((rng.random(num_classes), has.sum(axis=1)))
        has[by_need[:classes_per_client], k] = 1
    return has / has.sum(axis=1, keepdims=True)


def label_counts(federation: Federation) -> np.ndarray:
    """Training examples by client and class: int64 [num_clients, num_classes]."""
    labels, size = federation.dataset.labels, len(federation.dataset.class_names)
    return np.stack([np.bincount(labels[c.train], minlength=size) for c in federation.clients])


def _split_counts(n: int, shares: np.ndarray) -> np.ndarray:
    """n units in whole numbers: one a share above 0 (train and test first), the rest by share."""
    least = np.zeros(4, dtype=np.int64)
    least[[s for s in (0, 3, 1, 2) if shares[s] > 0][:n]] = 1
    exact = n * shares
    counts = np.maximum(np.floor(exact).astype(np.int64), least)
    while counts.sum() < n:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > n:
        counts[np.argmax(np.where(counts > least, counts - exact, -np.inf))] -= 1
    return counts


def _spread(counts: np.ndarray) -> np.ndarray:
    """``counts[s]`` times s for every s, evenly mixed: [2, 0, 0, 1] gives [0, 3, 0]."""
    position = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(position, kind="stable")]


def _owners(
    labels: np.ndarray,
    split: Split,
    draw_shares: Callable[[], np.ndarray],
    num_clients: int,
    min_partition_size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """The client of every example, int64 [N], each split dealt by the same shares."""
    pools = [[part[labels[part] == c] for c in range(labels.max() + 1)] for part in split]
    needed = max(min_partition_size, 1)
    best = (-1, -1)
    for _ in range(MAX_DRAWS):
        shares = draw_shares()
        counts = [_apportion([len(pool) for pool in part], shares, rng) for part in pools]
        train, test = (int(counts[s].sum(axis=0).min()) for s in (0, 3))
        best = max(best, (train, test))
        if train >= needed and test >= 1:
            break
    else:
        raise DataError(
            f"none of {MAX_DRAWS} draws gave each of {num_clients} clients {needed} train and 1 "
            f"test examples, the best gave the smallest {best[0]} and {best[1]}: take fewer "
            "clients, a larger alpha, more classes per client or a smaller min_partition_size"
        )
    owner = np.empty(len(labels), dtype=np.int64)
    for part, part_counts in zip(pools, counts, strict=True):
        for pool, pool_counts in zip(part, part_counts, strict=True):
            owner[rng.permutation(pool)] = np.repeat(np.arange(num_clients), pool_counts)
    return owner


def _apportion(sizes: Sequence[int], shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``sizes[c] * shares[c]`` in whole numbers: int64 [num_classes, num_clients].

    Rounded up or down so that row c sums to ``sizes[c]``. What rounding takes from a client in one
    class it is owed in the next ones, so a client's total stays close to its share as well.
    """
    exact = np.array(sizes)[:, None] * shares
    counts = np.floor(exact + 1e-9).astype(np.int64)
    owed = np.zeros(shares.shape[1])
    for c, size in enumerate(sizes):
        part = exact[c] - counts[c]
        owed += part
        by_need = np.lexsort((rng.random(len(owed)), -owed.round(9)))
        winners = by_need[part[by_need] > 1e-9][: size - counts[c].sum()]
        counts[c, winners] += 1
        owed[winners] -= 1
    return counts


def _clients(names: Sequence[str], owner: np.ndarray, split: Split) -> list[ClientData]:
    parts = []
    for part in split:
        by_owner = part[np.argsort(owner[part], kind="stable")]
        ends = np.bincount(owner[part], minlength=len(names)).cumsum()
        parts.append(np.split(by_owner, ends[:-1]))
    return [ClientData(name, *(part[k] for part in parts)) for k, name in enumerate(names)]


def _check_natural(clients: Sequence[ClientData]) -> None:
    for client in clients:
        train, test = len(client.train), len(client.test)
        if train == 0 or test == 0:
            rows = train + len(client.gate) + len(client.val) + test
            raise DataError(
                f"client {client.client_id!r} has {rows} rows, {train} for train and {test} for "
                "test; a client needs at least 2 rows, 1 for train and 1 for test"
            )
