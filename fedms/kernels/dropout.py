"""The dropout mask as a function of (seed, expert, row, column): never stored, the same everywhere.

Definition, all products and sums modulo 2^32 or 2^64, `>>` logical:

    key(seed, e)     = mix64(seed + (e + 1) * 0x9E3779B97F4A7C15)
    row(key, m)      = mix64(key + (m + 1) * 0xD1B54A32D192ED03)     lo = low, hi = high 32 bits
    v                = c * 0x9E3779B1 + lo
    v = (v ^ v >> 16) * 0x7FEB352D;  v = ((v ^ v >> 15) ^ hi) * 0x846CA68B;  v ^= v >> 16
    keep(e, m, c)    = v >= floor(p * 2^32)

mix64 is splitmix64's finaliser, the 32-bit rounds are lowbias32's with the row's high word mixed in
between, so that two rows share a mask only when all 64 bits of their keys agree. With one seed for
the call, e is the expert's position in the call and m the row of the flattened x. With a seed a
segment both count from the segment's own: e in the ascending order of its experts, m from its first
row, so the mask does not depend on what else is in the batch. `csrc/cpu/dropout.h` is the same in
C++: forward, backward, a checkpoint's recompute and every backend see one mask.

Seeds are int64 tensors on the call's device, which nothing waits for.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, int64 [].

    So `torch.manual_seed` and checkpointing hold, and each run of a compiled graph and each replay
    of a CUDA graph draws another.
    """
    return torch.randint(2**63 - 1, (), device=device)


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a tensor on the device; None draws one."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        return seed.contiguous()
    return torch.full((), seed, dtype=torch.int64, device=device)


def keep_mask(
    seed: int | Tensor, expert: int, row_begin: int, row_end: int, k: int, p: float,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Mask of the kept elements of rows `row_begin:row_end`, bool [rows, K], for 0 <= p < 1.

    seed: a number, or int64 [] on the device.
    """
    key = _mix64(as_seed(seed, device) + _signed((expert + 1) * 0x9E3779B97F4A7C15))
    rows = torch.arange(row_begin + 1, row_end + 1, device=device, dtype=torch.int64)
    z = _mix64(rows * _signed(0xD1B54A32D192ED03) + key).unsqueeze(1)
    lo, hi = z & _MASK32, _shr(z, 32)

    columns = torch.arange(k, device=device, dtype=torch.int64)
    v = (columns * 0x9E3779B1 + lo) & _MASK32
    v = ((v ^ (v >> 16)) * 0x7FEB352D) & _MASK32
    v = (((v ^ (v >> 15)) ^ hi) * 0x846CA68B) & _MASK32
    return (v ^ (v >> 16)) >= int(p * 2**32)


def _mix64(z: Tensor) -> Tensor:
    z = (z ^ _shr(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shr(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shr(z, 31)


def _signed(value: int) -> int:
    """The int64 with the same low 64 bits (torch's products wrap, as the definition wants)."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


def _shr(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's `>>` is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
