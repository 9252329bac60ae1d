"""Problems that the CUDA backend must solve, on a CPU (cuda_host.py) as on a GPU, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lora_problem import Problem, make_problem

from fedms.kernels import Segments

SEGMENTS = Segments([0, 5, 5, 90, 140, 150], [0, 3, (3, 0), (), (2, 1, 0)])


def listed(
    m: int, top_k: int, gates: str | None = "listed", ranks: Sequence[int] = (8, 3, 16, 0, 20, 4)
) -> Problem:
    idxs = torch.randint(0, len(ranks), (m, top_k))
    if m > 3:
        idxs[3] = 2  # one pair listed top_k times counts top_k times
    return make_problem(m, ranks=ranks, gates=gates, expert_idxs=idxs)


def tiny_segments(num: int = 40) -> Problem:
    """Segments of two rows of three experts in turn, one of them with a second expert."""
    experts = [(0,), (2,), (0, 2)]
    segments = Segments([2 * i for i in range(num + 1)], [experts[i % 3] for i in range(num)])
    return make_problem(2 * num, ranks=(8, 4, 16), segments=segments)


def frozen() -> Problem:
    p = make_problem(ranks=(8, 4, 8))
    return replace(
        p,
        A=[p.A[0].detach(), *p.A[1:]],
        B=[p.B[0].detach(), p.B[1].detach(), p.B[2]],
    )


def only(name: str) -> Problem:
    """A problem in which nothing but x, the gates, A or B needs a gradient."""
    p = make_problem(45, ranks=(8, 3))
    keep = {"x": [p.x], "gates": [p.gates], "A": p.A, "B": p.B}[name]

    def cut(t: Any) -> Any:
        return t if any(t is k for k in keep) else t.detach()

    return replace(p, x=cut(p.x), gates=cut(p.gates), A=[*map(cut, p.A)], B=[*map(cut, p.B)])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "no tokens": lambda: make_problem(0, ranks=(8,)),
    "one token": lambda: make_problem(1, ranks=(8,)),
    "decoding": lambda: make_problem(16, 600, 512, (16, 16)),
    "a tile": lambda: make_problem(32, 256, 256, (16,)),
    "one more everywhere": lambda: make_problem(33, 257, 513, (17,)),
    "one less everywhere": lambda: make_problem(31, 255, 511, (15,)),
    "odd widths": lambda: make_problem(65, 100, 601, (4, 4)),
    "tokens of an image": lambda: make_problem(197, 768, 100, (8, 8)),
    "mixed ranks": lambda: make_problem(33, ranks=(64, 0, 3, 16)),
    "rank over the width": lambda: make_problem(33, ranks=(100,)),
    "more experts than fit": lambda: make_problem(19, ranks=(2,) * 33),
    "gates: none": lambda: make_problem(70, ranks=(8, 3), gates=None),
    "gates: layer": lambda: make_problem(70, ranks=(8, 3), gates="layer"),
    "dropout": lambda: make_problem(70, 300, ranks=(8, 3, 17), dropout_p=0.3),
    "dropout, no gates": lambda: make_problem(70, ranks=(8, 3), gates=None, dropout_p=0.3),
    "top 1": lambda: listed(70, 1),
    "top 2": lambda: listed(70, 2),
    "top 5 without gates": lambda: listed(70, 5, gates=None),
    "top 2, dropout": lambda: replace(listed(150, 2), dropout_p=0.3),
    "top 2 of many experts": lambda: listed(20, 2, ranks=(4,) * 33),
    "top 1, nobody lists most": lambda: replace(
        listed(40, 1, ranks=(4,) * 5), expert_idxs=torch.full((40, 1), 3)
    ),
    "segments": lambda: make_problem(150, ranks=(8, 3, 16, 4), segments=SEGMENTS),
    "segments, layer gates": lambda: make_problem(
        150, ranks=(8, 3, 16, 4), gates="layer", segments=SEGMENTS
    ),
    "segments, dropout": lambda: make_problem(
        150, 300, ranks=(8, 3, 16, 4), gates=None, segments=SEGMENTS, dropout_p=0.3
    ),
    "one expert a segment": lambda: make_problem(
        256,
        ranks=(16,) * 8,
        gates=None,
        segments=Segments([32 * i for i in range(9)], list(range(8))),
    ),
    "tiny segments": tiny_segments,
    "many rows": lambda: make_problem(600, 64, 96, (20, 8)),
    "frozen experts": frozen,
    "only x": lambda: only("x"),
    "only gates": lambda: only("gates"),
    "only A": lambda: only("A"),
    "only B": lambda: only("B"),
}

# The sanitizers make a problem about five times slower.
SANITIZED = (
    "one more everywhere",
    "odd widths",
    "mixed ranks",
    "dropout",
    "top 2",
    "tiny segments",
)
