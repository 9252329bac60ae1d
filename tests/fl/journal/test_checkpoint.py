"""Checkpoints: bit-equal round trips, and what is left after damage or a full disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedms.fl.journal.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedms.fl.journal.states import ClientStates
from fedms.fl.types import CheckpointError


def make(round: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(round)
    return Checkpoint(
        round=round,
        server={
            "global.a": torch.randn(3, 4, generator=generator),
            "half": torch.randn(5, generator=generator).bfloat16(),
        },
        written=("b", "ward/7 ü"),
        sal={"order": [3, 2], "count": 1, "scores": [0.1, 1 / 3], "rounds": round},
    )


def states(folder: Path) -> ClientStates:
    return ClientStates(folder / "clients")


def commit(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> None:
    """What a round does: its clients' states, then the checkpoint."""
    for client in checkpoint.written:
        states(folder).write(client, checkpoint.round, {"x": torch.tensor([checkpoint.round])})
    save_checkpoint(folder / "c", checkpoint, states(folder), keep)


def load(folder: Path, warn: Callable[[str], None] = pytest.fail) -> Checkpoint | None:
    return load_checkpoint(folder / "c", states(folder), warn)


def assert_equal(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert (found.round, found.written, found.sal) == (
        expected.round,
        expected.written,
        expected.sal,
    )
    assert found.server.keys() == expected.server.keys()
    for name, tensor in expected.server.items():
        assert found.server[name].dtype == tensor.dtype
        assert torch.equal(found.server[name].view(torch.uint8), tensor.view(torch.uint8))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "c").iterdir())


def test_what_was_saved_comes_back_bit_by_bit(tmp_path):
    commit(tmp_path, make(1))
    assert_equal(load(tmp_path), make(1))


def test_tensors_that_are_views_are_saved_as_they_look(tmp_path):
    commit(tmp_path, Checkpoint(1, {"t": torch.arange(6.0).view(2, 3).T}, (), {}))
    found = load(tmp_path)
    assert found is not None
    assert found.server["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_newest_k_are_kept(tmp_path):
    for round in range(1, 6):
        commit(tmp_path, make(round), keep=3)
    assert names(tmp_path) == ["round-0003", "round-0004", "round-0005"]
    assert_equal(load(tmp_path), make(5))


def test_states_stay_as_long_as_a_checkpoint_refers_to_them(tmp_path):
    """a is visited in every round, b in the first two; the two newest checkpoints are kept."""
    for round in range(1, 6):
        clients = ("a", "b") if round < 3 else ("a",)
        commit(tmp_path, Checkpoint(round, {"x": torch.ones(1)}, clients, {}))
    seen = {
        (client, round): states(tmp_path).read(client, round)
        for client in ("a", "b")
        for round in range(1, 6)
    }
    held = {key: int(state["x"]) for key, state in seen.items() if state is not None}
    assert held == {("a", 4): 4, ("a", 5): 5, **{("b", r): 2 for r in range(2, 6)}}


def test_a_commit_touches_the_files_of_its_cohort_alone(tmp_path):
    commit(tmp_path, Checkpoint(1, {"x": torch.ones(1)}, tuple("abcdefgh"), {}))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "clients").rglob("*.*")}
    for round in (2, 3):
        commit(tmp_path, Checkpoint(round, {"x": torch.ones(1)}, ("a",), {}))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "clients").rglob("*.*")}
    assert len(before.items() - after.items()) == 1
    size = (tmp_path / "c" / "round-0003" / "state.json").stat().st_size
    assert size < (tmp_path / "c" / "round-0002" / "state.json").stat().st_size + 10 < 300


def test_the_ten_thousandth_round_is_newer_than_the_one_before(tmp_path):
    for round in (9998, 9999, 10000):
        commit(tmp_path, make(round))
    assert names(tmp_path) == ["round-10000", "round-9999"]
    assert_equal(load(tmp_path), make(10000))


