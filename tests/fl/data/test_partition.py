from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedms.fl.data.federation import ClientData, Dataset, Federation
from fedms.fl.data.partition import (
    Fractions,
    dirichlet_shares,
    iid_shares,
    label_counts,
    make_federation,
    pathological_shares,
    split_dataset,
)
from fedms.fl.types import DataError

PARTS = ("train", "gate", "val", "test")


def dataset(labels, **options) -> Dataset:
    labels = np.array(labels, dtype=np.int64)
    return Dataset(
        inputs=tuple(f"text {i}" for i in range(len(labels))),
        labels=labels,
        class_names=tuple(f"class {c}" for c in range(labels.max() + 1)),
        **options,
    )


def indices(clients: tuple[ClientData, ...]) -> list[int]:
    return [i for client in clients for part in PARTS for i in getattr(client, part)]


def as_lists(federation: Federation) -> list:
    everyone = (*federation.clients, *federation.unseen)
    return [(c.client_id, *(getattr(c, part).tolist() for part in PARTS)) for c in everyone]


def refuse(data: Dataset, *parts: str, **options) -> None:
    with pytest.raises(DataError) as caught:
        make_federation(data, **options)
    for part in parts:
        assert part in str(caught.value)


BIG = dataset(np.repeat(np.arange(5), [400, 300, 200, 80, 20]))

SETTINGS = st.fixed_dictionaries(
    {
        "partitioner": st.sampled_from(["iid", "dirichlet", "pathological"]),
        "num_clients": st.integers(3, 8),
        "alpha": st.sampled_from([1.0, 3.0, 100.0]),
        "classes_per_client": st.integers(2, 4),
        "min_partition_size": st.just(1),
        "unseen_clients": st.integers(0, 3),
        "seed": st.integers(0, 2**32),
    }
)


@st.composite
def datasets(draw) -> Dataset:
    """240 to 500 examples of 2 to 4 classes, in groups of one class each or without groups."""
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    num_classes = draw(st.integers(2, 4))
    labels = rng.integers(num_classes, size=draw(st.integers(240, 500)))
    labels[:num_classes] = range(num_classes)
    group_size = draw(st.sampled_from([None, 1, 3]))
    if group_size is None:
        return dataset(labels)
    of_class = len(labels) // (group_size * num_classes)
    return dataset(labels, groups=labels * of_class + rng.integers(of_class, size=len(labels)))


@settings(max_examples=60)
@given(datasets(), SETTINGS)
def test_every_example_lands_in_one_split_of_one_client(data, options):
    options["classes_per_client"] = min(options["classes_per_client"], len(data.class_names))
    federation = make_federation(data, **options)
    everyone = (*federation.clients, *federation.unseen)
    assert len(federation.clients) == options["num_clients"]
    assert len(federation.unseen) == options["unseen_clients"]
    assert sorted(indices(everyone)) == list(range(len(data)))
    assert sorted(c.client_id for c in everyone) == [f"client-{k:02}" for k in range(len(everyone))]
    for client in everyone:
        assert len(client.train) >= 1
        assert len(client.test) >= 1
        for part in PARTS:
            index = getattr(client, part)
            assert index.dtype == np.int64
            assert (np.diff(index) > 0).all()
    if data.groups is not None:
        sides = [{data.groups[i] for c in everyone for i in getattr(c, part)} for part in PARTS]
        assert sum(len(side) for side in sides) == len(set(data.groups.tolist()))


@settings(max_examples=20)
@given(SETTINGS)
def test_the_seed_alone_decides(options):
    first = as_lists(make_federation(BIG, **options))
    assert as_lists(make_federation(BIG, **options)) == first
    assert as_lists(make_federation(BIG, **{**options, "seed": options["seed"] + 1})) != first


