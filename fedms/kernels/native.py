"""The C++ backend on CPU tensors, fp32 and bf16: one pass over the rows beside torch's base GEMM.

Shape suffixes: M rows, K in, N out, R the sum of the experts' ranks, E experts, k experts a token.

Forward beside the base GEMM: x is read once, y read and written once, h [M, R] kept in fp32.
Backward beside `dx = dy W`: dy and x are read once, dx read and written once. They are in csrc/cpu;
the checks are all on this side. x, the base result and dy share one dtype
(fp32 or bf16), the adapters are fp32 or bf16, products and sums are fp32 with one rounding.

Where the mixture is zero (B = 0, scale 0), y is the base's own result to the bit. Elsewhere too y
is torch's product plus the mixture, but for two cases in which the kernels' product pays: decoding
(`_few_rows`) and bf16 on a CPU without bf16 instructions (`_better_in_fp32`). Both look whether the
mixture is zero, and leave such a call to torch's product.

The extension is optional at import: without it `available()` is False and naming this backend is an
error.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.kernels.experts import counts, expert_ranks
from fedms.kernels.ops import define_backend
from fedms.kernels.packing import check_memory, rows_are_matrix
from fedms.kernels.segments import row_width

_DTYPES = (torch.float32, torch.bfloat16)
# oneDNN multiplies bf16 at full speed with these. With AVX-512 alone it takes about twice as long
# as fp32 does, and without it torch's own loops take 10 (forward) to 100 times (backward) as long:
# from so many rows on, casting the weight to fp32 costs less than it saves.
_FAST_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
_MIN_ROWS_IN_FP32 = 64 if torch.cpu._is_avx512_supported() else 4
_MIN_ELEMENTS_BASE_LAST = 1 << 15
# A GEMM of so few rows (decoding) is a matter of reading the weight once, for which MKL takes up to
# four times as long; below so many weights there is nothing to gain.
_FEW_ROWS = 16
_MIN_WEIGHTS_OF_FEW_ROWS = 1 << 16
# A GEMM of up to so many multiply-adds takes less time than torch's way to it.
_MAX_SMALL_BASE = 1 << 15


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module, or None and why not."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, str(error)


def _torch_parallel_for() -> int:
    """Address of torch's own parallel_for, 0 when this torch does not export it."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    try:
        symbol = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(symbol, ctypes.c_void_p).value or 0


_C, _why_not = _load("fedms.kernels._C")
_parallel_for = 0
if _C is not None:
    _parallel_for = _torch_parallel_for()
    _C.set_torch(torch.Tensor.__dlpack_c_exchange_api__, _parallel_for)


def available() -> bool:
    """True when the compiled extension could be loaded."""
    return _C is not None


def supports(x: torch.dtype, adapter: torch.dtype, base: torch.dtype) -> bool:
    """True when there are kernels for x, adapters and base result of these dtypes."""
    return x in _DTYPES and adapter in _DTYPES and base == x


def require(device: torch.device, x: torch.dtype, adapter: torch.dtype, base: torch.dtype) -> None:
    """Raise RuntimeError (no extension) or ValueError (this call) unless the backend can run."""
    if _C is None:
        raise RuntimeError(
            "backend='native' needs the compiled extension fedms.kernels._C, which could not be "
            f"loaded: {_why_not}"
        )
    if device.type != "cpu" or not supports(x, adapter, base):
        raise ValueError(
            f"backend='native' must have CPU tensors, x and base result both float32 or both "
            f"bfloat16 and adapters in either, got x {x} on {device}, base {base}, "
            f"adapters {adapter}"
        )


def build_info() -> dict[str, str]:
    """What `fedms doctor` prints about the CPU and CUDA extensions."""
    if _C is None:
        cpu = {"cpu": f"not loaded ({_why_not})"}
    else:
        threads = "torch's pool" if _parallel_for else "serial: torch exports no torch_parallel_for"
        cpu = {"cpu": "loaded", "compiler": _C.compiler(), "isa": _C.isa(), "threads": threads}
    return {**cpu, "cuda": _cuda_state()}


