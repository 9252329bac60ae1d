"""The C++ backend on CPU tensors, fp32 and bf16: one pass over the rows beside torch's base GEMM.

Shape suffixes: M rows, K in, N out, R the sum of the experts' ranks, E experts, k experts a token.

Forward beside the base GEMM: x is read once, y read and written once, h [M, R] kept in fp32.
Backward beside `dx = dy W`: dy and x are read once, dx read and written once. They are in csrc/cpu;
they take addresses, so the checks are all on this side. x, the base result and dy share one dtype
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
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.kernels.experts import counts, expert_ranks
from fedms.kernels.ops import define_backend
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
_threaded = False
if _C is not None:
    _address = _torch_parallel_for()
    _threaded = _address != 0
    _C.set_parallel_for(_address)


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
        threads = "torch's pool" if _threaded else "serial: torch exports no torch_parallel_for"
        cpu = {"cpu": "loaded", "compiler": _C.compiler(), "isa": _C.isa(), "threads": threads}
    return {**cpu, "cuda": _cuda_state()}


def _cuda_state() -> str:
    module, why_not = _load("fedms.kernels._C_cuda")
    if module is None:
        return f"not built ({why_not})"
    return module.state()


def _widths(
    A: Sequence[Tensor], expert_idxs: Tensor | None, experts: Tensor | None
) -> tuple[list[int], int]:
    """Offsets [E + 1] of the experts' ranks in 0..R, and the width of a row of h."""
    by_expert = expert_ranks(A)
    ranks = [0, *accumulate(by_expert)]
    if expert_idxs is None:
        return ranks, row_width(by_expert, experts)
    return ranks, expert_idxs.shape[1] * max(by_expert)


def _h_like(
    x: Tensor, A: Sequence[Tensor], expert_idxs: Tensor | None, experts: Tensor | None
) -> tuple[int, torch.dtype]:
    return _widths(A, expert_idxs, experts)[1], torch.float32


def _base_last(rows: Tensor, weight: Tensor | None) -> bool:
    """True when the kernels had better write y (or dx) and the base GEMM add to it.

    Writing is a third less traffic than adding, and a GEMM that adds saves MKL a pass over its
    result. It needs the GEMM's type to be the kernels', for one rounding, and two more calls into
    torch, which tiny layers do not earn back.
    """
    if weight is None or rows.dtype != torch.float32:
        return False
    return rows.shape[0] * max(weight.shape) >= _MIN_ELEMENTS_BASE_LAST


def _few_rows(x: Tensor, weight: Tensor | None) -> bool:
    """True when a dense forward without gradients had better read a wide weight in the kernels."""
    return (
        weight is not None
        and x.shape[0] <= _FEW_ROWS
        and weight.numel() >= _MIN_WEIGHTS_OF_FEW_ROWS
        and weight.is_contiguous()
    )


def _small_base(dy: Tensor, weight: Tensor | None) -> bool:
    """True when the kernels had better compute the whole dx of a dense call: a small one."""
    if weight is None or not weight.is_contiguous():
        return False
    return dy.shape[0] * weight.numel() <= _MAX_SMALL_BASE


def _is_zero(B: Sequence[Tensor], scale: Sequence[float]) -> bool:
    """True when the mixture is zero whatever x is: as before training, or with scales of 0."""
    return not any(scale) or not any(b.any() for b in B)


def _better_in_fp32(x: Tensor) -> bool:
    """True for bf16 where torch has only slow bf16 GEMMs and the rows pay for casting the weight.

    The whole layer then runs in fp32 and rounds once at the end.
    """
    return x.dtype == torch.bfloat16 and not _FAST_BF16 and x.shape[0] >= _MIN_ROWS_IN_FP32


