"""The op inside what people train with: activation checkpointing, DDP, CUDA graphs, optimizers."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lora_problem import BACKENDS, make_problem
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fedms.kernels import Segments, gated_lora_linear, plan

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from stand_in_cuda import stand_in


class Layer(nn.Module):
    """Two gated experts on a frozen linear, the gate read from x."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.randn(24, 16) / 4, requires_grad=False)
        self.A = nn.ParameterList(torch.randn(4, 16) for _ in range(2))
        self.B = nn.ParameterList(torch.randn(24, 4) for _ in range(2))
        self.gate = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.gate(x).softmax(-1)
        return gated_lora_linear(
            x, self.weight, list(self.A), list(self.B), gates=gates, backend=self.backend
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(backend, reentrant):
    """Gates and the dropout seed are inputs of the op, so a recompute sees them."""
    p = make_problem(40, dropout_p=0.3).to(torch.float32)

    def layer(x, gates):
        return gated_lora_linear(x, p.weight, p.A, p.B, gates=gates, dropout_p=0.3, backend=backend)

    results = []
    for recompute in (False, True):
        torch.manual_seed(3)
        inputs = [p.x, p.gates, *p.A, *p.B]
        for t in inputs:
            t.grad = None
        y = checkpoint(layer, p.x, p.gates, use_reentrant=reentrant) if recompute else layer(
            p.x, p.gates
        )  # fmt: skip
        y.square().sum().backward()
        results.append([y, *(t.grad for t in inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _gradients_of_half() -> dict[str, dict[str, torch.Tensor | None]]:
    """For each backend the averaged gradients, after this rank's half of the batch."""
    found = {}
    for backend in BACKENDS:
        torch.manual_seed(0)
        layer = Layer(backend)
        mine = torch.randn(8, 16).chunk(2)[dist.get_rank()]
        parallel = DistributedDataParallel(layer)  # it averages as long as it is alive
        parallel(mine).square().mean().backward()
        found[backend] = {name: p.grad for name, p in layer.named_parameters()}
    return found


def test_two_processes_equal_one():
    ranks = run_ranks(_gradients_of_half)
    for backend in BACKENDS:
        torch.manual_seed(0)
        layer = Layer(backend)
        layer(torch.randn(8, 16)).square().mean().backward()
        for averaged in (found[backend] for found in ranks):
            assert averaged["weight"] is None
            for name, p in layer.named_parameters():
                if name != "weight":
                    assert p.grad.norm() > 0
                    assert torch.allclose(averaged[name], p.grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_reaches_what_it_is_shown(backend):
    """Twenty steps on another layer's outputs: the loss falls, the frozen weight stays."""
    torch.manual_seed(1)
    target, layer = Layer("stacked"), Layer(backend)
    layer.weight = target.weight
    before = layer.weight.clone()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    x = torch.randn(64, 16)
    want = target(x).detach()
    losses = []
    for _ in range(20):
        loss = (layer(x) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(layer.weight, before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", plan.BACKENDS)
def test_a_cuda_graph_replays_the_step(backend):
    if not plan.runs(backend, torch.device("cuda"), torch.float32, torch.float32):
        pytest.skip(f"{backend} does not run on a GPU here")
    layer = Layer(backend).cuda()
    x = torch.randn(64, 16, device="cuda")
    trained = [p for p in layer.parameters() if p.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return (y, *torch.autograd.grad(y.square().mean(), trained))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture(
    params=[
        pytest.param("cpu", id="rehearsed"),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            ],
        ),
    ]
)
def graphs(request):
    """A device with CUDA graphs: a GPU, or a CPU that runs the recorded operators again."""
    if request.param == "cuda":
        yield torch.device("cuda")
    else:
        with stand_in():
            yield torch.device("cpu")


class Task:
    """A layer with three experts and what a step reads: x, gates, seed and routes, by name."""

    def __init__(self, backend: str, device: torch.device, *, listed: bool) -> None:
        self.backend, self.device, self.listed = backend, device, listed
        self.weight = torch.randn(24, 16, device=device) / 4
        self.A = [torch.randn(4, 16, device=device, requires_grad=True) for _ in range(3)]
        self.B = [torch.randn(24, 4, device=device, requires_grad=True) for _ in range(3)]
        self.segments = None if listed else Segments([0, 20, 64], [(0, 2), 1])

    def draw(self) -> dict[str, torch.Tensor]:
        """Other inputs: a seed for the call, or with segments one for each."""
        found = {
            "x": torch.randn(64, 16, device=self.device),
            "gates": torch.rand(64, 2 if self.listed else 3, device=self.device),
            "seed": torch.randint(2**62, () if self.listed else (2,), device=self.device),
        }
        if self.listed:
            found["expert_idxs"] = torch.rand(64, 3, device=self.device).topk(2).indices
        return found

    def __call__(self, inputs: dict[str, torch.Tensor | None]) -> torch.Tensor:
        rest = {name: t for name, t in inputs.items() if name != "x"}
        return gated_lora_linear(
            inputs["x"], self.weight, self.A, self.B, **rest, segments=self.segments,
            dropout_p=0.25, backend=self.backend,
        )  # fmt: skip

    def parameters(self) -> list[torch.Tensor]:
        return [*self.A, *self.B]

    def optimiser(self) -> torch.optim.Optimizer:
        if self.device.type == "cuda":
            return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3, capturable=True)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)  # all of it on tensors


def _runs(backend: str, device: torch.device) -> None:
    # under Triton's interpreter a kernel is no operator that could be recorded
    able = plan.runs(backend, device, torch.float32, torch.float32)
    if not able or (backend == "triton" and device.type == "cpu"):
        pytest.skip(f"{backend} does not run here")


@pytest.mark.parametrize("routing", ["listed", "segments"])
@pytest.mark.parametrize("backend", plan.BACKENDS)
def test_a_captured_training_step_is_the_eager_one(graphs, backend, routing):
    """Forward, backward, optimiser in a graph: x, gates, seeds, routes are new at each replay."""
    _runs(backend, graphs)
    torch.manual_seed(0)
    task = Task(backend, graphs, listed=routing == "listed")
    optimiser, inputs = task.optimiser(), task.draw()

    def step(task: Task, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        task(inputs).square().mean().backward()
        optimiser.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled, tables sent, the optimiser's state made
        for _ in range(3):
            step(task, optimiser)
    torch.cuda.current_stream().wait_stream(side)
    optimiser.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(task, optimiser)

    twin = copy.deepcopy(task)
    eager = twin.optimiser()
    eager.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for _ in range(3):
        before = [p.detach().clone() for p in task.parameters()]
        for name, values in task.draw().items():
            inputs[name].copy_(values)
        graph.replay()
        step(twin, eager)
        for old, got, want in zip(before, task.parameters(), twin.parameters(), strict=True):
            assert not torch.equal(got, old)
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", plan.BACKENDS)
def test_each_replay_drops_anew_without_a_seed(graphs, backend):
    _runs(backend, graphs)
    task = Task(backend, graphs, listed=False)
    inputs = task.draw() | {"seed": None}
    with torch.no_grad():
        task(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = task(inputs)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", plan.BACKENDS)
def test_more_than_two_to_the_31_elements(backend):
    """The last rows of an x past 2^31 elements are what they are by themselves."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    if not plan.runs(backend, device, dtype, dtype):
        pytest.skip(f"{backend} does not run on a GPU here")
    m, k, n = 2**19 + 77, 4096, 64
    x = torch.randn(m, k, device=device, dtype=dtype)
    weight = torch.randn(n, k, device=device, dtype=dtype) / 64
    A, B = torch.randn(8, k, device=device, dtype=dtype) / 64, torch.randn_like(weight[:, :8])
    gates = torch.rand(m, 1, device=device)
    y = gated_lora_linear(x, weight, [A], [B], gates=gates, backend=backend)
    last = gated_lora_linear(
        x[-128:].clone(), weight, [A], [B], gates=gates[-128:].clone(), backend="stacked"
    )
    assert torch.allclose(y[-128:].float(), last.float(), rtol=2e-2, atol=2e-2)
