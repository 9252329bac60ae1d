"""The public op: validate, choose a backend, one autograd.Function around the backend's two ops.

Shape suffixes: M rows of the flattened x, K in, N out, E experts, k experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from fedms.kernels import higher_order, native, plan, stacked, triton, validate
from fedms.kernels.dropout import as_seed
from fedms.kernels.experts import counts
from fedms.kernels.packing import check_memory, rows_are_matrix
from fedms.kernels.reference import gated_lora_linear_reference
from fedms.kernels.segments import Segments, nobody

# Looked up once: an attribute chain through torch.ops costs more than the autograd.Function's call.
_TRACED: Mapping[tuple[str, str], Callable[..., Any]] = {
    (backend, direction): getattr(torch.ops.fedms, f"{backend}_{direction}").default
    for backend in plan.BACKENDS
    for direction in ("forward", "backward")
}
# In eager mode the dispatcher's way to a Python function, arguments to and fro, is 40 us a call and
# the C++ work of a tiny layer 3 us.
_EAGER = {"native": native, "stacked": stacked, "triton": triton}
_OPS: dict[tuple[str, str], Callable[..., Any]] = {
    **_TRACED,
    **{
        (name, direction): getattr(backend, direction)
        for name, backend in _EAGER.items()
        for direction in ("forward", "backward")
    },
}
_PLAIN = (Tensor, torch.nn.Parameter)


class _Spec(NamedTuple):
    """What a call is, apart from its tensors."""

    backend: str
    at_hand: bool  # whether `_at_hand` holds for all of them
    has_rows: list[bool]  # whether any row uses a part, of lora_A and so of lora_B
    scale: list[float]
    dropout_p: float
    has_base: bool


def _op(spec: _Spec, direction: str, at_hand: bool = True) -> Callable[..., Any]:
    """The backend's function; the operator itself where somebody traces or intercepts operators,
    or a tensor is none that kernels could read.
    """
    eager = spec.at_hand and at_hand and torch._C._len_torch_dispatch_stack() == 0
    return (_OPS if eager else _TRACED)[spec.backend, direction]


def _at_hand(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the memory of all of these holds what they say, and no graph is being traced.

    It does not for a subclass that wraps other tensors, nor for one that is negated when it is read
    (the imaginary part of a conjugate): the dispatcher knows of both, kernels do not.
    """
    if torch.compiler.is_compiling():
        return False
    return False not in [
        type(t) in _PLAIN and not t.is_neg() for t in tensors if t is not None
    ]  # a generator takes twice as long