def _shared(
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    gates: Tensor | None,
    expert_idxs: Tensor | None,
    offsets: Tensor | None,
    experts: Tensor | None,
    scale: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    x: Tensor | None,
    h: Tensor | None,
    ranks: list[int],
    h_width: int,
) -> tuple:
    """What both directions pass, in the binding's order. The caller keeps the tensors alive."""
    row = column = 0
    if gates is not None:
        column = gates.stride(-1)
        row = gates.stride(0) if gates.dim() == 2 else 0
    return (
        m, k, n, dtype == torch.bfloat16, A[0].dtype == torch.bfloat16,
        _addresses(A, A, ranks), _addresses(B, B, ranks), ranks, scale,
        0 if gates is None else gates.data_ptr(), row, column,
        0 if expert_idxs is None else expert_idxs.data_ptr(),
        0 if expert_idxs is None else expert_idxs.shape[1],
        *((0, 0, -1, 0) if offsets is None or experts is None else
          (offsets.data_ptr(), experts.data_ptr(), *experts.shape)),
        dropout_p, 0 if seed is None else seed.data_ptr(), seed is not None and seed.dim() == 1,
        0 if x is None else x.data_ptr(), 0 if h is None else h.data_ptr(), h_width,
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None,
    A: Sequence[Tensor], B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, save_h: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y, and h where it is to be saved; arguments as in fedms.kernels.ops."""
    ranks, width = _widths(A, expert_idxs, experts)
    writes_all = width > 0 and expert_idxs is None and experts is None
    if base is None and writes_all and not save_h and dropout_p == 0.0 and _few_rows(x, weight):
        y = _forward_few(x, weight, bias, A, B, gates, scale, ranks)  # type: ignore[arg-type]
        if y is not None:
            return y, None
    if weight is not None and _better_in_fp32(x) and not _is_zero(B, scale):
        y, h = forward(
            x.float(), weight.float(), None if bias is None else bias.float(), None, A, B, gates,
            expert_idxs, offsets, experts, scale, dropout_p, seed, save_h,
        )  # fmt: skip
        return y.to(x.dtype), h
    m, k = x.shape
    base_last = base is None and writes_all and _base_last(x, weight)
    x = x.contiguous()
    A, B = [a.contiguous() for a in A], [b.contiguous() for b in B]
    gates = None if gates is None else gates.to(torch.float32)
    expert_idxs = None if expert_idxs is None else expert_idxs.contiguous()
    if base_last:
        y_from = None if bias is None else bias.contiguous()
        y_MN = torch.empty((m, B[0].shape[-2]), dtype=x.dtype)
    elif base is not None and writes_all:
        y_from = base.contiguous()
        y_MN = torch.empty_like(y_from)
    elif base is not None:
        y_from = y_MN = base.clone(memory_format=torch.contiguous_format)
    else:
        assert weight is not None
        y_from = y_MN = F.linear(x, weight, bias)
    n = y_MN.shape[1]
    h = torch.empty((m, width), dtype=torch.float32) if save_h else None
    shared = _shared(m, k, n, x.dtype, A, B, gates, expert_idxs, offsets, experts, scale,
                     dropout_p, seed, x, h, ranks, width)  # fmt: skip
    _C.forward(  # type: ignore[union-attr]
        torch.get_num_threads(),
        y_MN.data_ptr(),
        0 if y_from is None else y_from.data_ptr(),
        0 if base_last else n,  # a bias is one row for all
        *shared,
    )
    if base_last:
        y_MN.addmm_(x, weight.t())  # type: ignore[union-attr]
    return y_MN, h


def _forward_few(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Sequence[Tensor], B: Sequence[Tensor],
    gates: Tensor | None, scale: Sequence[float], ranks: list[int],
) -> Tensor | None:  # fmt: skip
    """y with the frozen layer computed by the kernels; None where the mixture is zero."""
    (m, k), n = x.shape, weight.shape[0]
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    A, B = [a.contiguous() for a in A], [b.contiguous() for b in B]
    gates = None if gates is None else gates.to(torch.float32)
    y = torch.empty((m, n), dtype=x.dtype)
    shared = _shared(m, k, n, x.dtype, A, B, gates, None, None, None, scale, 0.0, None, x, None,
                     ranks, ranks[-1])  # fmt: skip
    is_zero = _C.forward_few(  # type: ignore[union-attr]
        torch.get_num_threads(),
        y.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        *shared,
    )
    return None if is_zero else y


def backward(
    dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, A: Sequence[Tensor],
    B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, need_dx: bool, need_dg: bool, need_dA: Sequence[bool],
    need_dB: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """dx, dg, dA and dB, None where not needed; arguments as in fedms.kernels.ops."""
    if weight is not None and need_dx and _better_in_fp32(dy):
        dx, dg, dA, dB = backward(
            dy.float(), weight.float(), None if x is None else x.float(), h, A, B, gates,
            expert_idxs, offsets, experts, scale, dropout_p, seed, need_dx, need_dg, need_dA,
            need_dB,
        )  # fmt: skip
        assert dx is not None
        return dx.to(dy.dtype), dg, dA, dB
    (m, n), k = dy.shape, A[0].shape[-1]
    dy = dy.contiguous()
    ranks, width = _widths(A, expert_idxs, experts)
    dense = width > 0 and expert_idxs is None and experts is None
    writes_all = dense and dropout_p == 0.0
    small = need_dx and dense and _small_base(dy, weight)
    base_last = need_dx and writes_all and not small and _base_last(dy, weight)
    dx_add = not (base_last or (weight is None and writes_all))
    dx_MK = None
    if need_dx and (small or not dx_add):
        dx_MK = torch.empty((m, k), dtype=dy.dtype)
    elif need_dx:
        dx_MK = dy.new_zeros((m, k)) if weight is None else dy.mm(weight)
    x = None if x is None else x.contiguous()
    A, B = [a.contiguous() for a in A], [b.contiguous() for b in B]
    dA, dB = _outputs(A, need_dA), _outputs(B, need_dB)
    gates32 = None if gates is None else gates.to(torch.float32)
    expert_idxs = None if expert_idxs is None else expert_idxs.contiguous()
    columns = len(ranks) - 1 if expert_idxs is None else expert_idxs.shape[1]
    dg = torch.zeros((m, columns), dtype=torch.float32) if need_dg else None
    shared = _shared(m, k, n, dy.dtype, A, B, gates32, expert_idxs, offsets, experts, scale,
                     dropout_p, seed, x, h, ranks, width)  # fmt: skip
    _C.backward(  # type: ignore[union-attr]
        torch.get_num_threads(),
        dy.data_ptr(),
        0 if dx_MK is None else dx_MK.data_ptr(),
        dx_add,
        weight.data_ptr() if small else 0,  # type: ignore[union-attr]
        0 if dg is None else dg.data_ptr(),
        _addresses(dA, A, ranks),
        _addresses(dB, B, ranks),
        *shared,
    )
    if base_last:
        dx_MK.addmm_(dy, weight)  # type: ignore[union-attr]
    if dg is not None and gates is not None:
        dg = (dg.sum(0) if gates.dim() == 1 else dg).to(gates.dtype)
    return dx_MK, dg, dA, dB


def _addresses(
    parts: Sequence[Tensor | None], like: Sequence[Tensor], ranks: Sequence[int]
) -> list[int]:
    """Where each expert's matrix begins; 0 for those of a part that is None. Parts: contiguous."""
    if len(ranks) == len(parts) + 1:  # one expert a part
        return [0 if part is None else part.data_ptr() for part in parts]
    found: list[int] = []
    for part, size in zip(parts, counts(like), strict=True):
        if part is None:
            found += [0] * size
        elif part.dim() == 2:
            found.append(part.data_ptr())
        else:
            begin, step = part.data_ptr(), part.stride(0) * part.element_size()
            found += [begin + i * step for i in range(size)]
    return found


def _outputs(like: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    return [torch.empty_like(t) if want else None for t, want in zip(like, need, strict=True)]


def _forward_op(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y, h = forward(x, *args)
    return y, x.new_empty(0, dtype=torch.float32) if h is None else h


def _backward_op(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    dx, dg, dA, dB = backward(dy, *args)

    def filled(t: Tensor | None, dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype) if t is None else t

    adapter = args[3][0].dtype
    return (
        filled(dx, dy.dtype),
        filled(dg, dy.dtype),
        [filled(g, adapter) for g in dA],
        [filled(g, adapter) for g in dB],
    )


define_backend("native", _forward_op, _backward_op, dispatch_key="CPU", h_like=_h_like)
