"""The GPU suite's rows, and the check that every row passes before it is timed.

    frozen            the base linear alone, forward and dx: the floor
    peft fp32         peft's arithmetic with its default fp32 adapters, gated as X-LoRA gates
    peft bf16         the same with adapters in the base's dtype
    peft compiled     the same through torch.compile, for one shape of each model
    stacked, triton.. every backend of fedms.kernels.plan that runs here (stacked: cuBLAS + addmm_)
    grouped_mm        segments: torch._grouped_mm, one group a segment
    ... one adapter   segments: the backend with one adapter over all rows, what segments cost over

Shape suffixes: M rows, K in, N out, E experts, k experts a token, r one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from gated_lora_cases import SCALE, peft_style
from gpu_cases import Case
from torch import Tensor
from torch.nn import functional as F

from fedms.kernels import Segments, gated_lora_linear, gated_lora_linear_reference, plan, tiles
from fedms.kernels.agreement import BOUND, difference
from fedms.kernels.segments import row_width

SEED = 7


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

    def fedms(self, backend: str) -> Callable[[], Tensor]:
        return lambda: gated_lora_linear(
            self.x, self.weight, self.A, self.B, gates=self.gates, expert_idxs=self.expert_idxs,
            segments=self.segments, scaling=SCALE, dropout_p=self.dropout_p, seed=SEED,
            backend=backend,
        )  # fmt: skip

    def reference(self) -> Tensor:
        return gated_lora_linear_reference(
            self.x, self.weight, self.A, self.B, gates=self.gates, expert_idxs=self.expert_idxs,
            segments=self.segments, scaling=SCALE, dropout_p=self.dropout_p, seed=SEED,
        )  # fmt: skip

    def x_h_g_bytes(self) -> int:
        """What the op must keep for backward: x when some A is trained, h, the gates."""
        experts = None if self.segments is None else self.segments.tensors[1]
        width = row_width([a.shape[0] for a in self.A], experts)
        size = torch.promote_types(self.x.dtype, self.A[0].dtype).itemsize if self.A else 0
        kept = len(self.x) * width * size
        if any(a.requires_grad for a in self.A):
            kept += self.x.numel() * self.x.element_size()
        return kept + (0 if self.gates is None else self.gates.numel() * self.gates.element_size())

    def results(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        """[y, *gradients of the leaves]."""
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, self.leaves(), self.dy)]


@dataclass(frozen=True)
class Row:
    """One way to compute a case.

    checked: what stands in for `forward` in the check where its dropout mask is its own: the same
    arithmetic without dropout.
    """

    problem: Problem
    forward: Callable[[], Tensor]
    checked: Row | None = None


def problem(case: Case, device: torch.device) -> Problem:
    """Random inputs of order one whose values bf16 holds exactly, gates too.

    The first of several experts is frozen, as in FedMS's second stage, but not with segments,
    where every expert is some client's own.
    """
    source = torch.Generator(device).manual_seed(SEED)

    def draw(*shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
        values = torch.randn(shape, generator=source, device=device) * scale
        return values.bfloat16().requires_grad_(grad)

    e, frozen = case.experts, case.experts > 1 and not case.segments
    idxs = gates = segments = None
    if case.top_k:
        scores = torch.rand((case.m, e), generator=source, device=device)
        idxs = scores.topk(case.top_k, dim=1).indices
    if case.segments:
        step = case.m // case.segments
        segments = Segments(range(0, case.m + 1, step), range(case.segments))
    else:
        shape = (case.m, case.top_k or e)
        gates = torch.rand(shape, generator=source, device=device).bfloat16().float()
        gates.requires_grad_()
    return Problem(
        x=draw(case.m, case.k, grad=True),
        weight=draw(case.n, case.k, scale=case.k**-0.5),
        A=[draw(case.r, case.k, scale=case.k**-0.5, grad=i > 0 or not frozen) for i in range(e)],
        B=[draw(case.n, case.r, grad=i > 0 or not frozen) for i in range(e)],
        dy=draw(case.m, case.n),
        gates=gates,
        expert_idxs=idxs,
        segments=segments,
        dropout_p=case.dropout_p,
    )


def rows(case: Case, whole: Problem) -> dict[str, Row]:
    """The case's rows by name, `frozen` first."""
    x, bf16 = whole.x, torch.bfloat16
    bare = replace(whole, A=[], B=[], gates=None, expert_idxs=None, segments=None)
    found = {"frozen": Row(bare, lambda: F.linear(x, bare.weight))}
    if case.segments:
        found["peft bf16"] = Row(whole, lambda: _peft_by_segment(whole))
        found["grouped_mm"] = _grouped(whole)
    else:
        found["peft fp32"] = _peft(whole.to(bf16, torch.float32))
        found["peft bf16"] = _peft(whole.to(bf16, bf16))
    if case.compiled:
        torch.compiler.reset()  # or a second shape would be compiled for any size
        how = "inductor" if x.is_cuda else "aot_eager"  # a rehearsal need not wait for a compiler
        compiled = torch.compile(peft_style, dynamic=False, backend=how)
        found["peft compiled"] = _peft(whole.to(bf16, bf16), compiled)
    alone = replace(whole, A=whole.A[:1], B=whole.B[:1], segments=None)
    for backend in plan.BACKENDS:
        if plan.runs(backend, x.device, x.dtype, whole.A[0].dtype):
            found[backend] = Row(whole, whole.fedms(backend))
            if case.segments:
                found[f"{backend} one adapter"] = Row(alone, alone.fedms(backend))
    return found