# gates, expert_idxs, offsets and experts of the segments, seed: which pairs exist and what acts on
# them. No NamedTuple, which costs more than a call of the kernels' binding.
_Routing = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def gated_lora_linear(
    x: Tensor,
    weight: Tensor | Callable[[Tensor], Tensor],
    lora_A: Sequence[Tensor] | Tensor,
    lora_B: Sequence[Tensor] | Tensor,
    *,
    gates: Tensor | None = None,
    expert_idxs: Tensor | None = None,
    segments: Segments | None = None,
    bias: Tensor | None = None,
    scaling: float | Sequence[float] | Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Frozen linear layer plus a gated mixture of LoRA experts.

        y = base(x) + sum over e of  g_e * s_e * (drop_e(x) A_eᵀ) B_eᵀ

    x: [..., K]; the leading dims are flattened to M rows.
    weight: [N, K] in x's dtype, or a callable base [..., K] -> [..., N] (a quantised layer),
        whose result is read and never written to. A weight or bias that requires a gradient gets it
        through plain `F.linear`.
    lora_A, lora_B: for each active expert [r_e, K] and [N, r_e], one floating dtype (fp32 adapters
        on a bf16 base are usual: then products and sum are fp32, with one rounding). Leave an
        inactive expert out: it costs nothing. A frozen one (requires_grad False) gets no gradient
        work. A stack of S experts in one tensor, [S, r, K] and [S, N, r], may stand where an expert
        does, or alone instead of the sequence: one leaf with one gradient. Experts are counted
        through, so with lora_A = [one [r, K], stack [S, r', K]] the stack's are 1 to S, and
        Segments(offsets, [(0, 1 + s) for s in range(S)]) puts the first and a slot of the stack on
        each of S clients' rows.
    gates: None (ones), [E], [..., E], or [..., k] beside expert_idxs. Differentiable, also at zero.
    expert_idxs: int64 [..., k]: only the listed (token, expert) pairs exist (a pair listed twice
        counts twice).
    segments: only these rows use these experts; an expert without rows gets no gradient (None; in
        a stack zeros, and None if none of the stack has rows). Segments of tensors differ from
        batch to batch without a new compiled graph.
    bias: [N].
    scaling: s_e: None (ones), a float, or one an expert.
    dropout_p, seed: dropout on the experts' input, a mask of its own for each expert, a function
        of the seed alone (fedms.kernels.dropout). A number, or an int64 tensor on x's device, which
        nothing waits for: [], or [S] with one a segment, whose masks then do not depend on the
        rest of the batch. None draws one from the device's default generator, in the graph: each
        call of a compiled function and each replay of a CUDA graph has masks of its own.
    backend: None (by fedms.kernels.plan), "stacked", "native", "triton" or "cuda".

    In a CUDA graph: run the step once, optimiser included, then capture it. A replay reads x,
    gates, expert_idxs and a seed tensor anew; segments, scaling and dropout_p stay the capture's,
    so routes that change from step to step are given as expert_idxs.

    Returns [..., N] in the base result's dtype. M, K, N, E and ranks of 0 equal the base. Under
    autocast x and the weight are cast to the autocast dtype and the adapters stay as they are.
    Transforms of torch.func (vmap, grad, jvp ...) and forward-mode differentiation know no kernel:
    under them the op is its definition, `gated_lora_linear_reference`.
    Raises ValueError or TypeError that names the argument; RuntimeError where a backend was not
    built or a tensor's memory was freed. What expert_idxs hold is checked in eager mode on a CPU;
    in a compiled graph there the C++ kernels raise IndexError, the stacked backend RuntimeError.
    """
    validate.check_x(x)
    if _under_autocast(x):
        x, weight, bias = _cast(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return gated_lora_linear(
                x, weight, lora_A, lora_B, gates=gates, expert_idxs=expert_idxs, segments=segments,
                bias=bias, scaling=scaling, dropout_p=dropout_p, seed=seed, backend=backend,
            )  # fmt: skip
    validate.check_base(x, weight, bias)
    base = None
    if not isinstance(weight, Tensor):
        base = weight(x)
        validate.check_base_result(x, base)
    elif torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        base = F.linear(x, weight, bias)
    n = base.shape[-1] if base is not None else weight.shape[0]  # type: ignore[union-attr]

    lora_A, lora_B, ranks = validate.check_experts(x, n, lora_A, lora_B)
    e = len(ranks)
    scale = validate.check_scaling(scaling, e)
    if gates is not None or expert_idxs is not None or segments is not None:
        validate.check_routing(x, e, gates, expert_idxs, segments)
    if dropout_p != 0.0 or seed is not None:
        validate.check_dropout(x, dropout_p, seed, segments)
    k, r = x.shape[-1], sum(ranks)
    if not (k and n and r):
        return base if base is not None else F.linear(x, weight, bias)  # type: ignore[arg-type]
    if _transformed():
        if backend is not None:
            raise ValueError(
                "backend must be None under torch.func's transforms and forward-mode "
                f"differentiation, got {backend!r}"
            )
        return gated_lora_linear_reference(
            x, weight if base is None else lambda _: base, lora_A, lora_B, gates=gates,
            expert_idxs=expert_idxs, segments=segments, bias=bias if base is None else None,
            scaling=scale, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip

    m, out_dtype = x.numel() // k, x.dtype if base is None else base.dtype
    chosen = plan.choose(x.device, x.dtype, lora_A[0].dtype, out_dtype, backend, m, k, n, r)
    if base is None and chosen != "native" and not rows_are_matrix(x):  # which looks itself
        base = F.linear(x, cast(Tensor, weight), bias)
    offsets = experts = seeds = None
    if segments is not None:
        offsets, experts = segments.tensors
    if dropout_p > 0.0:
        seeds = as_seed(seed, x.device)
    if expert_idxs is not None and not expert_idxs.shape[-1]:
        # no pair exists: segments without experts say so, k = 0 means no lists to some kernels
        offsets, experts = nobody(m)
        if gates is not None:  # whose gradient is empty, but not missing
            gates = gates.sum(-1, keepdim=True).expand(*x.shape[:-1], e)
        expert_idxs = None
    routing = (gates, expert_idxs, offsets, experts, seeds)
    weight_NK, bias_N = (cast(Tensor, weight), bias) if base is None else (None, None)
    at_hand = _at_hand((x, weight_NK, bias_N, base, *routing, *lora_A, *lora_B))
    if at_hand and chosen != "native":  # which looks itself
        check_memory((x, weight_NK, bias_N, base, *routing, *lora_A, *lora_B))
    has_rows = _parts_with_rows(lora_A, segments)
    spec = _Spec(chosen, at_hand, has_rows, scale, dropout_p, base is not None)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, base, gates, *lora_A, *lora_B)
    ):
        y = _apply(x)(spec, x, weight_NK, bias_N, base, *routing, *lora_A, *lora_B)
        return y if isinstance(y, Tensor) else y[0]  # type: ignore[return-value, index]
    return _forward(spec, x, weight_NK, bias_N, base, lora_A, lora_B, routing, save_h=False)[0]


def _under_autocast(t: Tensor) -> bool:
    # the first question costs a tenth of the second and is nearly always the last
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(t.device.type)


def _transformed() -> bool:
    """Whether tensors may stand for batches, or carry tangents, which a kernel would not see."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _rows(t: Tensor | None) -> Tensor | None:
    """t [..., C] as [M, C]."""
    return t if t is None or t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _op_routing(spec: _Spec, routing: _Routing) -> tuple:
    """What both of a backend's ops take of routing, scale and dropout, in their order."""
    gates, expert_idxs, offsets, experts, seed = routing
    if gates is not None and gates.dim() > 2:  # gates [E] of the whole layer stay as they are
        gates = gates.reshape(-1, gates.shape[-1])
    if expert_idxs is not None:
        expert_idxs = _rows(expert_idxs)
    return gates, expert_idxs, offsets, experts, spec.scale, spec.dropout_p, seed


def _forward(
    spec: _Spec, x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None,
    A: Sequence[Tensor], B: Sequence[Tensor], routing: _Routing, save_h: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [..., N], and h [M, R] for the backward."""
    run = _op(spec, "forward")
    flat = x.dim() == 2 or run is native.forward
    y, h = run(
        x if flat else _rows(x), weight, bias, base if flat else _rows(base), A, B,
        *_op_routing(spec, routing), save_h,
    )  # fmt: skip
    if not flat:
        # no view of y: a custom function's result that is one may not be changed in place
        y = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])
    return y, h


_PARTS = 10
"""Where lora_A begins among the arguments of `_GatedLora.forward`."""


class _GatedLora(torch.autograd.Function):
    """forward and backward each call one op of the chosen backend.

    Where all of A is frozen x is not kept, yet dB and dg depend on it through h. A second output,
    zeros of x's shape in one element's memory, then stands in x's place when they are
    differentiated: its gradient arrives here and is x's.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: _Spec, x: Tensor, weight: Tensor | None, bias: Tensor | None,
        base: Tensor | None, gates: Tensor | None, expert_idxs: Tensor | None,
        offsets: Tensor | None, experts: Tensor | None, seed: Tensor | None, *parts: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        half = len(parts) // 2
        needs = ctx.needs_input_grad
        need_dx, need_dg = needs[1], gates is not None and needs[5]
        need_A, need_B = list(needs[_PARTS : _PARTS + half]), list(needs[_PARTS + half :])
        if False in spec.has_rows:
            need_A, need_B = (
                [need and used for need, used in zip(some, spec.has_rows, strict=True)]
                for some in (need_A, need_B)
            )
        save_h = need_dg or True in need_B
        routing = (gates, expert_idxs, offsets, experts, seed)
        y, h = _forward(spec, x, weight, bias, base, parts[:half], parts[half:], routing, save_h)
        # x is for dA alone, h for dB and dg: what nobody needs is not kept.
        keep_x = True in need_A
        place = None
        if save_h and need_dx and not keep_x and not torch.compiler.is_compiling():
            place = x.new_zeros(()).expand(x.shape)
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if keep_x else place, weight if need_dx else None,
            h if save_h else None, *routing, *parts,
        )  # fmt: skip
        ctx.call = (spec, x.dtype, x.shape, keep_x, need_dx, need_dg, need_A, need_B)
        return y if place is None else (y, place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dplace: Tensor | None = None) -> tuple:  # type: ignore[override]
        if dy is None:
            return (None, dplace, *(None,) * (len(ctx.needs_input_grad) - 2))
        if _under_autocast(dy):  # backward called inside the context
            with torch.autocast(dy.device.type, enabled=False):
                return _GatedLora._backward(ctx, dy, dplace)
        return _GatedLora._backward(ctx, dy, dplace)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor, dplace: Tensor | None) -> tuple:
        spec, x_dtype, x_shape, keeps_x, need_dx, need_dg, need_A, need_B = ctx.call
        x, weight, h, gates, expert_idxs, offsets, experts, seed, *parts = ctx.saved_tensors
        dbase = dy if spec.has_base and ctx.needs_input_grad[4] else None
        if not (need_dx or need_dg or True in need_A or True in need_B):
            return (None, None, None, None, dbase, *(None,) * (len(ctx.needs_input_grad) - 5))
        half = len(parts) // 2
        A, B = parts[:half], parts[half:]
        routing = (gates, expert_idxs, offsets, experts, seed)
        # differentiated itself, or of a batch of dy (torch.autograd.grad's is_grads_batched)
        plain = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or is_legacy_batchedtensor(dy) or _transformed()
        )
        run = higher_order.backward if plain else _op(spec, "backward", _at_hand((dy,)))
        x = x if plain or keeps_x else None
        if run is not native.backward:
            at_hand = spec.at_hand and type(dy) in _PLAIN  # never so while torch.compile traces
            if at_hand and not (is_legacy_batchedtensor(dy) or _transformed()):
                check_memory((dy, weight, x, h, *routing, *parts))
            dy, x = cast(Tensor, _rows(dy)), _rows(x)
        if plain and h is not None:
            h = None if keeps_x else _kept_ranks(spec, h, A, routing, math.prod(dy.shape[:-1]))
        dx, dg, dA, dB = run(
            dy, weight, x, h, A, B, *_op_routing(spec, routing), need_dx, need_dg,
            need_A, need_B,
        )  # fmt: skip
        if need_dx:
            dx = dx if dx.dim() == len(x_shape) else dx.reshape(x_shape)
            dx = dx if dx.dtype is x_dtype else dx.to(x_dtype)
            dx = dx if dplace is None else dx + dplace
        return (
            None, dx if need_dx else None, None, None, dbase,
            dg.reshape(gates.shape) if need_dg else None, None, None, None, None,
            *_needed(dA, need_A), *_needed(dB, need_B),
        )  # fmt: skip


def _needed(grads: Sequence[Tensor | None], need: list[bool]) -> Sequence[Tensor | None]:
    """None in place of what was not asked for."""
    if False not in need:
        return grads
    return [grad if wanted else None for grad, wanted in zip(grads, need, strict=True)]


# What `Function.apply` comes down to where no tensor is or was one of torch.func's, without its
# Python loop over the arguments: 3 us of a small step's 80.
_apply_eagerly: Callable[..., Any] = super(torch.autograd.Function, _GatedLora).apply  # type: ignore[misc]


def _apply(x: Tensor) -> Callable[..., Any]:
    if torch.compiler.is_compiling() or is_functorch_wrapped_tensor(x):
        return _GatedLora.apply
    return _apply_eagerly


def _kept_ranks(spec: _Spec, h: Tensor, A: Sequence[Tensor], routing: _Routing, m: int) -> Tensor:
    _, expert_idxs, offsets, experts, _ = routing
    with torch.no_grad():
        return higher_order.kept_ranks(
            _op(spec, "backward"), h, m, A, _rows(expert_idxs), offsets, experts
        )


def _parts_with_rows(parts: Sequence[Tensor], segments: Segments | None) -> list[bool]:
    """For each part whether any row may use one of its experts."""
    if segments is None or segments.used is None:
        return [True] * len(parts)
    found, begin = [], 0
    for size in counts(parts):
        found.append(not segments.used.isdisjoint(range(begin, begin + size)))
        begin += size
    return found


def _cast(
    x: Tensor, weight: Tensor | Callable[[Tensor], Tensor], bias: Tensor | None
) -> tuple[Tensor, Tensor | Callable[[Tensor], Tensor], Tensor | None]:
    """x, weight and bias as autocast would give them to a linear layer.

    A callable base runs here, under autocast, on the x it was given; its result stands in for it.
    """
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype == torch.float64:  # autocast leaves it alone
        dtype = x.dtype

    def as_layers_do(t: Any) -> Any:  # the checks say what others must be
        return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

    if isinstance(weight, Tensor):
        return x.to(dtype), as_layers_do(weight), as_layers_do(bias)
    result = weight(x)
    return x.to(dtype), lambda _: result, bias
