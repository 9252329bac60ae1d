"""Processes that form a gloo group, for tests of what runs on several ranks."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from patience import PATIENCE


def run_ranks(
    work: Callable[..., Any], *args: Any, ranks: int = 2, seconds: float = PATIENCE
) -> list[Any]:
    """What `work(*args)` returns in each of `ranks` processes, by rank.

    work: a function of a test module; it and args are pickled. Its process is in the default group
        and has torchrun's RANK and WORLD_SIZE. What it returns goes through torch.save.
    seconds: how long all ranks may take.

    Ranks are killed once every answer has come: how torch takes a group down decides no test.
    (torch 2.13 aborts now and then where a DDP module is alive at that moment.)

    Raises AssertionError with a failed rank's traceback, or when one ends or hangs without a word.
    """
    context = multiprocessing.get_context("spawn")
    until = time.monotonic() + seconds
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                pipes.append(ours)
                process = context.Process(
                    target=_rank, args=(theirs, rank, ranks, f"{folder}/store", work, args)
                )
                processes.append(process)
                process.start()
                theirs.close()  # so that a dead rank's pipe is at its end
            return _answers(pipes, until)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answers(pipes: list[Connection], until: float) -> list[Any]:
    """The first rank that fails is the one to name: the others may be waiting for it."""
    found: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), max(0.0, until - time.monotonic()))
        assert ready, f"ranks {sorted(waiting.values())} did not answer in time"
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            found[rank] = _answer(pipe, rank)  # type: ignore[arg-type]
    return [found[rank] for rank in range(len(pipes))]


def _answer(pipe: Connection, rank: int) -> Any:
    try:
        failure, found = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} ended without an answer") from None
    assert failure is None, f"rank {rank} failed:\n{failure}"
    return torch.load(io.BytesIO(found), weights_only=False)


def _rank(
    pipe: Connection, rank: int, ranks: int, store: str, work: Callable[..., Any], args: tuple
) -> None:
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }  # fmt: skip
        torch.set_num_threads(1)
        # a file: another process could take a free port before it is used
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
        found = io.BytesIO()
        torch.save(work(*args), found)
        pipe.send((None, found.getvalue()))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    with suppress(EOFError):  # the test's process is gone
        pipe.recv()  # the other ranks may still be talking to this one: wait to be killed
    os._exit(1)
