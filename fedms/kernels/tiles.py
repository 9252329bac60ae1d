"""What a GPU call is made of: backend, strategy and tile sizes, from a table or a heuristic.

The table has rows measured on a device (`plan.json` beside this file, then the user's own, which
wins); a row holds for its device, dtypes, K, N, and the buckets of M and R. A row is written only
by the tuner, after its result was checked on that device: a kernel without a row has never passed
there and is not chosen by default. The committed table has no rows yet. Rows are measured on dense
calls gated per token; segments, top-k and dropout go by the same row.

Strategies, for y and for dx alike:
    fused    one kernel: shrink inside the base GEMM's loop (no segments, no dropout, small R)
    extend   shrink, then a GEMM whose accumulator takes the mixture
    split    the mixture by a kernel of its own, then torch's GEMM (cuBLAS) adding to it (beta = 1)
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

STRATEGIES = ("fused", "extend", "split")


@dataclass(frozen=True)
class GemmTiles:
    """The base GEMM with the mixture in its accumulator: rows, columns and depth of a tile.

    tma: load x and w by tensor descriptors (sm_90 and later). persistent: one program a
    multiprocessor instead of one a tile.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    tma: bool = False
    persistent: bool = False

    def __str__(self) -> str:
        flags = " tma" * self.tma + " persistent" * self.persistent
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}{flags}"


@dataclass(frozen=True)
class Tiles:
    """A kernel that reads or writes a matrix once: its rows and columns in a tile."""

    block_m: int
    block_c: int
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_c} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class Choice:
    """How one call runs.

    gemm, dx_gemm: for y and for dx, of the strategies fused and extend. expand: of split, both
    directions. one_pass: u comes beside dB from one read of dy, not from a shrink of its own.
    """

    backend: str
    forward: str
    backward: str
    gemm: GemmTiles
    dx_gemm: GemmTiles
    shrink: Tiles
    expand: Tiles
    outer: Tiles
    one_pass: bool
    measured: bool = False

    def describe(self, direction: str) -> str:
        """Strategy and tiles of "forward" or "backward", in words."""
        if direction == "forward":
            how = self.expand if self.forward == "split" else self.gemm
            return f"{self.forward} {how}, shrink {self.shrink}"
        how = self.expand if self.backward == "split" else self.dx_gemm
        return f"{self.backward} {how}, outer {self.outer}{' with u' * self.one_pass}"


@dataclass(frozen=True)
class Shape:
    """What a choice depends on. m and r are rounded up to powers of two, 16 at least."""

    device: str
    x: str
    adapter: str
    m: int
    k: int
    n: int
    r: int

    @staticmethod
    def of(
        device: str, x: torch.dtype, adapter: torch.dtype, m: int, k: int, n: int, r: int
    ) -> Shape:
        return Shape(device, _name(x), _name(adapter), _bucket(m), k, n, _bucket(r))


def heuristic(shape: Shape) -> Choice:
    """The choice for a shape that no table has.

    The backend is plain torch: nothing here has been measured. The tiles are what the Triton
    kernels take when they are named: fused below the width where repeating the shrink in every
    column tile costs more than a launch and one more read of x (N about 1.8k, by arithmetic).
    """
    wide = shape.x == "float32"  # its base GEMM is cuBLAS's
    amd = torch.version.hip is not None  # 64 KiB of shared memory
    block_m = min(64 if wide and amd else 128, shape.m)
    gemm = GemmTiles(block_m, 128, 32 if amd else 64, 8 if block_m == 128 else 4, 2 if amd else 3)
    if wide or shape.adapter == "float32":
        gemm = replace(gemm, block_n=64 if block_m >= 64 else 32, block_k=32)
    can_fuse = shape.r <= 64 and shape.adapter == shape.x
    rows = min(32 if wide else 64, shape.m)
    outer = Tiles(32, 64, 4, 2) if wide else Tiles(32, 512, 8, 2)
    if amd and not wide:
        outer = Tiles(32, 128, 4, 2)

    def strategy(out: int) -> str:
        if wide or shape.m <= 64:
            return "split"
        return "fused" if out <= 1792 and can_fuse else "extend"

    return Choice(
        backend="stacked",
        forward=strategy(shape.n),
        backward=strategy(shape.k),
        gemm=gemm,
        dx_gemm=gemm,
        shrink=Tiles(min(32 if wide else 64, shape.m), 32 if wide else 64, 4, 3),
        expand=Tiles(rows, 64 if wide else 128, 4, 2),
        outer=outer,
        one_pass=one_pass_pays(shape.m, shape.n, shape.r, 4 if wide else 2),
    )