def default_backend(case: Case, device: torch.device) -> str:
    """What the plan runs when the caller names no backend."""
    bf16, ranks = torch.bfloat16, case.r * case.experts
    return plan.choose(device, bf16, bf16, bf16, None, case.m, case.k, case.n, ranks)


def tuned_shape(case: Case, device: torch.device) -> tiles.Shape:
    """The row of the plan's table that the case reads."""
    bf16, ranks = torch.bfloat16, case.r * case.experts
    name = tiles.device_name(device)
    return tiles.Shape.of(name, bf16, bf16, case.m, case.k, case.n, ranks)


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
        return difference(of.results(row.forward), self._known[key], BOUND[torch.bfloat16])

    def _results(self, of: Problem) -> list[Tensor]:
        try:
            exact = of.to(self.dtype, self.dtype)
            return exact.results(exact.reference)
        except torch.OutOfMemoryError:
            if self.dtype == torch.float32:
                raise
        torch.cuda.empty_cache()
        torch.backends.cuda.matmul.allow_tf32 = False
        self.dtype = torch.float32
        return self._results(of)


def _peft(of: Problem, function: Callable[..., Tensor] = peft_style) -> Row:
    """Adapter by adapter; top-k as X-LoRA has it: every adapter runs, gates not listed are zero."""

    def call(p: float) -> Tensor:
        gates = of.gates
        if of.expert_idxs is not None and gates is not None:
            dense = gates.new_zeros((gates.shape[0], len(of.A)))
            gates = dense.scatter(1, of.expert_idxs, gates)
        return function(of.x, of.weight, of.A, of.B, gates, p)

    checked = Row(replace(of, dropout_p=0.0), lambda: call(0.0)) if of.dropout_p else None
    return Row(of, lambda: call(of.dropout_p), checked)


def _peft_by_segment(of: Problem) -> Tensor:
    """peft's batch of several adapters: the base at once, then each range of rows with its own."""
    assert of.segments is not None
    parts = [
        F.linear(F.linear(of.x[begin:end], a), b) * SCALE
        for (begin, end), a, b in zip(pairwise(of.segments.offsets), of.A, of.B, strict=True)
    ]
    return F.linear(of.x, of.weight) + torch.cat(parts)


def _grouped(of: Problem) -> Row:
    """Two grouped products over the segments, added to the base."""
    assert of.segments is not None
    ends = torch.tensor(of.segments.offsets[1:], dtype=torch.int32, device=of.x.device)

    def forward() -> Tensor:
        h = torch._grouped_mm(of.x, torch.stack(of.A).transpose(1, 2), offs=ends)
        delta = torch._grouped_mm(h, torch.stack(of.B).transpose(1, 2), offs=ends)
        return F.linear(of.x, of.weight) + delta * SCALE

    return Row(of, forward)
