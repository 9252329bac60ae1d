"""Shapes and rows of the gated LoRA benchmark, shared by the pytest file and the table.

Rows, all forward + backward of one layer, all gradients but the frozen weight's:

    frozen   the base linear alone: forward and dx. The floor: every ratio is over this.
    peft     what peft computes, adapter by adapter in plain torch; with a gate, X-LoRA-style
    stacked  fedms' plain-torch backend: one [R, K] and one [N, R] matrix, beta = 1 into the base
    native   fedms' C++ backend
    cast     bf16 only: the frozen layer cast to fp32 and back, which is what native's base is on a
             CPU without bf16 instructions; there `frozen` measures torch's slow bf16 GEMM

`tiny_rows` is a layer whose arithmetic takes no time, with a real peft layer beside it and the same
layer accelerated; `decoding_rows` are such layers on the few tokens of a `generate` step.

Shape suffixes: M rows, K in, N out, E experts, r one rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedms
from fedms.kernels import gated_lora_linear, native

# (M, K, N): MiniLM projections at 512 tokens, ViT-B/16 at 8 images
SHAPES = [(512, 384, 384), (512, 384, 1536), (1576, 768, 768), (1576, 768, 3072), (1576, 3072, 768)]
SMOKE = [(512, 384, 384), (512, 384, 1536)]
# (r, E, gated per token)
MIXTURES = [
    (8, 1, False),
    (16, 1, False),
    (8, 2, True),
    (8, 4, True),
    (16, 4, True),
    (8, 8, True),
]
SCALE = 2.0
# (tokens, K, N) of a decoding step
DECODING = [(1, 768, 768), (1, 768, 3072), (4, 768, 3072), (16, 768, 3072)]
DECODING += [(1, 4096, 4096), (16, 4096, 4096)]


@dataclass(frozen=True)
class Case:
    m: int
    k: int
    n: int
    r: int
    experts: int
    gated: bool
    bf16: bool
    dropout_p: float = 0.0

    def __str__(self) -> str:
        dtype = "bf16" if self.bf16 else "fp32"
        gate = " gated" if self.gated else ""
        drop = f" p={self.dropout_p}" if self.dropout_p else ""
        return f"{self.m}x{self.k}x{self.n} {dtype} r{self.r} E{self.experts}{gate}{drop}"


def cases(shapes: list[tuple[int, int, int]]) -> list[Case]:
    """fp32, and a bf16 base with fp32 adapters (peft's default)."""
    return [Case(*s, *mix, bf16) for bf16 in (False, True) for s in shapes for mix in MIXTURES]


def peft_style(
    x: Tensor, weight: Tensor, A: list[Tensor], B: list[Tensor], gates: Tensor | None, p: float
) -> Tensor:
    """peft's arithmetic: x cast once to the adapters' dtype, then one adapter after another."""
    y = F.linear(x, weight)
    dtype = y.dtype
    x = x.to(A[0].dtype)
    for e, (a, b) in enumerate(zip(A, B, strict=True)):
        delta = F.linear(F.linear(F.dropout(x, p), a), b) * SCALE
        y = y + (delta if gates is None else delta * gates[:, e : e + 1])
    return y.to(dtype)


def _step(
    forward: Callable[[], Tensor], inputs: list[Tensor], dy: Tensor
) -> Callable[[], list[Tensor]]:
    """A function that runs forward and backward once and gives [y, *gradients]."""

    def run() -> list[Tensor]:
        y = forward()
        return [y, *torch.autograd.grad(y, inputs, dy)]

    return run


def rows(case: Case) -> dict[str, Callable[[], list[Tensor]]]:
    """For each row a function that runs forward and backward once and gives [y, *gradients]."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    x = torch.randn(case.m, case.k, dtype=dtype, requires_grad=True)
    weight = (torch.randn(case.n, case.k) / case.k**0.5).to(dtype)
    A = [torch.randn(case.r, case.k) / case.k**0.5 for _ in range(case.experts)]
    B = [torch.randn(case.n, case.r) for _ in range(case.experts)]
    gates = torch.rand(case.m, case.experts, requires_grad=True) if case.gated else None
    leaves = [x, *(t.requires_grad_() for t in (*A, *B)), *([gates] if gates is not None else [])]
    dy = torch.randn(case.m, case.n, dtype=dtype)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: gated_lora_linear(
            x,
            weight,
            A,
            B,
            gates=gates,
            scaling=SCALE,
            dropout_p=case.dropout_p,
            seed=7,
            backend=backend,
        )

    found = {
        "frozen": _step(lambda: F.linear(x, weight), [x], dy),
        "peft": _step(lambda: peft_style(x, weight, A, B, gates, case.dropout_p), leaves, dy),
        "stacked": _step(ours("stacked"), leaves, dy),
    }
    if native.available():
        found["native"] = _step(ours("native"), leaves, dy)
    if case.bf16:
        cast = lambda: F.linear(x.float(), weight.float()).to(dtype)  # noqa: E731
        found["cast"] = _step(cast, [x], dy)
    return found


def tiny_rows() -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward of 4 tokens through 32 x 32, r = 4; `peft` is peft's own layer."""
    stock, fused = _layers(32, 32, 4)
    weight = stock.base_layer.weight
    x, dy = torch.randn(4, 32, requires_grad=True), torch.randn(4, 32)

    def factors(layer: nn.Module) -> list[Tensor]:
        return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    A, B = factors(stock)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: gated_lora_linear(x, weight, [A], [B], scaling=SCALE, backend=backend)

    found = {
        "frozen": _step(lambda: F.linear(x, weight), [x], dy),
        "peft": _step(lambda: stock(x), [x, A, B], dy),
        "stacked": _step(ours("stacked"), [x, A, B], dy),
    }
    if native.available():
        found["native"] = _step(ours("native"), [x, A, B], dy)
        found["drop-in"] = _step(lambda: fused(x), [x, *factors(fused)], dy)
    return found


def decoding_rows(m: int, k: int, n: int, r: int) -> dict[str, Callable[[], list[Tensor]]]:
    """A forward without gradients of m tokens, as `generate` runs it, on peft's layer and ours."""
    stock, fused = _layers(k, n, r)
    x = torch.randn(m, 1, k)

    def run(layer: nn.Module) -> Callable[[], list[Tensor]]:
        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [layer(x)]

        return forward

    return {"frozen": run(stock.base_layer), "peft": run(stock), "drop-in": run(fused)}


def _layers(k: int, n: int, r: int) -> tuple[nn.Module, nn.Module]:
    """peft's LoRA layer and a fused copy with the same frozen weight: as warm in the caches."""
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=False))
    config = peft.LoraConfig(
        r=r, lora_alpha=SCALE * r, target_modules=["0"], init_lora_weights=False
    )
    stock = peft.get_peft_model(model, config)
    weight = stock.base_model.model[0].base_layer.weight
    fused = copy.deepcopy(stock, {id(weight): weight})
    fedms.accelerate(fused)
    return stock.base_model.model[0], fused.base_model.model[0]


def check(found: dict[str, Callable[[], list[Tensor]]], case: Case | None = None) -> None:
    """The rows compute the same thing. With dropout peft draws masks of its own and is left out.

    case: None for the rows of `tiny_rows` and `decoding_rows`.
    """
    right = found["stacked"]() if case is not None and case.dropout_p else found["peft"]()
    bound = 2e-2 if case is not None and case.bf16 else 1e-4
    for name in {"stacked", "native", "drop-in"} & found.keys():
        for value, want in zip(found[name](), right, strict=True):
            error = (value.double() - want.double()).norm() / want.double().norm()
            if not error < bound:
                raise AssertionError(f"{case or 'one layer'}: {name} is off by {error:.1e}")
