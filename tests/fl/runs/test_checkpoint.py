"""Checkpoints: bit-equal round trips, and what is left after damage or a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from fedms.fl.runs.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedms.fl.types import CheckpointError


def make(round: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(round)
    return Checkpoint(
        round=round,
        server={
            "global.a": torch.randn(3, 4, generator=generator),
            "half": torch.randn(5, generator=generator).bfloat16(),
        },
        kept={
            "ward/7 ü": {
                "local.a": torch.randn(2, generator=generator),
                "gate.linear.bias": torch.tensor([-0.0, 1e-40]),
            },
            "b": {},
        },
        visited=("b", "ward/7 ü"),
        sal={"order": [3, 2], "count": 1, "scores": [0.1, 1 / 3], "rounds": round},
    )


def refuse_warnings(text: str) -> None:
    raise AssertionError(text)


def assert_equal(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert (found.round, found.visited, found.sal) == (
        expected.round,
        expected.visited,
        expected.sal,
    )
    pairs = [
        (found.server, expected.server),
        *((found.kept[c], expected.kept[c]) for c in expected.kept),
    ]
    assert found.kept.keys() == expected.kept.keys()
    for got, wanted in pairs:
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back_bit_by_bit(tmp_path):
    save_checkpoint(tmp_path / "c", make(1), keep=2)
    assert_equal(load_checkpoint(tmp_path / "c", refuse_warnings), make(1))


def test_tensors_that_are_views_are_saved_as_they_look(tmp_path):
    server = {"t": torch.arange(6.0).view(2, 3).T}
    save_checkpoint(tmp_path, Checkpoint(1, server, {}, (), {}), keep=2)
    found = load_checkpoint(tmp_path, refuse_warnings)
    assert found is not None
    assert found.server["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_clients_may_hold_the_very_same_tensor(tmp_path):
    """As the untrained part of a local expert that all began with; safetensors refuses that."""
    one = torch.randn(2, 2)
    kept = {"a": {"local.x": one}, "b": {"local.x": one, "local.y": one}}
    checkpoint = Checkpoint(1, {"global.x": one}, kept, (), {})
    save_checkpoint(tmp_path, checkpoint, keep=2)
    assert_equal(load_checkpoint(tmp_path, refuse_warnings), checkpoint)


def test_the_newest_k_are_kept(tmp_path):
    for round in range(1, 6):
        save_checkpoint(tmp_path, make(round), keep=3)
    assert names(tmp_path) == ["round-0003", "round-0004", "round-0005"]
    assert_equal(load_checkpoint(tmp_path, refuse_warnings), make(5))


def test_the_ten_thousandth_round_is_newer_than_the_one_before(tmp_path):
    for round in (9998, 9999, 10000):
        save_checkpoint(tmp_path, make(round), keep=2)
    assert names(tmp_path) == ["round-10000", "round-9999"]
    assert_equal(load_checkpoint(tmp_path, refuse_warnings), make(10000))


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "none", refuse_warnings) is None
    assert load_checkpoint(tmp_path, refuse_warnings) is None


def test_a_round_can_be_saved_again(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=2)
    again = Checkpoint(1, {"x": torch.ones(1)}, {}, (), {})
    save_checkpoint(tmp_path, again, keep=2)
    assert_equal(load_checkpoint(tmp_path, refuse_warnings), again)


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


FILES = ("server.safetensors", "clients.safetensors", "state.json")
DAMAGE = [(file, how) for file in FILES for how in (truncate, empty, flip, zero, Path.unlink)]


@pytest.mark.parametrize(("file", "how"), [*DAMAGE, ("state.json", other_json)])
def test_a_damaged_checkpoint_gives_the_one_before_and_a_warning(tmp_path, file, how):
    for round in (1, 2):
        save_checkpoint(tmp_path, make(round), keep=2)
    how(tmp_path / "round-0002" / file)
    warnings: list[str] = []
    assert_equal(load_checkpoint(tmp_path, warnings.append), make(1))
    assert len(warnings) == 1
    assert warnings[0].startswith("checkpoint round-0002 is damaged")
    save_checkpoint(tmp_path, make(2), keep=2)  # the run goes on over it
    assert_equal(load_checkpoint(tmp_path, refuse_warnings), make(2))


def test_all_damaged_is_an_error(tmp_path):
    for round in (1, 2):
        save_checkpoint(tmp_path, make(round), keep=2)
        truncate(tmp_path / f"round-{round:04d}" / "server.safetensors")
    warnings: list[str] = []
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be read; the run must be started again"
    ):
        load_checkpoint(tmp_path, warnings.append)
    assert len(warnings) == 2


@pytest.mark.parametrize("left", [(), FILES[:1], FILES[:2], FILES])
def test_what_a_kill_leaves_under_the_temporary_name_is_not_read(tmp_path, left):
    save_checkpoint(tmp_path, make(1), keep=2)
    (tmp_path / ".round-0002").mkdir()
    for name in left:
        shutil.copy(tmp_path / "round-0001" / name, tmp_path / ".round-0002")
    assert_equal(load_checkpoint(tmp_path, refuse_warnings), make(1))
    save_checkpoint(tmp_path, make(2), keep=2)
    assert names(tmp_path) == ["round-0001", "round-0002"]
    assert_equal(load_checkpoint(tmp_path, refuse_warnings), make(2))


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(CheckpointError, match="round-0001 cannot be written: "):
        save_checkpoint(tmp_path / "c", make(1), keep=2)
    assert (tmp_path / "c").read_text() == "mine"


@pytest.mark.parametrize("nth", range(4))
def test_a_full_disk_leaves_the_older_ones(tmp_path, monkeypatch, nth):
    """ENOSPC at each sync in turn: three files and the folder."""
    for round in (1, 2):
        save_checkpoint(tmp_path, make(round), keep=2)
    calls = iter(range(100))
    real = os.fsync

    def fsync(handle: int) -> None:
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(
            CheckpointError, match="round-0003 cannot be written: No space left on device"
        ):
            save_checkpoint(tmp_path, make(3), keep=2)
    assert {"round-0001", "round-0002"} <= set(names(tmp_path))
    found = load_checkpoint(tmp_path, refuse_warnings)
    assert_equal(found, make(3) if nth == 3 else make(2))
    save_checkpoint(tmp_path, make(3), keep=2)
    assert names(tmp_path) == ["round-0002", "round-0003"]


def test_nothing_is_pickled(tmp_path):
    save_checkpoint(tmp_path, make(1), keep=2)
    assert names(tmp_path / "round-0001") == [
        "clients.safetensors",
        "server.safetensors",
        "state.json",
    ]
