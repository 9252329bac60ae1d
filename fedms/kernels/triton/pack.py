"""pack: the A and B of separate experts as one matrix each, in one launch.

    a[offset_e + r, k] = A_e[r, k]        [R, K]
    b[n, offset_e + r] = B_e[n, r]        [N, R]

Bytes: R (K + N) read and written. Experts that lie in one matrix already are not copied.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    sources, a_ptr, b_ptr, table, COUNT: tl.constexpr, COUNT_A: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (i, s) copies BLOCK elements of source s; the first COUNT_A sources go to a.

    table [COUNT, 6]: elements, columns, row and column stride of a source, where it begins in a or
    b, and the row stride there.
    """
    source = tl.program_id(1)
    at = table + source * 6
    columns = tl.load(at + 1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = index < tl.load(at)
    row, column = (index // columns).to(tl.int64), index % columns
    read = row * tl.load(at + 2) + column.to(tl.int64) * tl.load(at + 3)
    write = tl.load(at + 4) + row * tl.load(at + 5) + column
    for s in tl.static_range(COUNT):
        if source == s:
            value = tl.load(sources[s] + read, mask=ok)
            if s < COUNT_A:
                tl.store(a_ptr + write, value, mask=ok)
            else:
                tl.store(b_ptr + write, value, mask=ok)
