"""One mask for every backend, forward and backward: a function of (seed, expert, row, column)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from lora_problem import BACKENDS, assert_close, make_problem, upstream
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fedms.kernels import Segments, gated_lora_linear, plan
from fedms.kernels.dropout import keep_mask

CPU = torch.device("cpu")


def _hash_by_hand(seed: int, expert: int, row: int, column: int) -> int:
    """The docstring's definition in Python's own integers."""
    m32, m64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF

    def mix64(z: int) -> int:
        z &= m64
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & m64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & m64
        return z ^ z >> 31

    z = mix64(mix64(seed + (expert + 1) * 0x9E3779B97F4A7C15) + (row + 1) * 0xD1B54A32D192ED03)
    v = (column * 0x9E3779B1 + (z & m32)) & m32
    v = ((v ^ v >> 16) * 0x7FEB352D) & m32
    v = ((v ^ v >> 15 ^ z >> 32) * 0x846CA68B) & m32
    return v ^ v >> 16


def test_torch_mask_is_the_definition():
    for seed in (0, 1, 2**62 + 12345):
        mask = keep_mask(seed, 3, 5, 9, 11, 0.37, CPU)
        for i in range(4):
            for c in range(11):
                assert mask[i, c].item() == (_hash_by_hand(seed, 3, 5 + i, c) >= int(0.37 * 2**32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend_mask_is_the_same_forward_and_backward(backend, k, dtype):
    """With A = I and B = I or 0, y and dx are the mask of one expert, scaled."""
    m, p, seed = 20, 0.4, 99
    x = torch.ones(m, k, dtype=dtype, requires_grad=True)
    weight = torch.zeros(k, k, dtype=dtype)
    eye = [torch.eye(k), torch.eye(k)]
    off = [torch.eye(k), torch.zeros(k, k)]
    for expert in (0, 1):
        B = off if expert == 0 else off[::-1]
        y = gated_lora_linear(x, weight, eye, B, dropout_p=p, seed=seed, backend=backend)
        dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
        mask = keep_mask(seed, expert, 0, m, k, p, CPU)
        assert torch.equal(y != 0, mask)
        assert torch.equal(dx != 0, mask)
        assert torch.allclose(y.float()[mask], torch.tensor(1 / (1 - p)), rtol=4e-3)


def test_masks_are_independent_and_have_the_right_mean():
    p = 0.1
    masks = torch.stack([keep_mask(7, e, 0, 400, 500, p, CPU).double() for e in range(3)])
    count = masks[0].numel()
    sigma = (p * (1 - p) / count) ** 0.5
    assert (masks.mean((1, 2)) - (1 - p)).abs().max() < 4 * sigma
    centred = masks - masks.mean((1, 2), keepdim=True)
    pairs = {
        "experts": (centred[0], centred[1]),
        "rows": (centred[0, :-1], centred[0, 1:]),
        "columns": (centred[0, :, :-1], centred[0, :, 1:]),
        "seeds": (centred[0], keep_mask(8, 0, 0, 400, 500, p, CPU).double() - (1 - p)),
    }
    for name, (a, b) in pairs.items():
        correlation = (a * b).mean() / (p * (1 - p))
        assert abs(correlation) < 4 / count**0.5, name
    row_means = masks[0].mean(1)
    assert (row_means - (1 - p)).abs().max() < 5 * (p * (1 - p) / 500) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_none_follows_torchs_generator(backend):
    problem = make_problem(ranks=(8,), gates=None).to(torch.float32)

    def call() -> torch.Tensor:
        return gated_lora_linear(
            problem.x, problem.weight, problem.A, problem.B, dropout_p=0.5, backend=backend
        )

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_recomputes_with_the_same_mask(backend):
    problem = make_problem(ranks=(8,), gates=None).to(torch.float32)

    def block(x: torch.Tensor) -> torch.Tensor:
        return gated_lora_linear(
            x, problem.weight, problem.A, problem.B, dropout_p=0.5, backend=backend
        ).relu()

    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        y = (
            torch.utils.checkpoint.checkpoint(block, problem.x, use_reentrant=False)
            if checkpointed
            else block(problem.x)
        )
        grads.append(torch.autograd.grad(y.sum(), [problem.x, *problem.A, *problem.B]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_in_a_tensor_is_the_number(backend):
    problem = make_problem(dropout_p=0.4, seed=2**62 + 5).to(torch.float32)
    tensor = replace(problem, seed=torch.tensor(2**62 + 5))
    for a, b in zip(problem.run(backend).values(), tensor.run(backend).values(), strict=True):
        assert torch.equal(a, b)


COHORT = {
    "one expert each": [0, 1, 2, 3],
    "a shared one and one each": [(0, 1), (0, 2), (0, 3), (0, 2)],
    "none, and the last": [(), 3, (1, 3), (3, 0)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", COHORT.values(), ids=COHORT)
def test_a_seed_a_segment_makes_its_mask_its_own(backend, experts):
    """Every segment computes what it computes alone, forward and backward, in any batch."""
    offsets, seeds = [0, 9, 9 + 7, 16 + 11, 37], torch.tensor([5, 2**61, 5, 77])
    batch = make_problem(ranks=(3, 8, 1, 4), dropout_p=0.4, seed=seeds, gates="layer",
                         segments=Segments(offsets, experts)).to(torch.float32)  # fmt: skip
    assert_close(got := batch.run(backend), batch.truth(), 1e-5)
    dy = upstream(got["y"])
    sums = {name: 0 for name in got if name[:2] in ("dA", "dB")}
    for s in range(4):
        rows = slice(offsets[s], offsets[s + 1])
        x = batch.x.detach()[rows].requires_grad_()
        y = gated_lora_linear(
            x, batch.weight, batch.A, batch.B, bias=batch.bias, gates=batch.gates,
            scaling=batch.scaling, dropout_p=0.4, backend=backend, seed=seeds[s : s + 1],
            segments=Segments([0, len(x)], experts[s : s + 1]),
        )  # fmt: skip
        assert torch.allclose(got["y"][rows], y, atol=1e-5)
        leaves = [x, *batch.A, *batch.B]
        dx, *grads = torch.autograd.grad(y, leaves, dy[rows], allow_unused=True)
        assert torch.allclose(got["dx"][rows], dx, atol=1e-5)
        for name, grad in zip(sums, grads, strict=True):
            sums[name] = sums[name] + (0 if grad is None else grad)
    for name, total in sums.items():
        assert got[name] is None or torch.allclose(got[name], total, atol=1e-4), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compiled_graph_draws_a_mask_a_call(backend):
    problem = make_problem(gates=None, dropout_p=0.5).to(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x):
        return gated_lora_linear(
            x, problem.weight, problem.A, problem.B, dropout_p=0.5, backend=backend
        )

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append([compiled(problem.x), compiled(problem.x)])
    assert counter.frame_count == 1
    (first, second), again = results
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0])
    torch.manual_seed(4)
    assert torch.equal(first, layer(problem.x))
    grad, eager = (torch.autograd.grad(y.sum(), problem.x)[0] for y in (first, results[1][0]))
    assert torch.equal(grad, eager)


def test_nothing_reads_a_seed_on_the_host():
    """On tensors without data: reading a value raises there."""
    p = make_problem(dropout_p=0.5, segments=Segments([0, 9, 37], [0, 1])).to(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, weight, seeds = map(mode.from_tensor, (p.x, p.weight, torch.tensor([3, 4])))
        A, B = [*map(mode.from_tensor, p.A)], [*map(mode.from_tensor, p.B)]
        kernel = torch.ops.fedms.stacked_forward.default._op_dk
        y, _ = kernel(
            torch._C.DispatchKey.CompositeExplicitAutograd, x, weight, None, None, A, B, None, None,
            *p.segments.tensors, [1.0, 1.0], 0.5, seeds, True,
        )  # fmt: skip
    assert y.shape == (37, 56)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", plan.BACKENDS)
def test_each_replay_of_a_cuda_graph_has_its_own_mask(backend):
    device = torch.device("cuda")
    if not plan.runs(backend, device, torch.float32, torch.float32):
        pytest.skip(f"{backend} does not run on a GPU here")
    x, weight = torch.ones(64, 32, device=device), torch.zeros(32, 32, device=device)
    eye = [torch.eye(32, device=device)]

    def layer() -> torch.Tensor:
        return gated_lora_linear(x, weight, eye, eye, dropout_p=0.5, backend=backend)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(y != 0)
    for one, other in pairwise(masks):
        assert (one != other).float().mean() > 0.4