def test_no_checkpoint_is_none(tmp_path):
    assert load(tmp_path) is None
    (tmp_path / "c").mkdir()
    assert load(tmp_path) is None


def test_a_round_can_be_saved_again(tmp_path):
    commit(tmp_path, make(1))
    again = Checkpoint(1, {"x": torch.ones(1)}, (), {})
    commit(tmp_path, again)
    assert_equal(load(tmp_path), again)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def other_json(path: Path) -> None:
    path.write_bytes(b"[]")


FILES = ("server.safetensors", "state.json")
DAMAGE = [(file, how) for file in FILES for how in (truncate, empty, flip, zero, Path.unlink)]


@pytest.mark.parametrize(("file", "how"), [*DAMAGE, ("state.json", other_json)])
def test_a_damaged_checkpoint_gives_the_one_before_and_a_warning(tmp_path, file, how):
    for round in (1, 2):
        commit(tmp_path, make(round))
    how(tmp_path / "c" / "round-0002" / file)
    warnings: list[str] = []
    assert_equal(load(tmp_path, warnings.append), make(1))
    assert len(warnings) == 1
    assert warnings[0].startswith("checkpoint round-0002 is damaged")
    commit(tmp_path, make(2))  # the run goes on over it
    assert_equal(load(tmp_path), make(2))


@pytest.mark.parametrize("how", [truncate, empty, flip, zero, Path.unlink])
def test_a_damaged_state_of_the_newest_round_gives_the_one_before(tmp_path, how):
    """Its clients are visited again then, so nothing is lost."""
    for round in (1, 2):
        commit(tmp_path, make(round))
    how(next((tmp_path / "clients").rglob("b-*.2.*")))
    warnings: list[str] = []
    assert_equal(load(tmp_path, warnings.append), make(1))
    assert len(warnings) == 1
    assert "round-0002 is damaged (the state of client b" in warnings[0]


def test_all_damaged_is_an_error(tmp_path):
    for round in (1, 2):
        commit(tmp_path, make(round))
        truncate(tmp_path / "c" / f"round-{round:04d}" / "server.safetensors")
    warnings: list[str] = []
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be read; the run must be started again"
    ):
        load(tmp_path, warnings.append)
    assert len(warnings) == 2


@pytest.mark.parametrize("left", [(), FILES[:1], FILES])
def test_what_a_kill_leaves_under_the_temporary_name_is_not_read(tmp_path, left):
    commit(tmp_path, make(1))
    (tmp_path / "c" / ".round-0002").mkdir()
    for name in left:
        shutil.copy(tmp_path / "c" / "round-0001" / name, tmp_path / "c" / ".round-0002")
    assert_equal(load(tmp_path), make(1))
    commit(tmp_path, make(2))
    assert names(tmp_path) == ["round-0001", "round-0002"]
    assert_equal(load(tmp_path), make(2))


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(CheckpointError, match="round-0001 cannot be written: "):
        commit(tmp_path, make(1))
    assert (tmp_path / "c").read_text() == "mine"


@pytest.mark.parametrize("nth", range(6))
def test_a_full_disk_leaves_the_older_ones(tmp_path, full_disk, nth):
    """ENOSPC at each sync in turn: of three folders of states, two files and their folder."""
    for round in (1, 2):
        commit(tmp_path, make(round))
    written = states(tmp_path)
    for client in make(3).written:
        written.write(client, 3, {"x": torch.tensor([3])})
    with (
        full_disk(nth),
        pytest.raises(
            CheckpointError, match="round-0003 cannot be written: No space left on device"
        ),
    ):
        save_checkpoint(tmp_path / "c", make(3), written, 2)
    assert {"round-0001", "round-0002"} <= set(names(tmp_path))
    assert_equal(load(tmp_path), make(3) if nth == 5 else make(2))
    commit(tmp_path, make(3))
    assert names(tmp_path) == ["round-0002", "round-0003"]


def test_nothing_is_pickled(tmp_path):
    commit(tmp_path, make(1))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
