"""The cuda backend as installed: clear where it cannot run, and right on a GPU.

The kernels themselves are tested without a GPU in test_cuda_host.py; the problems are the same.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cuda_problems import PROBLEMS, listed
from lora_problem import (
    Problem,
    assert_close,
    errors,
    make_problem,
    on_cpu,
    on_device,
    without_tf32,
)

from fedms.kernels import Segments, cuda, gated_lora_linear, native

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
needs_module = pytest.mark.skipif(not cuda.available(), reason="fedms.kernels._C_cuda is not built")
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda.available()),
    reason="needs an NVIDIA GPU and fedms.kernels._C_cuda",
)


def test_cpu_tensors_and_other_dtypes_are_refused():
    problem = make_problem(3).to(F32)
    error = ValueError if cuda.available() else RuntimeError
    with pytest.raises(error, match=r"backend='cuda' (must have CUDA tensors.*on cpu|needs)"):
        problem.run("cuda")
    assert cuda.supports(BF16, F32, BF16)
    assert cuda.supports(F32, F16, F32)
    assert not cuda.supports(torch.float64, F32, torch.float64)
    assert not cuda.supports(BF16, F32, F32)


@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_loads_and_says_why_it_cannot_run():
    assert native.build_info()["cuda"].startswith("built, cannot run: ")
    with pytest.raises(RuntimeError, match=r"fedms.kernels._C_cuda cannot run: cudaGetDevice: "):
        cuda._load()[0].module.upload(0, 0, 0, bytes(8))


def test_importing_fedms_loads_no_cuda_module():
    code = "import sys, fedms, fedms.kernels; print('fedms.kernels._C_cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def _on_gpu(problem: Problem) -> Problem:
    return on_device(problem, "cuda")


@pytest.fixture
def _no_tf32() -> Iterator[None]:
    with without_tf32():
        yield


@pytest.mark.usefixtures("_no_tf32")
def test_tf32_is_off_for_the_tests_that_ask():
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


@needs_gpu
@pytest.mark.cuda
@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name):
    problem = PROBLEMS[name]()
    got = on_cpu(_on_gpu(problem.to(F32)).run("cuda"))
    assert_close(got, problem.truth(), 1e-5)


@needs_gpu
@pytest.mark.cuda
@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("name", ["odd widths", "dropout", "segments", "top 2"])
@pytest.mark.parametrize("adapter", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("base", [F32, BF16, F16], ids=str)
def test_dtypes(name, base, adapter):
    problem = PROBLEMS[name]()
    limits = {F32: 1e-5, BF16: 6e-3, F16: 1e-3}
    got = on_cpu(_on_gpu(problem.to(base, adapter)).run("cuda"))
    assert got["y"].dtype == base
    assert got["dA0"].dtype == adapter
    assert_close(got, problem.truth(), max(limits[base], limits[adapter]))


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("name", ["dropout", "tiny segments", "top 2", "many rows", "decoding"])
def test_two_runs_are_bit_equal(name):
    problem = _on_gpu(PROBLEMS[name]().to(F32))
    first, second = problem.run("cuda"), problem.run("cuda")
    for key, value in first.items():
        assert second[key] is None if value is None else torch.equal(value, second[key]), key


@needs_gpu
@pytest.mark.cuda
def test_the_comparison_can_fail():
    problem = make_problem(ranks=(8, 8))
    single = problem.to(F32)
    swapped = replace(single, gates=single.gates.detach().flip(1).requires_grad_())
    assert errors(on_cpu(_on_gpu(swapped).run("cuda")), problem.truth())["y"] > 0.1
    wrong = replace(single, A=single.A[::-1])
    assert errors(on_cpu(_on_gpu(wrong).run("cuda")), problem.truth())["dx"] > 0.1


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("name", ["decoding", "tiny segments", "more experts than fit", "top 2"])
def test_capture_into_a_graph(name):
    """Forward and backward, without and with tables in device memory; replayed on other inputs."""
    problem = _on_gpu(PROBLEMS[name]().to(BF16, F32))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.run("cuda")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run("cuda")
    with torch.no_grad():
        problem.x.neg_()
        for b in problem.B:
            b.mul_(2)
    junk = [torch.full((1024,), -1, device="cuda") for _ in range(64)]  # over freed tables
    graph.replay()
    want = problem.run("cuda")
    for key, value in want.items():
        assert captured[key] is None if value is None else torch.equal(captured[key], value), key
    assert len(junk) == 64


@needs_gpu
@pytest.mark.cuda
def test_launches_follow_the_current_stream():
    """On a stream that is busy the result is right only if the launches wait behind its work."""
    problem = _on_gpu(make_problem(64, 256, 256, (16,), gates=None).to(F32))
    problem.run("cuda")
    x = problem.x.detach().clone()
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = replace(problem, x=late).call(gated_lora_linear, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad():
        want = replace(problem, x=x).call(gated_lora_linear, backend="cuda")
    assert torch.equal(y, want)


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("routing", ["dense", "segments", "listed"])
def test_opcheck(routing):
    p = _on_gpu(make_problem(9, 8, 12, (4, 4)).to(F32))
    A, B = [a.detach() for a in p.A], [b.detach() for b in p.B]
    idxs = torch.stack([torch.randperm(2) for _ in range(9)]).cuda()
    segments = Segments([0, 5, 9], [(0, 1), (1, 0)]).tensors
    call = (
        A, B, p.gates.detach(), idxs if routing == "listed" else None,
        *(segments if routing == "segments" else (None, None)), [1.0, 2.0], 0.0, None,
    )  # fmt: skip
    forward = torch.ops.fedms.cuda_forward.default
    backward = torch.ops.fedms.cuda_backward.default
    x = p.x.detach()
    torch.library.opcheck(forward, (x, p.weight, p.bias, None, *call, True))
    y, h = forward(x, p.weight, p.bias, None, *call, True)
    need = [True, False]
    torch.library.opcheck(
        backward, (torch.ones_like(y), p.weight, x, h, *call, True, True, need, need)
    )


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("gates", [None, "listed"])
def test_a_large_case_against_the_stacked_backend(gates):
    """Sizes of a language model's layer, so that grids, splits and 64-bit offsets are real."""
    problem = listed(2048, 2, gates=gates, ranks=(16, 16, 16, 16))
    wide = make_problem(2048, 4096, 4096, ranks=(16,) * 4, gates=gates,
                        expert_idxs=problem.expert_idxs.clamp(max=3))  # fmt: skip
    cast = _on_gpu(wide.to(BF16, F32))
    got, want = cast.run("cuda"), cast.run("stacked")
    for key, value in want.items():
        assert (got[key].float() - value.float()).norm() <= 6e-3 * value.float().norm(), key
