"""Runs found in folders: what is compared with what, under which name, and what is left out."""

from __future__ import annotations

import pytest
from folders import write_run

from fedms.fl.compare.folders import Found, holds_one_run, read_runs
from fedms.fl.compare.result import Block, Point
from fedms.fl.types import FedMSError


def rows(found: Found) -> list[tuple[str, str, int]]:
    return sorted((r.label, r.block.setting, r.block.seed) for r in found.results.values())


def test_a_run_is_what_its_files_say(tmp_path):
    knobs = {"0.5": (0.8, 0.3), "-0.5": (0.2, 0.6)}
    folder = write_run(
        tmp_path / "a", "seed=3", own=(0.5, 0.7, 0.9), by_prior=knobs, gate_local_mean=0.6,
        unseen={"0.5": (0.1, 0.9), "-0.5": (0.4, 0.9)},
    )  # fmt: skip
    ((place, run),) = read_runs([tmp_path]).results.items()
    assert place == folder
    assert (run.label, run.algorithm, run.block) == ("FedMS", "fedms", Block("icd10", 3))
    assert run.scores == Point(pytest.approx(0.7), 0.5, 0.4, None)
    assert run.by_knob == {
        0.5: Point(pytest.approx(0.8), 0.8, pytest.approx(0.3), 0.1),
        -0.5: Point(pytest.approx(0.2), 0.2, pytest.approx(0.6), 0.4),
    }
    assert (run.bytes_up, run.bytes_down, run.seconds, run.gate) == (2 * 10**6, 4 * 10**6, 3.0, 0.6)
    assert (run.knob, run.trained_share) == (0.0, 0.01)


