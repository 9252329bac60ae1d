"""The GPU suite's shapes: which layers and mixtures are timed, the most important first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

Layers = list[tuple[int, int]]

MODELS: dict[str, tuple[int, Layers]] = {  # tokens, (K, N) of its layers
    "ViT-B/16": (197 * 32, [(768, 768), (768, 3072), (3072, 768)]),
    "ViT-L/14": (257 * 32, [(1024, 1024), (1024, 4096), (4096, 1024)]),
    "Llama-3-8B": (8192, [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]),
    "text tower": (77 * 64, [(512, 512), (512, 2048), (2048, 512)]),
    "MiniLM": (8192, [(384, 384), (384, 1536), (1536, 384)]),
    "Llama-3-8B, 16 tokens": (16, [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]),
}
TINY: dict[str, tuple[int, Layers]] = {"ViT-B/16": (17, [(48, 32)]), "Llama-3-8B": (32, [(32, 48)])}
FEW = 16  # tokens of a decoding step; so few are bound by launches
COMPILED = ("ViT-B/16", "ViT-L/14", "Llama-3-8B")  # a compilation takes seconds
RANKS, EXPERTS, DROPOUTS = (16, 8, 64, 4, 32), (2, 1, 8, 4), (0.0, 0.1)


@dataclass(frozen=True)
class Case:
    """One layer and its mixture; per-token gates unless there are segments.

    top_k: experts a token, 0 for all. segments: equal row ranges with an expert each, 0 for none.
    graphs, compiled: whether CUDA-graph rows and torch.compile's row are made.
    """

    model: str
    m: int
    k: int
    n: int
    r: int = 16
    experts: int = 2
    dropout_p: float = 0.0
    top_k: int = 0
    segments: int = 0
    graphs: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        drop = f" dropout {self.dropout_p}" if self.dropout_p else ""
        top = f" top-{self.top_k}" if self.top_k else ""
        ranges = f" {self.segments} segments" if self.segments else ""
        size = f"{self.m}x{self.k}x{self.n}"
        return f"{self.model} {size} r{self.r} E{self.experts}{top}{ranges}{drop}"


def matrix(models: dict[str, tuple[int, Layers]] = MODELS) -> list[Case]:
    """Every case, the most important first.

    Rank 16 with two experts on every shape, then what a target or a feature asks for, then the grid
    of ranks, experts and dropout by its distance from that mixture.
    """
    base = [
        Case(
            model, m, k, n,
            graphs="ViT" in model or m <= FEW, compiled=(k, n) == layers[0] and model in COMPILED,
        )
        for model, (m, layers) in models.items()
        for k, n in layers
    ]  # fmt: skip
    square = sorted((c for c in base if c.k == c.n and c.m > FEW), key=lambda c: -c.k)
    asked = [replace(c, experts=8) for c in square]
    asked += [replace(c, experts=32, segments=32) for c in square]
    asked += [replace(c, experts=8, top_k=2) for c in square]
    asked += [replace(c, dropout_p=0.1) for c in square]
    steps = sorted(
        product(enumerate(RANKS), enumerate(EXPERTS), enumerate(DROPOUTS)),
        key=lambda point: sum(i for i, _ in point),
    )
    grid = [
        replace(c, r=r, experts=e, dropout_p=p) for (_, r), (_, e), (_, p) in steps for c in base
    ]
    later = [replace(c, compiled=False) for c in (*asked, *grid)]
    names = {str(c) for c in base}
    return [*base, *dict.fromkeys(c for c in later if str(c) not in names)]


def rehearsal() -> list[Case]:
    """A case of each kind, at sizes that an interpreter can do."""
    vit, llama = matrix(TINY)[:2]
    few = replace(llama, r=8, compiled=False)
    return [
        vit,
        replace(few, experts=4, segments=4),
        replace(few, experts=3, top_k=2),
        replace(few, dropout_p=0.1),
    ]
