"""Clients' states on disk: by round, through kills and damage, at a cost of the cohort's size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedms.fl.journal.states import ClientStates
from fedms.fl.types import CheckpointError, State

ODD = [
    "a/b",
    "a%2Fb",
    "../../x",
    ".",
    "..",
    "",
    "A",
    "a",
    "a.7",
    "Köln 7",
    "x" * 300,
    "\udc80",
    "\x00",
]


def state(value: float) -> State:
    return {"local.x": torch.tensor([value, -0.0]), "gate.y": torch.tensor([1e-40]).bfloat16()}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def states(tmp_path) -> ClientStates:
    return ClientStates(tmp_path / "clients")


def test_what_was_written_comes_back_bit_by_bit(states):
    shared = torch.arange(6.0).view(2, 3)
    wanted = {"local.a": shared, "local.b": shared, "local.t": shared.T, **state(1 / 3)}
    states.write("a", 1, wanted)
    states.sync()
    found = states.read("a", 1)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(
            found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        )


def test_a_read_sees_the_last_visit_up_to_its_round(states):
    for round in (2, 5, 10):
        states.write("a", round, state(round))
    seen = {r: states.read("a", r) for r in (1, 2, 4, 5, 9, 10, 99)}
    assert seen.pop(1) is None
    assert {r: found["local.x"][0].item() for r, found in seen.items()} == {
        2: 2, 4: 2, 5: 5, 9: 5, 10: 10, 99: 10,
    }  # fmt: skip
    assert states.read("b", 99) is None


def test_clients_have_files_of_their_own_within_the_folder(states, tmp_path):
    """Also where the disk does not tell a from A."""
    for i, client in enumerate(ODD):
        states.write(client, 1, state(i))
    assert [states.read(client, 1)["local.x"][0] for client in ODD] == list(range(len(ODD)))
    names = [path.name.casefold() for path in files(tmp_path)]
    assert len(set(names)) == len(ODD)
    assert max(map(len, names)) < 200
    assert all(path.is_relative_to(tmp_path / "clients") for path in files(tmp_path))


def test_a_second_attempt_at_a_round_takes_the_place_of_the_first(states, tmp_path):
    for value in (1, 2, 2):
        states.write("a", 3, state(value))
    assert states.read("a", 3)["local.x"][0] == 2
    assert len(files(tmp_path)) == 1


def test_later_rounds_and_torn_files_of_a_killed_run_are_forgotten(states, tmp_path):
    for round in (1, 2, 3):
        states.write("a", round, state(round))
    states.write("b", 3, state(3))
    whole = files(tmp_path)[0]
    whole.with_name(f".{whole.name}").write_bytes(b"to")
    theirs = whole.with_name("Thumbs.db")
    theirs.write_bytes(b"a file manager's")
    states.forget_after(2)
    theirs.unlink()
    assert len(files(tmp_path)) == 2
    assert states.read("a", 9)["local.x"][0] == 2
    assert states.read("b", 9) is None


def test_old_versions_go_and_other_clients_stay(states, tmp_path):
    for round in (1, 2, 3, 4):
        states.write("a", round, state(round))
    states.write("b", 1, state(1))
    states.forget_before(3, ["a"])
    assert len(files(tmp_path)) == 3
    assert states.read("a", 2) is None
    assert [states.read("a", r)["local.x"][0] for r in (3, 4)] == [3, 4]
    assert states.read("b", 4)["local.x"][0] == 1


@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "empty"])
def test_damage_costs_one_client(states, tmp_path, damage):
    for client in ("a", "b"):
        states.write(client, 1, state(1))
    path = next(path for path in files(tmp_path) if path.name.startswith("a-"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"truncate": content[:-9], "flip a bit": content, "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"state of client a in .* is not what was written"):
        states.read("a", 1)
    assert states.read("b", 1) is not None
