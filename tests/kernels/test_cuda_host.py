"""The CUDA kernels' own sources, compiled for a CPU, against the float64 definition.

Every problem runs twice: as on a device with one multiprocessor (nothing is split, wide strips),
threads in order; and as on one with 132 (columns and rows split, narrow strips), threads in reverse
order. A missing barrier shows in one of the two (test_a_missing_barrier_is_seen).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_host
import pytest
import torch
from cuda_problems import PROBLEMS, SANITIZED, listed
from lora_problem import Problem, assert_close, errors, make_problem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fedms.kernels import cuda, gated_lora_linear

pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="g++ is not installed")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FP32_BOUND = 1e-5
DEVICES = [(1, False), (132, True)]  # multiprocessors, order of the threads


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> cuda_host.HostBuild:
    return cuda_host.HostBuild(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture(scope="module")
def module(host: cuda_host.HostBuild) -> Any:
    return cuda_host.load(host.build())


def _run(module: Any, problem: Problem, multiprocessors: int = 132, reverse: bool = False) -> dict:
    with cuda_host.installed(module, multiprocessors, reverse=reverse):
        return problem.run("cuda")


def assert_equal(got: dict, want: dict) -> None:
    for key, value in want.items():
        assert got[key] is None if value is None else torch.equal(got[key], value), key


@pytest.mark.parametrize(("multiprocessors", "reverse"), DEVICES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(module, name, multiprocessors, reverse):
    problem = PROBLEMS[name]()
    got = _run(module, problem.to(F32), multiprocessors, reverse)
    assert_close(got, problem.truth(), FP32_BOUND)


@pytest.mark.parametrize("name", ["odd widths", "segments"])
@pytest.mark.parametrize("adapter", [F32, BF16, F16])
@pytest.mark.parametrize("base", [F32, BF16, F16])
def test_dtypes(module, name, base, adapter):
    """One rounding of each result to its own dtype, with rows that can and cannot be vectors."""
    problem = PROBLEMS[name]()
    limits = {F32: FP32_BOUND, BF16: 6e-3, F16: 1e-3}
    bound = max(limits[base], limits[adapter])
    with cuda_host.installed(module, 132):
        got = problem.to(base, adapter).run("cuda")
    assert got["y"].dtype == got["dx"].dtype == base
    assert got["dA0"].dtype == got["dB0"].dtype == adapter
    assert_close(got, problem.truth(), bound)


@pytest.mark.parametrize("base", [BF16, F16])
def test_result_is_rounded_once(module, base):
    """x = A = 1 and W = 0: y is B rounded to nearest even, with subnormals, ties and infinity."""
    n = 4096
    steps = torch.cat([torch.arange(n - 8) * 2.0**-26, torch.tensor([65519.0, 65520.0, 1e30])])
    b = torch.cat([steps, torch.tensor([1 + 2.0**-9, 1 + 3 * 2.0**-9, 2049.0, 2051.0, -0.1])])
    x, weight = torch.ones(1, 1, dtype=base), torch.zeros(n, 1, dtype=base)
    with cuda_host.installed(module, 132):
        y = gated_lora_linear(x, weight, [torch.ones(1, 1)], [b.view(n, 1)], backend="cuda")
    assert torch.equal(y[0], b.to(base))


@pytest.mark.parametrize("name", ["dropout", "segments", "top 2", "tiny segments", "many rows"])
def test_order_of_threads_changes_no_bit(module, name):
    problem = PROBLEMS[name]().to(F32)
    forwards = _run(module, problem)
    backwards = _run(module, problem, reverse=True)
    assert_equal(forwards, backwards)


def test_the_comparison_can_fail(module):
    """Negative controls: a swapped gate and a wrong expert are wrong by O(1), not by rounding."""
    problem = make_problem(ranks=(8, 8))
    truth, single = problem.truth(), problem.to(F32)
    swapped = replace(single, gates=single.gates.detach().flip(1).requires_grad_())
    assert errors(_run(module, swapped), truth)["y"] > 0.1
    assert errors(_run(module, replace(single, A=single.A[::-1])), truth)["dx"] > 0.1
    routed = listed(50, 2)
    moved = replace(routed, expert_idxs=(routed.expert_idxs + 1) % 6).to(F32)
    assert errors(_run(module, moved), routed.truth())["y"] > 0.1


def test_an_expert_nobody_lists_is_never_read(module):
    problem = listed(50, 2, ranks=(8, 8, 8)).to(F32)
    problem = replace(problem, expert_idxs=problem.expert_idxs.clamp(max=1))
    nan = torch.full_like(problem.A[2], float("nan"))
    broken = replace(problem, A=[*problem.A[:2], nan.requires_grad_()])
    got, want = _run(module, broken), _run(module, problem)
    for key in ("y", "dx", "dgates", "dA0"):
        assert torch.equal(got[key], want[key]), key
    assert got["dA2"].abs().max() == 0


def test_the_op_itself_takes_lists_of_none(module):
    """The public op asks no kernel then; empty lists are not missing ones."""
    x, weight, A, B = torch.rand(5, 4), torch.rand(3, 4), [torch.rand(2, 4)], [torch.rand(3, 2)]
    gates, idxs = torch.zeros(5, 0), torch.zeros(5, 0, dtype=torch.int64)
    routing = (gates, idxs, None, None, [1.0], 0.0, None)
    with cuda_host.installed(module, 1):
        y, h = cuda._forward(x, weight, None, None, A, B, *routing, True)
        grads = cuda._backward(y, weight, x, h, A, B, *routing, True, True, [True], [True])
    assert torch.equal(y, F.linear(x, weight))
    torch.testing.assert_close(grads[0], y @ weight)
    assert not torch.cat([grads[2][0].flatten(), grads[3][0].flatten()]).any()


def test_a_row_does_not_see_the_experts_of_its_neighbours(module):
    """Expert 1 is NaN and shares row tiles with expert 0: its rows alone may be NaN."""
    idxs = (torch.arange(40) % 2).unsqueeze(1)
    problem = make_problem(40, ranks=(8, 8), gates="listed", expert_idxs=idxs).to(F32)
    nan = torch.full_like(problem.B[1], float("nan")).requires_grad_()
    for multiprocessors in (1, 132):
        y = _run(module, replace(problem, B=[problem.B[0], nan]), multiprocessors)["y"]
        assert y[0::2].isfinite().all()
        assert y[1::2].isnan().all()


@pytest.mark.parametrize("name", ["dropout", "segments", "top 2", "mixed ranks", "decoding"])
def test_outputs_do_not_depend_on_uninitialised_memory(module, name):
    """Every torch.empty is filled with NaN; shared memory always is."""
    problem = PROBLEMS[name]()
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is on by default
    try:
        assert_close(_run(module, problem.to(F32)), problem.truth(), FP32_BOUND)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_gates_of_any_dtype_and_stride(module, dtype):
    """Stride-0 gates (one per sample), transposed gates, and a stride-0 dy."""
    problem = replace(make_problem(24), scaling=None).to(F32)
    per_sample = torch.rand(4, 1, 2).to(BF16).to(dtype).requires_grad_()
    turned = torch.rand(2, 24).to(BF16).to(dtype).t()
    results = []
    for expanded, strided in (
        (per_sample.expand(4, 6, 2), turned),
        (per_sample.expand(4, 6, 2).contiguous(), turned.contiguous()),
    ):
        with cuda_host.installed(module, 132):
            y = gated_lora_linear(problem.x.view(4, 6, -1), problem.weight, problem.A, problem.B,
                                  gates=expanded, backend="cuda")  # fmt: skip
            z = gated_lora_linear(problem.x, problem.weight, problem.A, problem.B, gates=strided,
                                  backend="cuda")  # fmt: skip
            grads = torch.autograd.grad(y.sum() + z.sum(), [problem.x, per_sample, *problem.A])
        results.append([y, z, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    wide = per_sample.detach().float().expand(4, 6, 2).reshape(24, 2)
    want = replace(problem, gates=wide, bias=torch.zeros(56)).truth()["y"]
    assert torch.allclose(results[0][0].reshape(24, -1).double(), want, atol=1e-4)


def test_non_contiguous_x_and_parameters(module):
    problem = make_problem(40).to(F32)
    tied = [a.detach().t().contiguous().t().requires_grad_() for a in problem.A]
    strided = problem.x.detach().t().contiguous().t().requires_grad_()
    assert not strided.is_contiguous()
    assert_close(_run(module, replace(problem, x=strided, A=tied)), problem.truth(), FP32_BOUND)


@pytest.mark.parametrize("name", ["mixed ranks", "segments", "top 2", "gates: layer"])
def test_what_is_traced_has_the_shapes_of_what_runs(module, name):
    """The fakes that torch.compile sees, forward and backward, against the backend's outputs."""
    p = PROBLEMS[name]().to(BF16, F32)
    segments = (None, None) if p.segments is None else p.segments.tensors
    tensors = [t.detach() for t in (p.x, p.weight, p.gates, *p.A, *p.B)]
    e = len(p.A)

    def both(forward: Any, backward: Any, idxs: Any, x: Any, weight: Any, gates: Any, *ab: Any):
        call = (ab[:e], ab[e:], gates, idxs, *segments, p.scaling, 0.0, None)
        y, h = forward(x, weight, None, None, *call, True)
        need = [True] * (e - 1) + [False]
        dx, dg, dA, dB = backward(y, weight, x, h, *call, True, True, need, need)
        return [(t.shape, t.dtype) for t in (y, h, dx, dg, *dA, *dB)]

    with cuda_host.installed(module, 132):
        real = both(cuda._forward, cuda._backward, p.expert_idxs, *tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        idxs = None if p.expert_idxs is None else mode.from_tensor(p.expert_idxs)
        ops = torch.ops.fedms
        traced = both(ops.cuda_forward.default, ops.cuda_backward.default, idxs, *fakes)
    assert traced == real


def test_callable_base(module):
    problem = make_problem(30).to(F32)

    def base(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(F.linear(x, problem.weight, problem.bias))  # relu saves its own output

    with cuda_host.installed(module, 132):
        y = gated_lora_linear(problem.x, base, problem.A, problem.B, gates=problem.gates,
                              scaling=problem.scaling, backend="cuda")  # fmt: skip
        got = torch.autograd.grad(y.square().sum(), problem.x)[0]
    mixture = problem.call(gated_lora_linear, backend="stacked") - F.linear(
        problem.x, problem.weight, problem.bias
    )
    want = base(problem.x) + mixture
    assert torch.allclose(y, want, atol=1e-4)
    right = torch.autograd.grad(want.square().sum(), problem.x)[0]
    assert (got - right).norm() < 1e-5 * right.norm()


def test_a_launch_that_cannot_be_names_its_kernel_and_shape(module):
    with pytest.raises(RuntimeError, match=r"expand could not run on M=1 K=8 N=\d+ E=1 R=1.*grid"):
        _too_wide(module)


def _too_wide(module: Any) -> None:
    call = module.Call(
        0, 0, 1, 8, 2**31 - 64, 0, 0, [0], [0], [], [], [1], [1.0], 0, 0, 0, 0, 0, 0, 0, 1,
        [0] * 5, 0.0, 0,
    )  # fmt: skip
    module.expand(call, 0, 1, 0, 0, False, 0, True, False)


def test_python_and_the_kernels_agree_on_the_tile(module):
    assert module.TILE_ROWS == cuda._TILE_ROWS


def test_too_many_experts_need_a_table(module):
    many = [0] * 33
    with pytest.raises(ValueError, match="more than 32 experts, got 33"):
        module.Call(0, 0, 1, 8, 8, 0, 0, many, many, [], [], [1] * 33, [1.0] * 33, 0, 0, 0, 0, 0,
                    0, 0, 33, [0] * 5, 0.0, 0)  # fmt: skip


@pytest.mark.parametrize(
    ("file", "barrier"), [("shrink.cu", 0), ("shrink.cu", 1), ("expand.cu", 0), ("outer.cu", 1)]
)
def test_a_missing_barrier_is_seen(tmp_path, host, file, barrier):
    """Controls of the host build: one __syncthreads() taken out, and results are wrong."""
    source = (cuda_host.CSRC / "cuda" / file).read_text(encoding="utf-8")
    *before, after = source.split("__syncthreads();", barrier + 1)
    broken = tmp_path / file
    broken.write_text("__syncthreads();".join(before) + after, encoding="utf-8")
    kernels = [broken if k.name == file else k for k in cuda_host.KERNELS]
    racy = cuda_host.load(host.build(kernels=kernels))
    problem = make_problem(70, 600, 600, ranks=(20, 8))
    truth = problem.truth()
    worst = 0.0
    for reverse in (False, True):
        values = errors(_run(racy, problem.to(F32), 1, reverse), truth).values()
        worst = max(worst, *(float("inf") if v != v else v for v in values))
    assert worst > 1e-2


def test_sanitizers_find_nothing_in_the_kernels(host):
    """Problems under the address and undefined-behaviour sanitizers, then a control."""
    found = subprocess.run(
        [cuda_host.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("the address sanitizer's library is not installed")
    module = host.build(*cuda_host.SANITIZE)
    done = subprocess.run(
        [sys.executable, cuda_host.__file__, str(module)],
        env=os.environ | {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [*SANITIZED, "past the end"], done.stderr[-3000:]
    assert "heap-buffer-overflow" in done.stderr
    assert "in fedms::(anonymous namespace)::upload" in done.stderr