@settings(max_examples=30)
@given(SETTINGS)
def test_a_client_has_its_share_of_every_class_in_every_split(options):
    """Counts of a client and class are those of the split times one share, within one example."""
    federation = make_federation(BIG, **options)
    everyone = (*federation.clients, *federation.unseen)
    of_split = {
        part: np.bincount(BIG.labels[[i for c in everyone for i in getattr(c, part)]], minlength=5)
        for part in PARTS
    }
    for client in everyone:
        counts = {p: np.bincount(BIG.labels[getattr(client, p)], minlength=5) for p in PARTS}
        for part in ("gate", "val", "test"):
            scale = of_split[part] / of_split["train"]
            assert (np.abs(counts[part] - counts["train"] * scale) < 1 + scale).all()


def test_worked_by_hand():
    """10 of class 0 and 20 of class 1; train, test = 0.6, 0.4; two equal clients."""
    data = dataset([0] * 10 + [1] * 20)
    half = Fractions(train=0.6, gate=0, val=0, test=0.4)
    federation = make_federation(
        data, partitioner="iid", num_clients=2, min_partition_size=9, fractions=half
    )
    assert label_counts(federation).tolist() == [[3, 6], [3, 6]]
    assert label_counts(federation).dtype == np.int64
    for client in federation.clients:
        assert np.bincount(data.labels[client.test]).tolist() == [2, 4]
        assert len(client.gate) == len(client.val) == 0