def test_rivals_share_their_runs_block_whatever_else_its_method_was_set_to(tmp_path):
    for name, setting in (("a", "mofm.gate=learned"), ("b", "mofm.gate=fixed")):
        write_run(tmp_path / name, setting)
        write_run(tmp_path / name / "rivals" / "fedavg", setting, "method=fedavg")
    found = read_runs([tmp_path])
    assert rows(found) == [
        ("FedAvg-LoRA", "icd10", 0), ("FedMS", "icd10", 0), ("FedMS, mofm.gate=fixed", "icd10", 0)
    ]  # fmt: skip
    copy = tmp_path / "b" / "rivals" / "fedavg"
    assert list(found.left_out) == [copy]
    assert "the same method and settings as" in found.left_out[copy]


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("stage1.lr=0.5", "FedMS, stage1.lr=0.5"),
        ("sal.enabled=false", "FedMS, sal.enabled=false"),
        ("lora.r=4", "FedMS, lora.r=4"),
        ("channel.codec=int8", "FedMS, channel.codec=int8"),
        ("prior=0.5", "FedMS, prior=0.5"),
        ("method=fedprox", "FedProx"),
    ],
)
def test_how_it_is_learnt_is_compared_in_one_block(override, name, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", override)
    assert rows(read_runs([tmp_path])) == [("FedMS", "icd10", 0), (name, "icd10", 0)]


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("data.alpha=0.1", "icd10, data.alpha=0.1"),
        ("model.dtype=float64", "icd10, model.dtype=float64"),
        ("stage1.local_steps=9", "icd10, local_steps=14, local_examples=448"),
        ("eval.split=val", "icd10, eval.split=val"),
        ("data.source=/x/notes.csv", "notes.csv"),
    ],
)
def test_what_is_learnt_from_is_another_setting(override, name, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", override)
    settings = {run.block.setting for run in read_runs([tmp_path]).results.values()}
    assert name in settings
    assert len(settings) == 2


def test_where_rounds_go_is_the_methods_matter_and_how_many_is_not(tmp_path):
    write_run(tmp_path / "a", "stage1.rounds=2", "stage2.rounds=1", rounds=3)
    write_run(tmp_path / "b", "stage1.rounds=1", "stage2.rounds=2", rounds=3)
    write_run(tmp_path / "c", "stage1.rounds=2", "stage2.rounds=2", rounds=4)
    blocks = [run.block for run in read_runs([tmp_path]).results.values()]
    assert blocks[0] == blocks[1] != blocks[2]
    assert blocks[2].setting == "icd10, rounds=4, local_steps=20, local_examples=640"


@pytest.mark.parametrize("override", ["engine.threads=1", "eval.batch_size=8", "eval.priors=[1.0]"])
def test_what_changes_no_result_is_the_same_run(override, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", override)
    assert len(read_runs([tmp_path]).left_out) == 1


def test_who_sends_nothing_takes_no_notice_of_the_channel(tmp_path):
    write_run(tmp_path / "a", "method=local_only")
    write_run(tmp_path / "b", "method=local_only", "channel.codec=int8")
    assert len(read_runs([tmp_path]).left_out) == 1


@pytest.mark.parametrize(
    ("number", "switch"),
    [
        ("channel.topk_share=0.1", "channel.codec=topk"),
        ("channel.hostile=0.1", "channel.aggregate=median"),
        ("channel.privacy.delta=0.001", "channel.privacy.clip=0.1"),
        ("sal.min_budget=2", "sal.scope=client"),
        ("eval.val_examples=500", "method=fedms"),
        ("sal.queue_length=3", "method=fedms"),
    ],
)
def test_numbers_for_what_is_off_make_no_other_method(number, switch, tmp_path):
    for name, settings in {"a": [], "b": [number], "c": [switch], "d": [switch, number]}.items():
        write_run(tmp_path / name, "method=fedavg", *settings)
    assert list(read_runs([tmp_path]).left_out) == [tmp_path / "b"]


def test_files_of_one_name_are_told_apart_and_changed_ones_too(tmp_path):
    write_run(tmp_path / "a", "data.source=/x/notes.csv")
    write_run(tmp_path / "b", "data.source=/y/notes.csv")
    write_run(tmp_path / "c", "data.source=/y/notes.csv", "method=fedavg", content="another")
    assert rows(read_runs([tmp_path])) == [
        ("FedAvg-LoRA", "/y/notes.csv, data or model changed (1)", 0),
        ("FedMS", "/y/notes.csv", 0),
        ("FedMS", "notes.csv", 0),
    ]


def test_what_is_torn_unfinished_or_unscored_is_named_and_the_rest_is_compared(tmp_path):
    write_run(tmp_path / "deep" / "er" / "good")
    write_run(tmp_path / "half", rounds=1)
    torn = write_run(tmp_path / "torn", "seed=1")
    (torn / "metrics.jsonl").write_text("{\n" + (torn / "metrics.jsonl").read_text(), "utf-8")
    lost = write_run(tmp_path / "lost", "seed=2")
    (lost / "config.toml").unlink()
    old = write_run(tmp_path / "old", "seed=3")
    (old / "config.toml").write_text("nonsense = 1\n", "utf-8")
    begun = write_run(tmp_path / "begun", "seed=4")
    (begun / "metrics.jsonl").unlink()
    write_run(tmp_path / "unscored", "seed=5", own=())
    (tmp_path / "notes").mkdir()
    found = read_runs([tmp_path])
    assert [folder.name for folder in found.results] == ["good"]
    reasons = {folder.name: reason for folder, reason in found.left_out.items()}
    assert sorted(reasons) == ["begun", "half", "lost", "old", "torn", "unscored"]
    assert reasons["half"] == "unfinished: 1 of 2 rounds"
    assert reasons["unscored"] == "no client was scored after its last round"
    assert "metrics.jsonl, line 1: not valid JSON" in reasons["torn"]
    assert "has no config.toml" in reasons["lost"]
    assert "nonsense" in reasons["old"]
    assert "metrics.jsonl cannot be read" in reasons["begun"]


def test_folders_within_one_another_are_read_once(tmp_path):
    run = write_run(tmp_path / "a")
    assert list(read_runs([tmp_path, run]).results) == [run]
    assert holds_one_run(run)
    assert not holds_one_run(tmp_path)


def test_nothing_to_compare_is_one_error(tmp_path):
    with pytest.raises(FedMSError, match="nowhere is no folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(FedMSError, match="holds no run, nor does any folder in it"):
        read_runs([tmp_path])
    write_run(tmp_path / "half", rounds=1)
    with pytest.raises(FedMSError, match=r"no finished run to compare:\n  .*half: unfinished: 1"):
        read_runs([tmp_path])
