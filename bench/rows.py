"""Ways to compute a case, side by side, and the check that each passes before it is timed.

    frozen            the base linear alone, forward and dx: the floor, every ratio is over it
    peft              what peft computes, adapter by adapter in plain torch; gated as X-LoRA gates
    peft fp32         the same with peft's default fp32 adapters, where the case's are not
    peft compiled     the same through torch.compile
    cast              CPU, bf16: the frozen layer cast to fp32 and back, which is what native's base
                      is where the CPU has no bf16 instructions and torch's bf16 GEMM is slow
    grouped_mm        segments: torch._grouped_mm, one group a segment
    stacked, native.. every backend of fedms.kernels.plan that runs here
    ... one adapter   segments: the backend with one adapter over all rows, what segments cost over

Shape suffixes: M rows, K in, N out, E experts, k experts a token, r one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from cases import DTYPES, Case
from torch import Tensor
from torch.nn import functional as F

from fedms.kernels import Segments, gated_lora_linear, gated_lora_linear_reference, plan, tiles
from fedms.kernels.agreement import BOUND, difference
from fedms.kernels.segments import row_width

SCALE, SEED = 2.0, 7


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of one layer. gates [M, E], or [M, k] beside expert_idxs; dy [M, N]."""

    x: Tensor
    weight: Tensor
    A: list[Tensor]
    B: list[Tensor]
    dy: Tensor
    gates: Tensor | None = None
    expert_idxs: Tensor | None = None
    segments: Segments | None = None
    dropout_p: float = 0.0

    def leaves(self) -> list[Tensor]:
        """What gets a gradient, in the order of `results`: x, gates, A_e and B_e not frozen."""
        listed = [self.x, *([] if self.gates is None else [self.gates]), *self.A, *self.B]
        return [t for t in listed if t.requires_grad]

    def to(self, base: torch.dtype, adapter: torch.dtype) -> Problem:
        """The same values in other dtypes; gates take the adapters'."""

        def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
            return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

        return replace(
            self,
            x=cast(self.x, base),
            weight=self.weight.to(base),
            dy=self.dy.to(base),
            A=[cast(a, adapter) for a in self.A],
            B=[cast(b, adapter) for b in self.B],
            gates=None if self.gates is None else cast(self.gates, adapter),
        )

    def call(self, op: Callable[..., Tensor], **extra: str) -> Tensor:
        return op(
            self.x, self.weight, self.A, self.B, gates=self.gates, expert_idxs=self.expert_idxs,
            segments=self.segments, scaling=SCALE, dropout_p=self.dropout_p, seed=SEED, **extra,
        )  # fmt: skip

    def fedms(self, backend: str) -> Callable[[], Tensor]:
        return lambda: self.call(gated_lora_linear, backend=backend)

    def x_h_g_bytes(self) -> int:
        """What the op must keep for backward: x when some A is trained, h, the gates."""
        experts = None if self.segments is None else self.segments.tensors[1]
        width = row_width([a.shape[0] for a in self.A], experts)
        size = torch.promote_types(self.x.dtype, self.A[0].dtype).itemsize if self.A else 0
        kept = len(self.x) * width * size
        if any(a.requires_grad for a in self.A):
            kept += self.x.numel() * self.x.element_size()
        return kept + (0 if self.gates is None else self.gates.numel() * self.gates.element_size())


@dataclass(frozen=True, eq=False)
class Row:
    """One way to compute a case.

    checked: what stands in for `forward` in the check where its dropout mask is its own: the same
    arithmetic without dropout.
    """

    problem: Problem
    forward: Callable[[], Tensor]
    checked: Row | None = None

    def results(self) -> list[Tensor]:
        """Forward and backward once: [y, *gradients of the leaves]."""
        y = self.forward()
        return [y.detach(), *torch.autograd.grad(y, self.problem.leaves(), self.problem.dy)]

    def parts(self) -> dict[str, Callable[[], object]]:
        """forward and backward as two calls, for a clock that reads the time between them."""
        kept: list[Tensor] = []
        leaves, dy = self.problem.leaves(), self.problem.dy
        return {
            "forward": lambda: kept.append(self.forward()),
            "backward": lambda: torch.autograd.grad(kept.pop(), leaves, dy),
        }


def problem(case: Case, device: torch.device) -> Problem:
    """Random inputs of order one whose values bf16 holds exactly, gates too."""
    source = torch.Generator(device).manual_seed(SEED)
    base, adapter = DTYPES[case.base], DTYPES[case.adapter]

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = base) -> Tensor:
        values = torch.randn(shape, generator=source, device=device) * scale
        return values.bfloat16().to(dtype)

    e = case.experts
    trained = [i >= case.frozen for i in range(e)]
    idxs = gates = segments = None
    if case.top_k:
        scores = torch.rand((case.m, e), generator=source, device=device)
        idxs = scores.topk(case.top_k, dim=1).indices
    if case.segments:
        step = case.m // case.segments
        ends = [*range(0, step * case.segments, step), case.m]
        segments = Segments(ends, range(case.segments))
    if case.gated:
        shape = (case.m, case.top_k or e)
        gates = torch.rand(shape, generator=source, device=device).bfloat16().float()
        gates.requires_grad_()
    A = [draw(case.r, case.k, scale=case.k**-0.5, dtype=adapter) for _ in range(e)]
    B = [draw(case.n, case.r, dtype=adapter) for _ in range(e)]
    return Problem(
        x=draw(case.m, case.k).requires_grad_(),
        weight=draw(case.n, case.k, scale=case.k**-0.5),
        A=[a.requires_grad_(t) for a, t in zip(A, trained, strict=True)],
        B=[b.requires_grad_(t) for b, t in zip(B, trained, strict=True)],
        dy=draw(case.m, case.n),
        gates=gates,
        expert_idxs=idxs,
        segments=segments,
        dropout_p=case.dropout_p,
    )


