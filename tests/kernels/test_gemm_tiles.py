"""The tiles that the tuner offers for Hopper, every row of every output.

The other tests' tiles are small, so that small problems have several of each; these are what a GPU
runs: wgmma, descriptors, 8 warps, 4 stages. No width is a multiple of a tile, the last row tile
holds 7 rows, and where the launch is persistent a program walks several tiles.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from lora_problem import Problem, make_problem, on_device, triton

from fedms.kernels import tiles, tune
from fedms.kernels.agreement import BOUND, difference

if not triton.available():
    pytest.skip("triton is not installed", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
M, K, N = (1031, 1088, 832) if DEVICE.type == "cuda" else (135, 136, 272)  # interpreted
RANKS = (16, 32, 64) if DEVICE.type == "cuda" else (32,)
BF16 = torch.bfloat16


@cache
def problem_and_truth(rank: int) -> tuple[Problem, dict[str, torch.Tensor | None]]:
    """Two experts, the first one frozen."""
    torch.manual_seed(0)
    problem = make_problem(M, K, N, (rank // 2, rank // 2))
    frozen = replace(
        problem, A=[problem.A[0].detach(), problem.A[1]], B=[problem.B[0].detach(), problem.B[1]]
    )
    return on_device(frozen.to(BF16), DEVICE.type), frozen.truth()


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Make these tiles the row of the user's table that the problem reads."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def save(strategy: str, gemm: tiles.GemmTiles, rank: int) -> None:
        shape = tiles.Shape.of(tiles.device_name(DEVICE), BF16, BF16, M, K, N, rank)
        chosen = replace(
            tiles.heuristic(shape), forward=strategy, backward=strategy, gemm=gemm, dx_gemm=gemm
        )
        tiles.save({shape: chosen}, tiles.user_table())

    yield save
    tiles.forget()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("strategy", ["extend", "fused"])
@pytest.mark.parametrize("gemm", tune.gemm_tiles(90), ids=str)
def test_every_row_of_every_output_is_right(choose, gemm, strategy, rank):
    choose(strategy, gemm, rank)
    problem, truth = problem_and_truth(rank)
    got = problem.run("triton")
    assert got.keys() == truth.keys()
    found = [t.cpu() for t in got.values() if t is not None]
    right = [t for t in truth.values() if t is not None]
    assert difference(found, right, BOUND[BF16]) == "", list(truth)
