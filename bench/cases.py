"""What the benchmarks time: one layer and its mixture a case, the most important first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """M tokens through a frozen K -> N layer with `experts` LoRA experts of rank r.

    base, adapter: names of DTYPES, of x and W and of A and B. gated: per token. frozen: so many
    experts, the first ones, are not trained. top_k: experts a token, 0 for all. segments: equal row
    ranges with an expert each, 0 for none.
    """

    m: int
    k: int
    n: int
    r: int = 16
    experts: int = 2
    gated: bool = True
    base: str = "bf16"
    adapter: str = "bf16"
    frozen: int = 0
    dropout_p: float = 0.0
    top_k: int = 0
    segments: int = 0
    model: str = ""

    @property
    def ranks(self) -> int:
        return self.r * self.experts

    def __str__(self) -> str:
        words = [self.model, f"{self.m}x{self.k}x{self.n}", self.base, f"r{self.r}"]
        words += [f"E{self.experts}", "gated" * self.gated]
        words += [f"top-{self.top_k}"] * bool(self.top_k)
        words += [f"{self.segments} segments"] * bool(self.segments)
        words += [f"p={self.dropout_p}"] * bool(self.dropout_p)
        return " ".join(word for word in words if word)


# CPU: MiniLM's projections at 512 tokens, ViT-B/16 at 8 images; peft's default of fp32 adapters
SHAPES = [(512, 384, 384), (512, 384, 1536), (1576, 768, 768), (1576, 768, 3072), (1576, 3072, 768)]
SMOKE = SHAPES[:2]
# (r, E, gated per token)
MIXTURES = [(8, 1, False), (16, 1, False), (8, 2, True), (8, 4, True), (16, 4, True), (8, 8, True)]
# (tokens, K, N) of a decoding step
DECODING = [
    (1, 256, 256),
    (8, 256, 256),
    (1, 768, 768),
    (1, 768, 3072),
    (4, 768, 3072),
    (16, 768, 3072),
]
DECODING += [(1, 4096, 4096), (16, 4096, 4096)]


def cpu_cases(shapes: list[tuple[int, int, int]]) -> list[Case]:
    """Every mixture on every shape, then dropout on one, fp32 before bf16."""
    listed = [
        Case(*shape, *mixture, base=base, adapter="fp32")
        for base in ("fp32", "bf16")
        for shape in shapes
        for mixture in MIXTURES
    ]
    if shapes == SHAPES:
        drop = Case(*SHAPES[2], 8, 1, False, adapter="fp32", dropout_p=0.1)
        listed += [replace(drop, base=base) for base in ("fp32", "bf16")]
    return listed


# GPU: bf16 throughout, two gated experts of which the first is frozen, as in FedMS's second stage
MODELS: dict[str, tuple[int, list[tuple[int, int]]]] = {  # tokens, (K, N) of its layers
    "Llama-3-8B": (8192, [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)]),
    "ViT-B/16": (197 * 32, [(768, 768), (768, 3072), (3072, 768)]),
    "ViT-L/14": (257 * 32, [(1024, 1024), (1024, 4096), (4096, 1024)]),
    "Llama-3-8B, 16 tokens": (16, [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]),
    "ViT-B/16, 8 images": (197 * 8, [(768, 768), (768, 3072), (3072, 768)]),
    "text tower": (77 * 64, [(512, 512), (512, 2048), (2048, 512)]),
    "MiniLM": (8192, [(384, 384), (384, 1536), (1536, 384)]),
}
RANKS, EXPERTS, DROPOUTS = (16, 8, 64, 4, 32), (2, 1, 8, 4), (0.0, 0.1)


def gpu_case(model: str, layer: int = 0, tiny: bool = False) -> Case:
    """A layer of MODELS; tiny: at a size that an interpreter can do."""
    m, layers = MODELS[model]
    k, n = layers[layer]
    if tiny:
        m, k, n = min(m, 33), 32 * (1 + (k > n)), 32 * (1 + (n > k))
    return Case(m, k, n, frozen=1, model=model)


def first_cases(tiny: bool = False) -> list[Case]:
    """The first visit's: a large layer, a small one, and few tokens."""
    named = ("Llama-3-8B", "ViT-B/16", "Llama-3-8B, 16 tokens")
    return [gpu_case(model, tiny=tiny) for model in (named[1:] if tiny else named)]


def tuned_cases(tiny: bool = False) -> list[Case]:
    """Those whose rows of the plan matter most: q/o, gate/up, down, ViT-B, ViT-L, 16 tokens."""
    wanted = [("Llama-3-8B", 0), ("Llama-3-8B", 1), ("Llama-3-8B", 2), ("ViT-B/16", 0)]
    wanted += [("ViT-L/14", 0), ("Llama-3-8B, 16 tokens", 0)]
    return [gpu_case(model, layer, tiny) for model, layer in (wanted[1:2] if tiny else wanted)]


def varied(case: Case, tiny: bool = False) -> list[Case]:
    """What else a mixture can be: more experts, segments, dropout, top-k."""
    e = 1 if tiny else 8
    return [
        replace(case, experts=e, frozen=int(e > 1)),
        replace(case, experts=4 * e, segments=4 * e, gated=False, frozen=0),
        replace(case, dropout_p=0.1),
        replace(case, experts=max(e, 3), top_k=2),
    ]


def matrix() -> list[Case]:
    """Every layer of every model, then the grid of ranks, experts and dropout by its distance."""
    base = [gpu_case(model, i) for model, (_, layers) in MODELS.items() for i in range(len(layers))]
    steps = sorted(
        product(enumerate(RANKS), enumerate(EXPERTS), enumerate(DROPOUTS)),
        key=lambda point: sum(i for i, _ in point),
    )
    grid = [
        replace(c, r=r, experts=e, dropout_p=p, frozen=int(e > 1))
        for (_, r), (_, e), (_, p) in steps
        for c in base
    ]
    return list(dict.fromkeys([*base, *grid]))
