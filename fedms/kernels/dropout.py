"""The dropout mask as a function of (seed, expert, row, column): never stored, the same everywhere.

Definition, all products and sums modulo 2^32 or 2^64, `>>` logical:

    key(seed, e)     = mix64(seed + (e + 1) * 0x9E3779B97F4A7C15)
    row(key, m)      = mix64(key + (m + 1) * 0xD1B54A32D192ED03)     lo = low, hi = high 32 bits
    v                = c * 0x9E3779B1 + lo
    v = (v ^ v >> 16) * 0x7FEB352D;  v = ((v ^ v >> 15) ^ hi) * 0x846CA68B;  v ^= v >> 16
    keep(e, m, c)    = v >= floor(p * 2^32)

mix64 is splitmix64's finaliser, the 32-bit rounds are lowbias32's with the row's high word mixed in
between, so that two rows share a mask only when all 64 bits of their keys agree. e is the expert's
position in the call, m the row of the flattened x. `csrc/cpu/dropout.h` is the same in C++:
forward, backward, a checkpoint's recompute and every backend see one mask.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def draw_seed() -> int:
    """A seed from torch's default CPU generator (so `torch.manual_seed` and checkpointing hold)."""
    return int(torch.randint(0, 2**63 - 1, ()))


def expert_key(seed: int, expert: int) -> int:
    """key(seed, e) as an unsigned 64-bit number."""
    z = (seed + (expert + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def keep_mask(
    seed: int, expert: int, row_begin: int, row_end: int, k: int, p: float, device: torch.device
) -> torch.Tensor:
    """Mask of the kept elements of rows `row_begin:row_end`, bool [rows, K], for 0 <= p < 1."""
    rows = torch.arange(row_begin + 1, row_end + 1, device=device, dtype=torch.int64)
    z = rows * _signed(0xD1B54A32D192ED03) + _signed(expert_key(seed, expert))
    z = (z ^ _shr(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shr(z, 27)) * _signed(0x94D049BB133111EB)
    z = (z ^ _shr(z, 31)).unsqueeze(1)
    lo, hi = z & _MASK32, _shr(z, 32)

    columns = torch.arange(k, device=device, dtype=torch.int64)
    v = (columns * 0x9E3779B1 + lo) & _MASK32
    v = ((v ^ (v >> 16)) * 0x7FEB352D) & _MASK32
    v = (((v ^ (v >> 15)) ^ hi) * 0x846CA68B) & _MASK32
    return (v ^ (v >> 16)) >= int(p * 2**32)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits (torch's integer products wrap, as the definition wants)."""
    return value - (1 << 64) if value >> 63 else value


def _shr(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's `>>` is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
