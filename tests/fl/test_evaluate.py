"""Who and what is scored: all there is, or a sample drawn once for the run."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from fedms.fl.data.federation import ClientData, Dataset, Federation
from fedms.fl.engines.world import load_federation
from fedms.fl.evaluate import scored_sample, val_sample
from fedms.fl.journal.progress import Progress
from fedms.fl.runs.folder import resume, start
from fedms.fl.types import DataError


def federation(clients: int, unseen: int) -> Federation:
    """Every client has two validation examples."""
    none = np.array([], dtype=np.int64)
    everyone = [
        ClientData(f"c{k:03d}", none, none, np.array([2 * k, 2 * k + 1]), none)
        for k in range(clients + unseen)
    ]
    size = 2 * len(everyone)
    dataset = Dataset(("x",) * size, np.zeros(size, dtype=np.int64), ("x",))
    return Federation(dataset, tuple(everyone[:clients]), tuple(everyone[clients:]))


def test_all_are_scored_where_there_are_no_more_than_asked_for():
    few = federation(7, 3)
    clients, unseen = list("abcdefg"), list("xyz")
    for size in (0, 7, 8):
        assert scored_sample(clients, unseen, size, seed=0) == [*clients, *unseen]
        assert val_sample(few, 2 * size, seed=0).tolist() == list(range(14))


def test_a_sample_of_clients_and_of_unseen_ones_belongs_to_the_seed():
    many = federation(300, 20)
    who = [[client.client_id for client in some] for some in (many.clients, many.unseen)]
    ids = scored_sample(*who, 10, seed=0)
    assert ids == scored_sample(*who, 10, seed=0)
    assert ids != scored_sample(*who, 10, seed=1)
    assert len(set(ids)) == 20
    assert ids == sorted(ids)
    assert sum(id < "c300" for id in ids) == 10
    examples = val_sample(many, 25, seed=0)
    assert len(set(examples.tolist())) == 25
    assert examples.max() < 600  # nobody's who is unseen
    assert examples.max() > 100


def test_a_run_scores_the_sample_in_every_round(config, execute, tmp_path, read_lines):
    execute(config("eval.clients=2", "stage1.rounds=2", "stage2.rounds=1"), tmp_path)
    lines = read_lines(tmp_path / "clients.jsonl")
    by_round = {
        round: [line["client_id"] for line in lines if line["round"] == round]
        for round in (1, 2, 3)
    }
    assert by_round[1] == by_round[2] == by_round[3]
    assert [line["seen"] for line in lines if line["round"] == 1] == [True, True, False]
    last = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert last["personalized_accuracy"]["clients"] == 2
    assert last["unseen_accuracy"]["clients"] == 1
    assert len(last["participants"]) == 4


class StopAfterThree(Progress):
    """Told of three rounds, it ends the run."""

    def scored(self, method, record, metric) -> None:
        if record.round == 3:
            raise KeyboardInterrupt


def test_while_settings_are_chosen_no_test_example_is_scored(config, execute, tmp_path, read_lines):
    usual = load_federation(config())
    execute(config("eval.split=val", "eval.pooled_examples=0", "eval.every=9"), tmp_path)
    lines = read_lines(tmp_path / "clients.jsonl")
    sizes = {id: len(client.val) for id, client in usual.everyone.items()}
    assert {line["client_id"]: line["num_test"] for line in lines} == sizes
    for id, chosen in load_federation(config("eval.split=val")).everyone.items():
        assert chosen.test.tolist() == usual.client(id).val.tolist()
        assert chosen.own.tolist() == usual.client(id).own.tolist()


def test_a_client_without_validation_examples_is_named(config):
    none = ("data.val=0.0", "data.train=0.6", "sal.enabled=false")
    load_federation(config(*none))
    with pytest.raises(DataError, match="got none of client-0"):
        load_federation(config(*none, "eval.split=val"))


def test_a_damaged_file_costs_one_client(config, tmp_path, read_lines, monkeypatch, quiet):
    """Where it is not of the newest round, no checkpoint misses it: the client begins anew."""
    rounds = ("stage1.rounds=1", "stage2.rounds=3", "server.fraction_train=0.75")
    folder = tmp_path / "run"
    with suppress(KeyboardInterrupt):
        start(config(*rounds), folder, StopAfterThree(quiet=True))
    met = [set(line["participants"]) for line in read_lines(folder / "metrics.jsonl")]
    client = (met[1] - met[2]).pop()
    path = next((folder / "clients").rglob(f"{client}-*"))
    path.write_bytes(path.read_bytes()[:-3])
    warnings: list[str] = []
    monkeypatch.setattr(quiet, "warn", warnings.append)
    resume(folder, quiet)
    assert len(read_lines(folder / "metrics.jsonl")) == 4
    assert (folder / "finished").exists()
    assert f"the state of client {client} in" in warnings[0]
    assert warnings[0].endswith("the client begins anew")
