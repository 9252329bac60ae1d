"""The CUDA backend: base GEMM and dy W by torch (cuBLAS), the mixture by csrc/cuda's kernels.

Nothing here has run on a GPU yet: the kernels pass their tests compiled for a CPU, thread by
thread, and compile for sm_80 to sm_100. So no plan chooses this backend; name it to use it.

Shape suffixes: M rows, K in, N out, R the sum of the experts' ranks, E experts, k experts a token,
r the width of a row of h (R; with segments the most that a row uses; k * max r_e with expert_idxs).

    forward    shrink   h = drop(x) Aᵀ       [M, r] fp32     x and A read
               expand   y = (coef * h) Bᵀ    [M, N]          B read, y written
    backward   shrink   u = dy B             [M, r] fp32
               combine  dg, and u of a split shrink
               expand   dx = undrop((coef * u) A)
               outer    dA = (coef * u)ᵀ drop(x), dB = dyᵀ (coef * h)    trainable experts only

The base GEMM comes last and adds to what expand wrote (beta = 1); a callable base's result is read
by expand. With segments the base comes first, as expand does not write rows without experts.

x, base result and dy share one dtype, fp32, bf16 or fp16; adapters and gates have any of these;
products and sums are fp32. No atomics: two runs are bit-equal. Launches go to the current stream,
wait for nothing, and can be captured into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedms.kernels.cuda_tables import routes_of
from fedms.kernels.experts import expert_ranks, takes_stacks
from fedms.kernels.ops import define_backend
from fedms.kernels.segments import read_runs, row_width
from fedms.kernels.tables import STORE

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cuda/problem.cuh's DType
_TILE_ROWS = 32
_STRIP_BYTES = 512  # of a row of x or dy that a warp reads at once
_MAX_SPLITS = 32


class _Runtime(NamedTuple):
    """The compiled module and what is asked of the device; tests put a CPU build here."""

    module: Any
    stream: Callable[[torch.device], int]
    capturing: Callable[[], bool]
    multiprocessors: Callable[[torch.device], int]


@cache
def _load() -> tuple[_Runtime | None, str]:
    """The runtime, or None and why not. Loading the module touches no driver."""
    try:
        module = import_module("fedms.kernels._C_cuda")
    except ImportError as error:
        return None, str(error)
    return _Runtime(
        module,
        lambda device: torch.cuda.current_stream(device).cuda_stream,
        torch.cuda.is_current_stream_capturing,
        lambda device: torch.cuda.get_device_properties(device).multi_processor_count,
    ), ""


def available() -> bool:
    """True when the compiled module can be loaded; whether a GPU runs it is torch's to say."""
    return _load()[0] is not None


def supports(x: torch.dtype, adapter: torch.dtype, base: torch.dtype) -> bool:
    """True when there are kernels for x, adapters and base result of these dtypes."""
    return x in _DTYPES and adapter in _DTYPES and base == x


def require(device: torch.device, x: torch.dtype, adapter: torch.dtype, base: torch.dtype) -> None:
    """Raise RuntimeError (no module) or ValueError (this call) unless the backend can run."""
    _runtime()
    if device.type != "cuda" or not supports(x, adapter, base):
        raise ValueError(
            f"backend='cuda' must have CUDA tensors, x and base result of one dtype and adapters "
            f"of any out of float32, bfloat16 and float16, got x {x} on {device}, base {base}, "
            f"adapters {adapter}"
        )


def _runtime() -> _Runtime:
    runtime, why_not = _load()
    if runtime is None:
        raise RuntimeError(
            "backend='cuda' needs the compiled module fedms.kernels._C_cuda, which could not be "
            f"loaded: {why_not}"
        )
    return runtime


