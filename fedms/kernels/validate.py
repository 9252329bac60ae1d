"""Argument checks of the op: every error names the argument, what it must be and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from fedms.kernels.segments import Segments

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_x(x: Tensor) -> None:
    """x [..., K] of 16, 32 or 64 bit floats."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS or x.layout is not torch.strided or x.dim() == 0:
        raise ValueError(
            "x must be floating point of 16, 32 or 64 bits with shape [..., K], and strided, got "
            f"{_seen(x)}"
        )


def check_base(x: Tensor, weight: Tensor | Callable, bias: Tensor | None) -> None:
    """weight [N, K] or a callable, bias [N] beside a weight only."""
    if not isinstance(weight, Tensor):
        if not callable(weight):
            raise TypeError(f"weight must be a Tensor or a callable, got {type(weight).__name__}")
        if bias is not None:
            raise ValueError("bias must be None beside a callable base, got a Tensor")
        return
    shape = weight.shape
    if len(shape) != 2 or shape[1] != x.shape[-1] or weight.layout is not torch.strided:
        raise ValueError(
            f"weight must be [N, K] with K = {x.shape[-1]}, strided, got {_seen(weight)}"
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must have x's dtype and device ({x.dtype}, {x.device}), got {_seen(weight)}"
        )
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a Tensor, got {type(bias).__name__}")
    if bias.shape != shape[:1] or bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(f"bias must be [{shape[0]}] {x.dtype} on {x.device}, got {_seen(bias)}")


def check_base_result(x: Tensor, base: Any) -> None:
    """weight(x), floating [..., N] with x's leading dims."""
    if not isinstance(base, Tensor):
        raise TypeError(f"weight(x) must be a Tensor, got {type(base).__name__}")
    if base.shape[:-1] != x.shape[:-1] or base.dtype not in _FLOATS or base.dim() == 0:
        raise ValueError(
            f"weight(x) must be floating point with shape [..., N] and leading dims "
            f"{list(x.shape[:-1])}, got {_seen(base)}"
        )


def check_experts(
    x: Tensor, n: int, lora_A: Sequence[Tensor] | Tensor, lora_B: Sequence[Tensor] | Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[int]]:
    """lora_A [r_e, K] and lora_B [N, r_e], or stacks of them, one floating dtype, x's device.

    n: the base's width. Returns both as tuples of parts (fedms.kernels.experts) and r_e of every
    expert.
    """
    if isinstance(lora_A, Tensor) and isinstance(lora_B, Tensor):
        lora_A, lora_B = (lora_A,), (lora_B,)
        if lora_A[0].dim() != 3 or lora_B[0].dim() != 3:
            raise ValueError(
                "lora_A and lora_B must be sequences of Tensors, or stacks [S, r, K] and "
                f"[S, N, r], got {_seen(lora_A[0])} and {_seen(lora_B[0])}"
            )
    elif isinstance(lora_A, Tensor) or isinstance(lora_B, Tensor):
        raise TypeError(
            "lora_A and lora_B must both be sequences or both be stacks, got "
            f"{type(lora_A).__name__} and {type(lora_B).__name__}"
        )
    try:
        # once: a sequence may make its items anew, and kernels read the addresses of those here
        lora_A, lora_B = tuple(lora_A), tuple(lora_B)
    except TypeError:
        raise TypeError(
            "lora_A and lora_B must be sequences of Tensors, got "
            f"{type(lora_A).__name__} and {type(lora_B).__name__}"
        ) from None
    if len(lora_A) != len(lora_B):
        raise ValueError(
            f"lora_B must have one entry for each of lora_A ({len(lora_A)}), got {len(lora_B)}"
        )
    ranks: list[int] = []
    k, dtype, device = x.shape[-1], None, x.device
    for e, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            raise TypeError(
                f"lora_A[{e}] and lora_B[{e}] must be Tensors, got {type(a).__name__} and "
                f"{type(b).__name__}"
            )
        if dtype is None:
            dtype = a.dtype
            if dtype not in _FLOATS:
                raise ValueError(
                    f"lora_A[0] must have a floating dtype of 16, 32 or 64 bits, got {_seen(a)}"
                )
        shape = a.shape
        expected: tuple[int, ...] = ()
        if len(shape) == 2:
            expected = (n, shape[0])
            ranks.append(shape[0])
        elif len(shape) == 3 and shape[0]:
            expected = (shape[0], n, shape[1])
            ranks += [shape[1]] * shape[0]
        if not expected or shape[-1] != k:
            raise ValueError(
                f"lora_A[{e}] must be [r, K], or a stack [S, r, K], S at least 1, with K = {k}, "
                f"got {_seen(a)}"
            )
        if b.shape != expected:
            raise ValueError(
                f"lora_B[{e}] must be [N, r] = {list(expected)} as lora_A[{e}] is "
                f"{list(shape)}, got {_seen(b)}"
            )
        if a.dtype is not dtype or b.dtype is not dtype:
            raise ValueError(
                f"lora_A[{e}] and lora_B[{e}] must have lora_A[0]'s dtype ({dtype}), got "
                f"{a.dtype} and {b.dtype}"
            )
        if a.device != device or b.device != device:
            raise ValueError(
                f"lora_A[{e}] and lora_B[{e}] must be on x's device {device}, got {a.device} and "
                f"{b.device}"
            )
    return lora_A, lora_B, ranks