def rows(case: Case, whole: Problem, *, compiled: bool = False) -> dict[str, Row]:
    """The case's rows by name, `frozen` first. compiled: torch.compile's too, in some seconds."""
    x, adapter = whole.x, whole.A[0].dtype
    bare = replace(whole, A=[], B=[], gates=None, expert_idxs=None, segments=None)
    found = {"frozen": Row(bare, lambda: F.linear(x, bare.weight))}
    if not x.is_cuda and x.dtype == torch.bfloat16:
        found["cast"] = Row(bare, lambda: F.linear(x.float(), bare.weight.float()).to(x.dtype))
    if case.segments:
        found["peft"] = Row(whole, lambda: _peft_by_segment(whole))
        if adapter == x.dtype == torch.bfloat16:
            found["grouped_mm"] = _grouped(whole)
    else:
        found["peft"] = _peft(whole.to(x.dtype, adapter))
        if adapter != torch.float32:
            found["peft fp32"] = _peft(whole.to(x.dtype, torch.float32))
    if compiled:
        torch.compiler.reset()  # or a second shape would be compiled for any size
        how = "inductor" if x.is_cuda else "aot_eager"  # a rehearsal need not wait for a compiler
        found["peft compiled"] = _peft(
            whole.to(x.dtype, adapter), torch.compile(peft_style, dynamic=False, backend=how)
        )
    alone = replace(whole, A=whole.A[:1], B=whole.B[:1], segments=None)
    for backend in plan.BACKENDS:
        if plan.runs(backend, x.device, x.dtype, adapter):
            found[backend] = Row(whole, whole.fedms(backend))
            if case.segments:
                found[f"{backend} one adapter"] = Row(alone, alone.fedms(backend))
    return found


def default_backend(case: Case, device: torch.device) -> str:
    """What the plan runs when the caller names no backend."""
    base, adapter = DTYPES[case.base], DTYPES[case.adapter]
    return plan.choose(device, base, adapter, base, None, case.m, case.k, case.n, case.ranks)


def tuned_shape(case: Case, device: torch.device) -> tiles.Shape:
    """The row of the plan's table that the case reads."""
    name, base, adapter = tiles.device_name(device), DTYPES[case.base], DTYPES[case.adapter]
    return tiles.Shape.of(name, base, adapter, case.m, case.k, case.n, case.ranks)


class Truth:
    """float64 results of a case's problems; fp32 (TF32 off) from the first that does not fit."""

    def __init__(self) -> None:
        self.dtype = torch.float64
        self._known: dict[tuple[object, ...], list[Tensor]] = {}

    def problem_with(self, row: Row) -> str:
        """What is wrong with the row's result, empty when nothing is."""
        row = row.checked or row
        of = row.problem
        key = (len(of.A), of.segments, of.dropout_p)  # what a case's problems differ in, but dtypes
        if key not in self._known:
            self._known[key] = self._results(of)
        return difference(row.results(), self._known[key], BOUND[of.x.dtype])

    def _results(self, of: Problem) -> list[Tensor]:
        try:
            exact = of.to(self.dtype, self.dtype)
            return Row(exact, lambda: exact.call(gated_lora_linear_reference)).results()
        except torch.OutOfMemoryError:
            if self.dtype == torch.float32:
                raise
        torch.cuda.empty_cache()
        self.dtype = torch.float32
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        try:
            return self._results(of)
        finally:
            matmul.fp32_precision = before


def checked(found: dict[str, Row], truth: Truth | None = None) -> dict[str, str]:
    """What is wrong with each row, empty where it is right: a wrong result, or what it raised."""
    truth, said = truth or Truth(), {}
    for name, row in found.items():
        try:
            said[name] = truth.problem_with(row)
        except Exception as error:  # a compiler's, a launch's or the memory's own; the row says it
            said[name] = first_line(error)
    return said


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


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


def _peft(of: Problem, function: Callable[..., Tensor] = peft_style) -> Row:
    """Adapter by adapter; top-k as X-LoRA has it: every adapter runs, gates not listed are zero."""

    def call(p: float) -> Tensor:
        gates = of.gates
        if of.expert_idxs is not None and gates is not None:
            dense = gates.new_zeros((gates.shape[0], len(of.A)))
            gates = dense.scatter(1, of.expert_idxs, gates)
        return function(of.x, of.weight, of.A, of.B, gates, p)

    without = Row(replace(of, dropout_p=0.0), lambda: call(0.0)) if of.dropout_p else None
    return Row(of, lambda: call(of.dropout_p), without)


def _peft_by_segment(of: Problem) -> Tensor:
    """peft's batch of several adapters: the base at once, then each range of rows with its own."""
    assert of.segments is not None
    parts = [
        F.linear(F.linear(of.x[begin:end].to(a.dtype), a), b) * SCALE
        for (begin, end), a, b in zip(pairwise(of.segments.offsets), of.A, of.B, strict=True)
    ]
    return F.linear(of.x, of.weight) + torch.cat(parts).to(of.x.dtype)


def _grouped(of: Problem) -> Row:
    """Two grouped products over the segments, added to the base."""
    assert of.segments is not None
    ends = torch.tensor(of.segments.offsets[1:], dtype=torch.int32, device=of.x.device)

    def forward() -> Tensor:
        h = torch._grouped_mm(of.x, torch.stack(of.A).transpose(1, 2), offs=ends)
        delta = torch._grouped_mm(h, torch.stack(of.B).transpose(1, 2), offs=ends)
        return F.linear(of.x, of.weight) + delta * SCALE

    return Row(of, forward)