class _Call:
    """One call's launches. Keeps what they read alive; every method is one launch."""

    def __init__(
        self, like: Tensor, k: int, n: int, A: Sequence[Tensor], B: Sequence[Tensor],
        gates: Tensor | None, expert_idxs: Tensor | None, offsets: Tensor | None,
        experts: Tensor | None, scale: Sequence[float], dropout_p: float, seed: Tensor | None,
        dA: Sequence[Tensor] = (), dB: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        """like: x or dy, for M, the dtype and the device; empty dA and dB are not wanted."""
        self._runtime = _runtime()
        module, m, device = self._runtime.module, like.shape[0], like.device
        if max(m, k, n) >= 2**31 - _TILE_ROWS:
            raise ValueError(f"x and y must be below 2^31 in each dimension, got {m}, {k}, {n}")
        ranks = [a.shape[0] for a in A]
        self.width = _width(ranks, expert_idxs, experts)
        runs = read_runs(offsets, experts, seed, m, len(ranks))
        self.routes = None if runs is None else routes_of(runs, tuple(ranks), _TILE_ROWS)
        self.m, self.k, self.n = m, k, n
        self.max_rows = m if self.routes is None else self.routes.max_rows
        self.chunks = -(-max(ranks) // module.CHUNK_RANKS)
        self.tiles = (
            -(-m // _TILE_ROWS) * len(A) if self.routes is None else self.routes.member_tiles
        )
        self.strip = _STRIP_BYTES // like.element_size()
        self.multiprocessors = self._runtime.multiprocessors(device)
        if gates is not None and gates.dtype not in _DTYPES:
            gates = gates.to(torch.float32)
        A, B = [a.contiguous() for a in A], [b.contiguous() for b in B]
        expert_idxs = None if expert_idxs is None else expert_idxs.contiguous()

        addresses = [
            [t.data_ptr() for t in A],
            [t.data_ptr() for t in B],
            [t.data_ptr() if t.numel() else 0 for t in dA],
            [t.data_ptr() if t.numel() else 0 for t in dB],
        ]
        stream = self._runtime.stream(device)
        table = routes = None
        if len(A) > module.MAX_INLINE_EXPERTS:
            words = module.expert_words(*addresses, ranks, scale)
            table = self._resident(words, device, stream)
        counts = (0, 0, 0, 0)
        if self.routes is not None:
            routes = self._resident(self.routes.words, device, stream)
            counts = (self.routes.num_groups, self.routes.num_members, self.routes.group_tiles,
                      self.routes.member_tiles)  # fmt: skip
        self._alive = (A, B, gates, expert_idxs, table, routes, seed)
        self._call = module.Call(
            device.index or 0, stream, m, k, n, _DTYPES[like.dtype], _DTYPES[A[0].dtype],
            *addresses, ranks, scale, 0 if table is None else table.data_ptr(),
            0 if gates is None else gates.data_ptr(), 0 if gates is None else _DTYPES[gates.dtype],
            0 if gates is None or gates.dim() == 1 else gates.stride(0),
            0 if gates is None else gates.stride(-1),
            0 if expert_idxs is None else expert_idxs.data_ptr(),
            -1 if expert_idxs is None else expert_idxs.shape[1], self.width,
            (0 if routes is None else routes.data_ptr(), *counts), dropout_p,
            0 if seed is None else seed.data_ptr(),
        )  # fmt: skip

    def _resident(self, words: bytes, device: torch.device, stream: int) -> Tensor:
        def make() -> Tensor:
            table = torch.empty(-(-len(words) // 8), dtype=torch.int64, device=device)
            self._runtime.module.upload(device.index or 0, stream, table.data_ptr(), words)
            return table

        return STORE.get(words, device, stream, self._runtime.capturing(), make, launched=True)

    def shrink(self, in_MC: Tensor, out_Mr: Tensor | None, *, from_b: bool) -> Tensor:
        """in A_eᵀ, or in B_e: [splits, M, r] fp32, its sum over splits being the result.

        Few rows split the columns, so that there are blocks for every multiprocessor. One split is
        written to out_Mr, if there is one.
        """
        columns = self.n if from_b else self.k
        strips = max(1, -(-columns // self.strip))
        splits = -(-2 * self.multiprocessors // max(1, self.tiles * self.chunks))
        per_split = -(-strips // min(splits, strips, _MAX_SPLITS))
        splits = -(-strips // per_split)
        if splits > 1 or out_Mr is None:
            out_Mr = in_MC.new_empty((splits, self.m, self.width), dtype=torch.float32)
        out_sMr = out_Mr.view(splits, self.m, self.width)
        self._runtime.module.shrink(
            self._call, in_MC.data_ptr(), out_sMr.data_ptr(), splits, per_split * self.strip, from_b
        )
        return out_sMr

    def expand(
        self, h_sMr: Tensor, sum_Mr: Tensor | None, start: Tensor | None, out_MC: Tensor, *,
        from_b: bool,
    ) -> None:  # fmt: skip
        """out = start + (coef * h) B_eᵀ, or + undrop((coef * h) A_e); sum = h over its splits.

        start: [M, C], which may be out, [C], or None for zeros.
        """
        columns = self.n if from_b else self.k
        row_tiles = -(-self.m // _TILE_ROWS) if self.routes is None else self.routes.group_tiles
        narrow = row_tiles * -(-columns // self.strip) < self.multiprocessors
        separate = sum_Mr is not None and sum_Mr.data_ptr() != h_sMr.data_ptr()
        self._runtime.module.expand(
            self._call, h_sMr.data_ptr(), h_sMr.shape[0],
            sum_Mr.data_ptr() if sum_Mr is not None and separate else 0,
            0 if start is None else start.data_ptr(),
            start is not None and start.dim() == 2, out_MC.data_ptr(), from_b, narrow,
        )  # fmt: skip

    def combine(self, u_sMr: Tensor, h_Mr: Tensor | None, dg: Tensor) -> Tensor:
        """u over its splits [M, r]; with h, dg [M, E] or [M, k] fp32 of the pairs that exist."""
        u_Mr = u_sMr[0]
        if u_sMr.shape[0] > 1:
            u_Mr = torch.empty_like(u_Mr)
        elif h_Mr is None:
            return u_Mr
        self._runtime.module.combine(
            self._call, u_sMr.data_ptr(), u_sMr.shape[0], u_Mr.data_ptr(),
            0 if h_Mr is None else h_Mr.data_ptr(), dg.data_ptr(),
        )  # fmt: skip
        return u_Mr

    def outer(
        self, in_MC: Tensor, ranks_Mr: Tensor, grads: Sequence[Tensor], *, to_b: bool
    ) -> None:
        """dA_e, or dB_e, of the experts whose gradient was given to the constructor."""
        columns = self.n if to_b else self.k
        wanted = sum(g.numel() > 0 for g in grads)
        blocks = max(1, wanted * self.chunks * -(-columns // self.strip))
        # A slice of fewer than 128 rows would cost more in partial sums than it reads.
        splits = max(1, min(-(-2 * self.multiprocessors // blocks), self.max_rows // 128))
        partial = None
        if splits > 1:
            total = sum(g.shape[0] for g in self._alive[0])
            partial = in_MC.new_empty((splits, total, columns), dtype=torch.float32)
        self._runtime.module.outer(
            self._call, in_MC.data_ptr(), ranks_Mr.data_ptr(),
            0 if partial is None else partial.data_ptr(), splits, to_b,
        )  # fmt: skip


def _width(ranks: Sequence[int], expert_idxs: Tensor | None, experts: Tensor | None) -> int:
    """Of a row of h."""
    if expert_idxs is not None:
        return expert_idxs.shape[1] * max(ranks)
    return row_width(ranks, experts)


def _h_like(
    x: Tensor, A: Sequence[Tensor], expert_idxs: Tensor | None, experts: Tensor | None
) -> tuple[int, torch.dtype]:
    return _width(expert_ranks(A), expert_idxs, experts), torch.float32


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None,
    A: Sequence[Tensor], B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, save_h: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # expand then writes every row
    whole = offsets is None and bool(_width([len(a) for a in A], expert_idxs, experts))
    x, start = x.contiguous(), bias
    if base is not None:
        start = base.contiguous()
        y_MN = x.new_empty(base.shape) if whole else start.clone()
    else:
        assert weight is not None
        y_MN = x.new_empty((len(x), len(weight))) if whole else F.linear(x, weight, bias)
    call = _Call(
        x, x.shape[1], y_MN.shape[1], A, B, gates, expert_idxs, offsets, experts, scale, dropout_p,
        seed,
    )  # fmt: skip
    h_Mr = x.new_empty((call.m, call.width) if save_h else (0,), dtype=torch.float32)
    if call.m and call.width:
        h_sMr = call.shrink(x, h_Mr if save_h else None, from_b=False)
        sum_Mr = h_Mr if save_h else None
        call.expand(h_sMr, sum_Mr, start if whole else y_MN, y_MN, from_b=True)
        if whole and weight is not None:
            y_MN.addmm_(x, weight.t())
    return y_MN, h_Mr


def _backward(
    dy: Tensor, weight: Tensor | None, x: Tensor | None, h: Tensor | None, A: Sequence[Tensor],
    B: Sequence[Tensor], gates: Tensor | None, expert_idxs: Tensor | None,
    offsets: Tensor | None, experts: Tensor | None, scale: Sequence[float], dropout_p: float,
    seed: Tensor | None, need_dx: bool, need_dg: bool, need_dA: Sequence[bool],
    need_dB: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    (m, n), k = dy.shape, A[0].shape[1]
    dy = dy.contiguous()
    # expand then writes every row
    whole = offsets is None and bool(_width([len(a) for a in A], expert_idxs, experts))
    dx_MK = dy.new_empty((m, k) if need_dx else (0,))
    if need_dx and not whole:
        dx_MK = dy.new_zeros((m, k)) if weight is None else dy @ weight
    dA, dB = _outputs(A, need_dA), _outputs(B, need_dB)
    columns = len(A) if expert_idxs is None else expert_idxs.shape[1]
    dg = dy.new_zeros((m, columns) if need_dg else (0,), dtype=torch.float32)
    call = _Call(
        dy, k, n, A, B, gates, expert_idxs, offsets, experts, scale, dropout_p, seed, dA, dB
    )  # fmt: skip
    u_Mr = dg  # nobody reads it where it stays that
    if call.m and call.width and (need_dx or need_dg or any(need_dA)):
        u_sMr = call.shrink(dy, None, from_b=True)
        u_Mr = call.combine(u_sMr, h if need_dg else None, dg)
        if need_dx:
            start = None if whole else dx_MK
            call.expand(u_Mr.unsqueeze(0), None, start, dx_MK, from_b=False)
            if whole and weight is not None:
                dx_MK.addmm_(dy, weight)
    if x is not None and any(need_dA):
        call.outer(x.contiguous(), u_Mr, dA, to_b=False)
    if h is not None and any(need_dB):
        call.outer(dy, h, dB, to_b=True)
    if need_dg and gates is not None:
        dg = (dg.sum(0) if gates.dim() == 1 else dg).to(gates.dtype)
    return dx_MK, dg, dA, dB


def _outputs(like: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape if want else (0,)) for t, want in zip(like, need, strict=True)]


define_backend("cuda", *takes_stacks(_forward, _backward), dispatch_key="CUDA", h_like=_h_like)