def check_scaling(scaling: float | Sequence[float] | Tensor | None, e: int) -> list[float]:
    """The scale of each expert as floats; None means ones."""
    if scaling is None:
        return [1.0] * e
    if isinstance(scaling, (int, float)):
        return [float(scaling)] * e
    if isinstance(scaling, Tensor):
        if scaling.requires_grad:
            raise ValueError(
                "scaling must not require a gradient, it would get none: gates are differentiable"
            )
        scaling = scaling.expand(e).tolist() if scaling.dim() == 0 else scaling.tolist()
    try:
        values = list(map(float, scaling))
    except (TypeError, ValueError):
        if isinstance(scaling, Real):  # numpy's
            return [float(scaling)] * e
        raise TypeError(f"scaling must be a number or one an expert, got {scaling!r}") from None
    if len(values) != e:
        raise ValueError(f"scaling must have one entry an expert ({e}), got {len(values)}")
    return values


def check_routing(
    x: Tensor,
    e: int,
    gates: Tensor | None,
    expert_idxs: Tensor | None,
    segments: Segments | None,
) -> None:
    """gates [E], [..., E] or [..., k] beside expert_idxs [..., k]; segments that cover the rows."""
    lead = tuple(x.shape[:-1])
    if segments is not None and not isinstance(segments, Segments):
        raise TypeError(f"segments must be Segments, got {type(segments).__name__}")
    if expert_idxs is not None:
        if segments is not None:
            raise ValueError("segments must be None beside expert_idxs: both say the routing")
        if not isinstance(expert_idxs, Tensor) or expert_idxs.dtype != torch.int64:
            raise TypeError(
                "expert_idxs must be an int64 Tensor, got "
                f"{getattr(expert_idxs, 'dtype', type(expert_idxs))}"
            )
        shape = tuple(expert_idxs.shape)
        if expert_idxs.device != x.device or not shape or shape[:-1] != lead:
            raise ValueError(
                f"expert_idxs must be [..., k] with leading dims {lead} on {x.device}, "
                f"got {_seen(expert_idxs)}"
            )
        # Reading device values would wait for the device; there the kernel's own bounds must do.
        readable = expert_idxs.device.type == "cpu" and not is_batchedtensor(expert_idxs)
        if readable and expert_idxs.numel() and not _compiling():
            low, high = (int(v) for v in expert_idxs.aminmax())
            if low < 0 or high >= e:
                raise ValueError(f"expert_idxs must be in [0, {e}), got values {low} to {high}")
    if gates is not None:
        if not isinstance(gates, Tensor) or not gates.is_floating_point():
            raise TypeError(
                f"gates must be a floating point Tensor, got {getattr(gates, 'dtype', type(gates))}"
            )
        if expert_idxs is not None:
            if gates.shape != expert_idxs.shape:
                raise ValueError(
                    f"gates must have the shape of expert_idxs {tuple(expert_idxs.shape)}, "
                    f"got {_seen(gates)}"
                )
        elif tuple(gates.shape) not in ((e,), (*lead, e)):
            raise ValueError(f"gates must be [{e}] or {[*lead, e]}, got {_seen(gates)}")
        if gates.device != x.device:
            raise ValueError(f"gates must be on x's device {x.device}, got {gates.device}")
    if segments is not None:
        rows = math.prod(lead)
        if segments.used is None:
            for name, t in zip(("offsets", "experts"), segments.tensors, strict=True):
                if t.device.type != "cpu" and t.device != x.device:
                    raise ValueError(
                        f"segments.{name} must be on the CPU or on x's device {x.device}, got "
                        f"{t.device}"
                    )
            return  # what only the values say is checked where they are read
        if segments.offsets[-1] != rows:
            raise ValueError(
                f"segments.offsets must cover the {rows} rows of x, the last one is "
                f"{segments.offsets[-1]}"
            )
        if max(segments.used, default=-1) >= e:
            for i, ids in enumerate(segments.experts):
                if isinstance(ids, tuple) and ids and max(ids) >= e:
                    raise ValueError(f"segments.experts[{i}] must be in [0, {e}), got {ids}")


def check_dropout(
    x: Tensor, p: float, seed: int | Tensor | None, segments: Segments | None
) -> None:
    """p in [0, 1); seed a number, or int64 [], or with segments one each, on x's device."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    if isinstance(seed, Tensor):
        own = None if segments is None else segments.tensors[1].shape[:1]
        if seed.dtype != torch.int64 or seed.device != x.device or seed.shape not in ((), own):
            expected = "[]" if own is None else f"[] or one a segment {list(own)}"
            raise ValueError(f"seed must be int64 {expected} on {x.device}, got {_seen(seed)}")
    elif seed is not None:
        if not hasattr(seed, "__index__"):
            raise TypeError(f"seed must be an integer or an int64 Tensor, got {seed!r}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {seed}")


def _compiling() -> bool:
    return torch.compiler.is_compiling()


def _seen(t: Tensor) -> str:
    layout = "" if t.layout is torch.strided else f" {t.layout}"
    return f"{list(t.shape)} {t.dtype}{layout} on {t.device}"
