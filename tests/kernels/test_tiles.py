"""Tables of measured choices, the heuristic, and the tuner that writes a table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from lora_problem import triton

from fedms.kernels import plan, tiles, tune
from fedms.kernels.tiles import Shape

SHAPE = Shape.of("GPU", torch.bfloat16, torch.bfloat16, 8192, 4096, 4096, 32)


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """A user's table of its own, empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    tiles.forget()
    yield tiles.user_table()
    tiles.forget()


def test_buckets():
    assert Shape("GPU", "bfloat16", "bfloat16", 8192, 4096, 4096, 32) == SHAPE
    near = Shape.of("GPU", torch.bfloat16, torch.bfloat16, 5000, 4096, 4096, 17)
    assert near == SHAPE
    assert Shape.of("GPU", torch.float32, torch.float32, 0, 8, 8, 3).m == 16


def test_nothing_unmeasured_is_chosen(own_table):
    for m in (1, 64, 8192):
        for dtype in (torch.float32, torch.bfloat16):
            choice = tiles.lookup(Shape.of("GPU", dtype, dtype, m, 768, 3072, 16))
            assert choice.backend == "stacked"
            assert not choice.measured


def test_the_users_table_wins(own_table):
    measured = replace(tiles.heuristic(SHAPE), backend="triton", measured=True)
    tiles.save({SHAPE: measured}, own_table)
    assert tiles.lookup(SHAPE) == measured
    assert tiles.lookup(replace(SHAPE, k=8)).backend == "stacked"
    other = replace(SHAPE, n=8)
    tiles.save({other: measured}, own_table)
    assert tiles.lookup(SHAPE) == tiles.lookup(other) == measured


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be a JSON list of rows, got: "),
        ('[{"shape": {}}]', "row 0 must have a shape and a choice"),
        ("[3]", "row 0 must have a shape and a choice"),
        ("7", "must be a JSON list of rows, got int"),
    ],
)
def test_a_damaged_table_is_named(own_table, text, message):
    own_table.parent.mkdir()
    own_table.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        tiles.lookup(SHAPE)
    assert str(own_table) in str(caught.value)


def test_an_unknown_strategy_is_named(own_table):
    tiles.save({SHAPE: tiles.heuristic(SHAPE)}, own_table)
    rows = json.loads(own_table.read_text("utf-8"))
    rows[0]["choice"]["forward"] = "magic"
    own_table.write_text(json.dumps(rows), "utf-8")
    tiles.forget()
    with pytest.raises(ValueError, match=r"row 0: forward and backward must be of .* 'magic'"):
        tiles.lookup(SHAPE)


@pytest.mark.skipif(not triton.available(), reason="triton is not installed")
def test_the_tuner_checks_before_it_times(monkeypatch):
    """A candidate that is wrong or raises is listed with the reason and never chosen."""
    from fedms.kernels.triton import backend

    original = backend.forward

    def sabotaged(*args, choice, **kwargs):
        y, h = original(*args, choice=choice, **kwargs)
        if choice.forward == "fused":
            raise RuntimeError("out of resource: shared memory")
        return (y * 1.1 if choice.forward == "extend" else y), h

    monkeypatch.setattr(backend, "forward", sabotaged)
    timed = []

    def clock(run):
        run()
        timed.append(run)
        return float(len(timed))

    tuned = tune.tune(80, 64, 48, [8, 8], device=torch.device("cpu"), clock=clock)
    assert tuned.choice.forward == "split"
    assert tuned.choice.backend in plan.BACKENDS
    assert tuned.choice.measured
    wrong = [a for a in tuned.attempts if "extend" in a.what and a.direction == "forward"]
    assert wrong
    assert all(a.microseconds is None and "output 0 is off by" in a.problem for a in wrong)
    raised = [a for a in tuned.attempts if "fused" in a.what and a.direction == "forward"]
    assert all("out of resource" in a.problem for a in raised)
    assert len(timed) == sum(a.microseconds is not None for a in tuned.attempts)