def _cuda_state() -> str:
    module, why_not = _load("fedms.kernels._C_cuda")
    if module is None:
        return f"not built ({why_not})"
    return module.state()


def _h_width(A: Sequence[Tensor], expert_idxs: Tensor | None, experts: Tensor | None) -> int:
    """The width of a row of h."""
    if expert_idxs is None and experts is None:
        return sum([a.shape[-2] * (a.shape[0] if a.dim() == 3 else 1) for a in A])
    by_expert = expert_ranks(A)
    if expert_idxs is None:
        return row_width(by_expert, experts)
    return expert_idxs.shape[1] * max(by_expert)


def _h_like(
    x: Tensor, A: Sequence[Tensor], expert_idxs: Tensor | None, experts: Tensor | None
) -> tuple[int, torch.dtype]:
    return _h_width(A, expert_idxs, experts), torch.float32


def _base_last(rows: Tensor, weight: Tensor | None) -> bool:
    """True when the kernels had better write y (or dx) and the base GEMM add to it.

    Writing is a third less traffic than adding, and a GEMM that adds saves MKL a pass over its
    result. It needs the GEMM's type to be the kernels', for one rounding, and two more calls into
    torch, which tiny layers do not earn back.
    """
    if weight is None or rows.dtype != torch.float32:
        return False
    return _count(rows) * max(weight.shape) >= _MIN_ELEMENTS_BASE_LAST


def _count(rows: Tensor) -> int:
    """M of rows [..., C], C at least 1."""
    return rows.numel() // rows.shape[-1]


def _few_rows(x: Tensor, weight: Tensor | None) -> bool:
    """True when a dense forward without gradients had better read a wide weight in the kernels."""
    return (
        weight is not None
        and _count(x) <= _FEW_ROWS
        and weight.numel() >= _MIN_WEIGHTS_OF_FEW_ROWS
        and weight.is_contiguous()
    )


def _small_base(dy: Tensor, weight: Tensor | None) -> bool:
    """True when the kernels had better compute the whole dx of a dense call: a small one."""
    if weight is None or not weight.is_contiguous():
        return False
    return _count(dy) * weight.numel() <= _MAX_SMALL_BASE


def _is_zero(B: Sequence[Tensor], experts: Tensor | None, scale: Sequence[float]) -> bool:
    """True when the mixture is zero whatever x is: as before training, with scales of 0, or where
    no segment has experts.
    """
    if not any(scale) or (experts is not None and not experts.shape[1]):
        return True
    check_memory(B)
    return not any(b.any() for b in B)