def test_split_counts_worked_by_hand():
    """Class 0 has 20 groups of 3, class 1 four groups, class 2 two, class 3 one group."""
    groups = np.concatenate([np.repeat(np.arange(20), 3), np.arange(20, 27)])
    data = dataset([0] * 60 + [1] * 4 + [2] * 2 + [3], groups=groups)
    split = split_dataset(data, Fractions(), seed=3)
    counts = np.stack([np.bincount(data.labels[part], minlength=4) for part in split])
    assert counts.T.tolist() == [[36, 9, 3, 12], [1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("num_clients", [3, 100, 700])
def test_iid_clients_differ_by_at_most_two_examples(num_clients):
    data = dataset(np.arange(3500) % 7)
    federation = make_federation(
        data, partitioner="iid", num_clients=num_clients, min_partition_size=1
    )
    for part in PARTS:
        sizes = [len(getattr(client, part)) for client in federation.clients]
        assert max(sizes) - min(sizes) <= 2


def test_dirichlet_is_the_more_skewed_the_smaller_alpha():
    def share_of_largest_class(alpha: float) -> float:
        counts = label_counts(make_federation(BIG, num_clients=5, alpha=alpha, seed=1))
        return (counts.max(axis=1) / counts.sum(axis=1)).mean()

    assert share_of_largest_class(0.2) > share_of_largest_class(1e6) + 0.1
    assert abs(share_of_largest_class(1e6) - 0.4) < 0.02


@pytest.mark.parametrize("classes_per_client", [1, 2, 5])
def test_pathological_clients_have_that_many_classes(classes_per_client):
    data = dataset(np.arange(1000) % 5)
    federation = make_federation(
        data, partitioner="pathological", num_clients=10, classes_per_client=classes_per_client
    )
    counts = label_counts(federation)
    assert ((counts > 0).sum(axis=1) == classes_per_client).all()
    assert ((counts > 0).sum(axis=0) == 10 * classes_per_client / 5).all()
    for client in federation.clients:
        assert set(data.labels[client.test]) == set(data.labels[client.train])


def test_shares_are_matrices_of_rows_that_sum_to_one():
    rng = np.random.default_rng(0)
    for shares in (
        iid_shares(3, 4),
        dirichlet_shares(3, 4, 0.3, rng),
        dirichlet_shares(3, 4, 1e-9, rng),
        pathological_shares(3, 4, 2, rng),
    ):
        assert shares.shape == (3, 4)
        np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert np.ptp(dirichlet_shares(3, 4, 0.3, rng), axis=1).min() > 0.01


def test_a_class_that_no_example_has_is_no_obstacle():
    data = replace(BIG, labels=BIG.labels + (BIG.labels > 1), class_names=tuple("abcdef"))
    counts = label_counts(make_federation(data, partitioner="pathological", num_clients=4))
    assert counts.shape == (4, 6)
    assert counts[:, 2].sum() == 0
    assert ((counts > 0).sum(axis=1) == 2).all()


def natural(sizes: dict[str, int], **options) -> Dataset:
    clients = tuple(name for name, size in sizes.items() for _ in range(size))
    return dataset(np.arange(len(clients)) % 3, clients=clients, **options)


def test_column_takes_the_clients_of_the_data():
    data = natural({"Ulm": 40, "Köln": 20, "Bonn": 2})
    federation = make_federation(data, partitioner="column", num_clients=99)
    assert [c.client_id for c in federation.clients] == ["Bonn", "Köln", "Ulm"]
    for client in federation.clients:
        owned = sorted(indices((client,)))
        assert owned == [i for i, name in enumerate(data.clients or ()) if name == client.client_id]
    assert [len(getattr(federation.client("Köln"), part)) for part in PARTS] == [12, 3, 1, 4]
    assert [len(getattr(federation.client("Bonn"), part)) for part in PARTS] == [1, 0, 0, 1]


def test_a_client_alone_is_split_as_among_others():
    rng = np.random.default_rng(1)
    data = dataset(rng.integers(4, size=400), clients=tuple(rng.choice(list("abc"), 400)))
    for client in make_federation(data, partitioner="column", seed=5).clients:
        rows = np.flatnonzero(np.array(data.clients) == client.client_id)
        alone = Dataset(
            [data.inputs[i] for i in rows], data.labels[rows], data.class_names,
            clients=(client.client_id,) * len(rows),
        )  # fmt: skip
        (found,) = make_federation(alone, partitioner="column", seed=5).clients
        for part in PARTS:
            assert rows[getattr(found, part)].tolist() == getattr(client, part).tolist()


def test_column_spreads_a_clients_classes_over_its_splits():
    data = natural({"a": 300, "b": 90})
    for client in make_federation(data, partitioner="column").clients:
        for part in ("train", "gate", "test"):
            counts = np.bincount(data.labels[getattr(client, part)])
            assert np.ptp(counts) <= 2


def test_column_holds_unseen_clients_out():
    data = natural(dict.fromkeys("abcdefgh", 10))
    chosen = set()
    for seed in range(6):
        federation = make_federation(data, partitioner="column", unseen_clients=2, seed=seed)
        assert (len(federation.clients), len(federation.unseen)) == (6, 2)
        chosen.add(tuple(c.client_id for c in federation.unseen))
    assert len(chosen) > 1
    refuse(data, "unseen_clients", "8", partitioner="column", unseen_clients=8)


def test_unseen_clients_change_no_split():
    """The split comes from a stream of its own: whom it is shared out to does not matter."""
    few, many = (make_federation(BIG, num_clients=k, seed=5) for k in (2, 6))
    for part in PARTS:
        of_few, of_many = (
            sorted(i for c in f.clients for i in getattr(c, part)) for f in (few, many)
        )
        assert of_few == of_many


def test_the_seed_draws_the_shares():
    counts = [label_counts(make_federation(BIG, num_clients=5, seed=seed)) for seed in (0, 1)]
    assert counts[0].sum(axis=0).tolist() == counts[1].sum(axis=0).tolist()
    assert np.abs(counts[0] - counts[1]).max() > 10


def test_a_class_is_dealt_at_random():
    """Neighbours in a file, which are alike, go to different clients; so does a remainder."""
    data, larger = dataset([0] * 21), set()
    for seed in range(8):
        a, b = make_federation(
            data, partitioner="iid", num_clients=2, min_partition_size=1, seed=seed
        ).clients
        assert a.train.max() > b.train.min()
        assert b.train.max() > a.train.min()
        larger.add(len(a.train) > len(b.train))
    assert larger == {True, False}


def test_a_small_clients_class_may_land_in_any_split():
    data = dataset(range(5), clients=("a",) * 5)
    with_class_0 = set()
    for seed in range(40):
        (client,) = make_federation(data, partitioner="column", seed=seed).clients
        with_class_0 |= {part for part in PARTS if 0 in getattr(client, part)}
    assert with_class_0 == set(PARTS)


def test_a_draw_that_leaves_a_client_untested_is_drawn_again():
    data = dataset(np.arange(100) % 2)
    few = Fractions(train=0.9, gate=0, val=0, test=0.1)
    for seed in range(20):
        federation = make_federation(
            data, num_clients=3, alpha=0.5, min_partition_size=1, fractions=few, seed=seed
        )
        assert min(len(client.test) for client in federation.clients) >= 1


def test_a_client_of_one_class_is_legal():
    data = dataset([0] * 20 + [1] * 20, clients=("a",) * 20 + ("b",) * 20)
    federation = make_federation(data, partitioner="column")
    assert label_counts(federation).tolist() == [[12, 0], [0, 12]]


def test_given_test_rows_stay_test():
    splits = tuple("test" if i % 4 == 0 else "train" for i in range(200))
    data = dataset(np.arange(200) % 5, splits=splits)
    federation = make_federation(data, partitioner="iid", num_clients=4, min_partition_size=1)
    test = sorted(i for c in federation.clients for i in c.test)
    assert test == list(range(0, 200, 4))
    # 30 of a class are left for train, gate, val in 60 : 15 : 5
    sizes = [sum(len(getattr(c, part)) for c in federation.clients) for part in PARTS[:3]]
    assert np.abs(np.array(sizes) - [112.5, 28.125, 9.375]).max() < 5


def test_empty_natural_clients_are_named():
    refuse(natural({"a": 9, "Ulm": 1}), "'Ulm' has 1 rows", "at least 2 rows", partitioner="column")
    data = natural({"a": 9, "b": 20}, splits=("train", "test") * 4 + ("train",) * 21)
    refuse(data, "'b' has 20 rows, 15 for train and 0 for test", partitioner="column")


def test_a_group_on_both_sides_of_the_given_splits_is_refused():
    data = dataset([0, 1, 0], groups=np.array([0, 0, 1]), splits=("train", "test", "train"))
    refuse(data, "a group must be all train or all test, got 1")


def test_no_training_rows():
    refuse(dataset([0, 1], splits=("test", "test")), "no training rows")


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_alpha_out_of_range(alpha):
    refuse(BIG, "alpha", "above 0", f"got {alpha}", alpha=alpha)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"num_clients": 0}, ["num_clients must be at least 1", "got 0"]),
        ({"unseen_clients": -1}, ["unseen_clients must not be negative", "got -1"]),
        (
            {"num_clients": 600, "unseen_clients": 1},
            ["601 clients", "training examples", "got 600"],
        ),
        ({"partitioner": "shard"}, ["'dirichlet'", "'column'", "got 'shard'"]),
        ({"partitioner": "column"}, ["'column'", "no clients"]),
        (
            {"partitioner": "pathological", "classes_per_client": 6},
            ["classes_per_client", "1 to 5"],
        ),
        ({"partitioner": "pathological", "classes_per_client": 0}, ["classes_per_client", "got 0"]),
        (
            {"partitioner": "pathological", "classes_per_client": 2, "num_clients": 2},
            ["2 clients with 2 classes", "5 classes to nobody"],
        ),
        ({"seed": -1}, ["seed must not be negative", "got -1"]),
        (
            {"partitioner": "iid", "num_clients": 4, "min_partition_size": 151},
            ["4 clients 151 train", "the smallest 150", "smaller min_partition_size"],
        ),
    ],
)
def test_settings_out_of_range(options, parts):
    refuse(BIG, *parts, **options)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ((0.5, 0.1, 0.1, 0.2), "sum to 1"),
        ((1.2, 0.0, -0.4, 0.2), "not be negative"),
        ((float("nan"), 0.3, 0.3, 0.4), "sum to 1"),
        ((0.8, 0.1, 0.1, 0.0), "test must be above 0"),
        ((0.0, 0.4, 0.2, 0.4), "train and test"),
    ],
)
def test_fractions_out_of_range(values, part):
    with pytest.raises(DataError, match=part):
        Fractions(*values)
