"""One call of the op with its inputs, run by any implementation, and the float64 truth for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.kernels import (
    Segments,
    gated_lora_linear,
    gated_lora_linear_reference,
    native,
    triton,
)

# On a GPU machine test_triton.py and test_cuda.py have the kernels that these CPU tensors cannot.
BACKENDS = [
    "stacked",
    *["native"] * native.available(),
    *["triton"] * (triton.available() and triton.interpreted()),
]


@dataclass(frozen=True)
class Problem:
    x: Tensor
    weight: Tensor
    bias: Tensor
    A: list[Tensor]
    B: list[Tensor]
    gates: Tensor | None = None
    expert_idxs: Tensor | None = None
    segments: Segments | None = None
    scaling: Any = None
    dropout_p: float = 0.0
    seed: int | Tensor = 11

    def to(self, base: torch.dtype, adapter: torch.dtype | None = None) -> Problem:
        adapter = adapter or base

        def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        gates = None if self.gates is None else cast(self.gates, adapter)
        return replace(
            self,
            x=cast(self.x, base),
            weight=self.weight.to(base),
            bias=self.bias.to(base),
            A=[cast(a, adapter) for a in self.A],
            B=[cast(b, adapter) for b in self.B],
            gates=gates,
        )

    def call(self, op: Callable[..., Tensor], **kwargs: Any) -> Tensor:
        return op(
            self.x, self.weight, self.A, self.B, bias=self.bias, gates=self.gates,
            expert_idxs=self.expert_idxs, segments=self.segments, scaling=self.scaling,
            dropout_p=self.dropout_p, seed=self.seed, **kwargs,
        )  # fmt: skip

    def run(self, op: Callable[..., Tensor] | str) -> dict[str, Tensor | None]:
        """y and every gradient, by name; `op` is a callable or a backend's name."""
        by_name = isinstance(op, str)
        y = self.call(gated_lora_linear, backend=op) if by_name else self.call(op)
        inputs = {"x": self.x, "gates": self.gates}
        inputs |= {f"A{e}": a for e, a in enumerate(self.A)}
        inputs |= {f"B{e}": b for e, b in enumerate(self.B)}
        wanted = {k: t for k, t in inputs.items() if t is not None and t.requires_grad}
        out: dict[str, Tensor | None] = {"y": y.detach()}
        if wanted and y.requires_grad:
            grads = torch.autograd.grad(y, list(wanted.values()), upstream(y), allow_unused=True)
            out |= {f"d{k}": g for k, g in zip(wanted, grads, strict=True)}
        return out

    def truth(self) -> dict[str, Tensor | None]:
        return self.to(torch.float64).run(gated_lora_linear_reference)


def on_device(problem: Problem, device: str) -> Problem:
    def move(t: Tensor | None) -> Any:
        return None if t is None else t.detach().to(device).requires_grad_(t.requires_grad)

    return replace(
        problem, x=move(problem.x), weight=move(problem.weight), bias=move(problem.bias),
        A=[move(a) for a in problem.A], B=[move(b) for b in problem.B], gates=move(problem.gates),
        expert_idxs=move(problem.expert_idxs),
    )  # fmt: skip


def on_cpu(got: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.cpu() for name, t in got.items()}


def upstream(y: Tensor) -> Tensor:
    """A fixed dy of order one that bf16 holds exactly."""
    dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device) * 0.7)
    return dy.to(torch.bfloat16).to(y.dtype).reshape(y.shape)


def peft_arithmetic(x, weight, A, B, *, bias, gates, scaling, **_) -> Tensor:
    """What peft computes, gate included: adapter by adapter, x cast to the adapters' dtype."""
    y = F.linear(x, weight, bias)
    dtype = y.dtype
    for e, (a, b) in enumerate(zip(A, B, strict=True)):
        delta = F.linear(F.linear(x.to(a.dtype), a), b) * scaling[e]
        y = y + delta * gates[:, e : e + 1]
    return y.to(dtype)


def make_problem(
    m: int = 37,
    k: int = 40,
    n: int = 56,
    ranks: Sequence[int] = (8, 8),
    gates: str | None = "token",
    **kwargs: Any,
) -> Problem:
    """Inputs that bf16 holds exactly, so that casting them makes no error of its own."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(torch.bfloat16).double()

    e = len(ranks)
    top_k = kwargs["expert_idxs"].shape[-1] if kwargs.get("expert_idxs") is not None else 0
    shapes = {None: None, "layer": (e,), "token": (m, e), "listed": (m, top_k)}
    shape = shapes[gates]
    return Problem(
        x=draw(m, k).requires_grad_(),
        weight=draw(n, k, scale=k**-0.5),
        bias=draw(n),
        A=[draw(r, k, scale=k**-0.5).requires_grad_() for r in ranks],
        B=[draw(n, r).requires_grad_() for r in ranks],
        gates=None if shape is None else draw(*shape).requires_grad_(),
        scaling=kwargs.pop("scaling", [0.5 + e for e in range(e)]),
        **kwargs,
    )


def errors(got: dict[str, Tensor | None], truth: dict[str, Tensor | None]) -> dict[str, float]:
    """Relative L2 error of every tensor; the same ones must be None on both sides."""
    assert got.keys() == truth.keys()
    out = {}
    for name, right in truth.items():
        value = got[name]
        assert (value is None) == (right is None), f"{name}: {value} against {right}"
        if value is None or right is None or right.numel() == 0:
            continue
        assert value.shape == right.shape, name
        norm = right.norm().item()
        out[name] = (value.double() - right).norm().item() / (norm if norm > 0 else 1.0)
    return out


def allowed(theirs: float, base: torch.dtype, device: str) -> float:
    """The error that is no worse than peft's: twice it, and more than the noise of few numbers.

    On a GPU Triton multiplies fp32 as three TF32 products, 1e-6 where a CPU's fp32 makes 1e-7.
    """
    least = 1e-6 if device == "cuda" and base == torch.float32 else torch.finfo(base).eps / 2
    return max(2 * theirs, least)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """torch's own products in full fp32 on a GPU.

    By hand: monkeypatch undoes an attribute that `__getattr__` made by deleting it, and fails.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def assert_close(
    got: dict[str, Tensor | None], truth: dict[str, Tensor | None], bound: float
) -> None:
    for name, error in errors(got, truth).items():
        assert error <= bound, f"{name}: relative error {error:.2e} over {bound:.0e}"