def _better_in_fp32(x: Tensor) -> bool:
    """True for bf16 where torch has only slow bf16 GEMMs and the rows pay for casting the weight.

    The whole layer then runs in fp32 and rounds once at the end.
    """
    return x.dtype == torch.bfloat16 and not _FAST_BF16 and _count(x) >= _MIN_ROWS_IN_FP32


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None,
    A: Sequence[Tensor], B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, save_h: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y [..., N], and h [M, R] where it is to be saved; arguments as in fedms.kernels.ops.

    x and base may have any leading dims; gates and expert_idxs have M rows.
    """
    dense = expert_idxs is None and experts is None
    if gates is not None and gates.dtype is not torch.float32:
        gates = gates.float()
    if weight is not None:
        if dense and not save_h and dropout_p == 0.0 and _few_rows(x, weight):
            y = x.new_empty((*x.shape[:-1], weight.shape[0]))
            threads = torch.get_num_threads()
            if not _C.forward_few(threads, y, weight, bias, x, A, B, gates, scale):  # type: ignore[union-attr]
                return y, None
        if _better_in_fp32(x) and not _is_zero(B, experts, scale):
            y, h = forward(
                x.float(), weight.float(), None if bias is None else bias.float(), None, A, B,
                gates, expert_idxs, offsets, experts, scale, dropout_p, seed, save_h,
            )  # fmt: skip
            return y.to(x.dtype), h
        if not rows_are_matrix(x):
            base = F.linear(x, weight, bias)
    base_last = dense and base is None and _base_last(x, weight)
    if base_last:
        y_from, y = bias, x.new_empty((*x.shape[:-1], weight.shape[0]))  # type: ignore[union-attr]
    elif base is None:
        y_from = y = _linear(x, weight, bias)  # type: ignore[arg-type]
    else:  # only read: it may be the caller's to keep
        y_from, y = base, torch.empty_like(base, memory_format=torch.contiguous_format)
    h = None
    if save_h:
        h = x.new_empty((_count(x), _h_width(A, expert_idxs, experts)), dtype=torch.float32)
    _C.forward(  # type: ignore[union-attr]
        torch.get_num_threads(), y, y_from, x, A, B, gates, expert_idxs, offsets, experts, scale,
        dropout_p, seed, h,
    )  # fmt: skip
    if base_last:
        _matrix(y).addmm_(_matrix(x), weight.t())  # type: ignore[union-attr]
    return y, h


def backward(
    dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, A: Sequence[Tensor],
    B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, need_dx: bool, need_dg: bool, need_dA: Sequence[bool],
    need_dB: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """dx [..., K], dg, dA and dB, None where not needed; arguments as in fedms.kernels.ops.

    dy and x may have any leading dims.
    """
    if weight is not None and need_dx and _better_in_fp32(dy):
        dx, dg, dA, dB = backward(
            dy.float(), weight.float(), None if x is None else x.float(), h, A, B, gates,
            expert_idxs, offsets, experts, scale, dropout_p, seed, need_dx, need_dg, need_dA,
            need_dB,
        )  # fmt: skip
        assert dx is not None
        return dx.to(dy.dtype), dg, dA, dB
    dense = expert_idxs is None and experts is None
    writes_all = dense and dropout_p == 0.0
    dx = None
    small = base_last = dx_add = False
    if need_dx:
        small = dense and _small_base(dy, weight)
        base_last = writes_all and not small and _base_last(dy, weight)
        dx_add = not (base_last or (weight is None and writes_all))
        if small or not dx_add:
            dx = dy.new_empty((*dy.shape[:-1], A[0].shape[-1]))
        elif weight is None:
            dx = dy.new_zeros((*dy.shape[:-1], A[0].shape[-1]))
        else:
            dx = dy.matmul(weight)
    dg = None
    if need_dg:
        columns = sum(counts(A)) if expert_idxs is None else expert_idxs.shape[1]
        dg = dy.new_zeros((_count(dy), columns), dtype=torch.float32)
    dA, dB = _outputs(A, need_dA), _outputs(B, need_dB)
    gates32 = gates if gates is None or gates.dtype is torch.float32 else gates.float()
    _C.backward(  # type: ignore[union-attr]
        torch.get_num_threads(), dy, dx, dx_add, weight if small else None, dg, dA, dB, x, A, B,
        gates32, expert_idxs, offsets, experts, scale, dropout_p, seed, h,
    )  # fmt: skip
    if base_last:
        _matrix(dx).addmm_(_matrix(dy), weight)  # type: ignore[arg-type]
    if dg is not None and gates is not None:
        dg = (dg.sum(0) if gates.dim() == 1 else dg).to(gates.dtype)
    return dx, dg, dA, dB


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, but no view: the result of a custom function that is one cannot be changed."""
    y = F.linear(_matrix(x), weight, bias)
    return (
        y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]])
    )


def _matrix(rows: Tensor) -> Tensor:
    return rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])


def _outputs(like: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    """A gradient for each part where one is needed; contiguous, whatever the part is."""
    return [t.new_empty(t.shape) if want else None for t, want in zip(like, need, strict=True)]


define_backend("native", forward, backward, dispatch_key="CPU", h_like=_h_like)