def one_pass_pays(m: int, n: int, r: int, itemsize: int) -> bool:
    """Whether the partial sums of u cost less than a second read of dy [M, N].

    One pass writes and reads 8 M R bytes for each 512 columns, and takes one launch more: 2.5 us,
    in which a GPU moves 7.5 MB.
    """
    return m * n * itemsize > 8 * m * r * -(-n // 512) + 7_500_000


def lookup(shape: Shape) -> Choice:
    """The measured choice for a shape, else the heuristic's."""
    return _table().get(shape) or heuristic(shape)


@lru_cache(maxsize=8192)
def choose(
    device: torch.device, x: torch.dtype, adapter: torch.dtype, m: int, k: int, n: int, r: int
) -> Choice:
    """`lookup` for a call's own numbers, kept: under a microsecond when they came before."""
    return lookup(Shape.of(device_name(device), x, adapter, m, k, n, r))


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """What the tables call a device."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if there else device.type


def user_table() -> Path:
    """Where the tuner writes: $XDG_CONFIG_HOME/fedms/plan.json, by default below ~/.config."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "fedms" / "plan.json"


def save(rows: dict[Shape, Choice], path: Path) -> None:
    """Merge rows into the table at `path` (the newer one of a shape wins); replaces it whole."""
    kept = (parse(path.read_text("utf-8"), str(path)) if path.exists() else {}) | rows
    listed = [{"shape": asdict(s), "choice": asdict(c)} for s, c in kept.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(listed, indent=1) + "\n", "utf-8")
    fresh.replace(path)
    forget()


def forget() -> None:
    """Read the tables again at the next choice."""
    _table.cache_clear()
    choose.cache_clear()


@lru_cache(maxsize=1)
def _table() -> dict[Shape, Choice]:
    own = resources.files("fedms.kernels").joinpath("plan.json").read_text("utf-8")
    rows = parse(own, "fedms/kernels/plan.json")
    path = user_table()
    if path.exists():
        rows |= parse(path.read_text("utf-8"), str(path))
    return rows


def parse(text: str, where: str) -> dict[Shape, Choice]:
    """Rows of a table. Raises ValueError that names the file and the row."""
    try:
        listed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be a JSON list of rows, got: {error}") from None
    if not isinstance(listed, list):
        raise ValueError(f"{where} must be a JSON list of rows, got {type(listed).__name__}")
    rows = {}
    for i, row in enumerate(listed):
        try:
            shape, choice = Shape(**row["shape"]), _choice(row["choice"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{where}, row {i} must have a shape and a choice as the tuner writes them: {error}"
            ) from None
        if not {choice.forward, choice.backward} <= set(STRATEGIES):
            raise ValueError(
                f"{where}, row {i}: forward and backward must be of {STRATEGIES}, "
                f"got {choice.forward!r} and {choice.backward!r}"
            )
        rows[shape] = choice
    return rows


def _choice(fields: dict[str, Any]) -> Choice:
    gemms = {name: GemmTiles(**fields[name]) for name in ("gemm", "dx_gemm")}
    others = {name: Tiles(**fields[name]) for name in ("shrink", "expand", "outer")}
    launches: dict[str, Any] = gemms | others
    return Choice(**fields | launches)


def _bucket(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length()) if size > 0 else 16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
