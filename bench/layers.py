"""peft's own layer beside the same layer accelerated, where calls count and arithmetic does not.

A run is {"both": a function that gives its results}, as `timing.interleaved` takes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import torch
from rows import SCALE
from timing import Parts
from torch import Tensor, nn
from torch.nn import functional as F

import fedms
from fedms.kernels import gated_lora_linear, native
from fedms.kernels.agreement import BOUND, difference


def tiny_rows() -> dict[str, Parts]:
    """Forward and backward of 4 tokens through 32 x 32, r = 4; `peft` is peft's own layer."""
    stock, fused = _pair(32, 32, 4)
    weight = stock.base_layer.weight
    x, dy = torch.randn(4, 32, requires_grad=True), torch.randn(4, 32)

    def factors(layer: nn.Module) -> list[Tensor]:
        return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def step(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Parts:
        def run() -> list[Tensor]:
            y = forward()
            return [y, *torch.autograd.grad(y, inputs, dy)]

        return {"both": run}

    def ours(backend: str) -> Parts:
        op = lambda: gated_lora_linear(x, weight, [A], [B], scaling=SCALE, backend=backend)  # noqa: E731
        return step(op, [x, A, B])

    A, B = factors(stock)
    found = {
        "frozen": step(lambda: F.linear(x, weight), [x]),
        "peft": step(lambda: stock(x), [x, A, B]),
        "stacked": ours("stacked"),
    }
    if native.available():
        found["native"] = ours("native")
        found["drop-in"] = step(lambda: fused(x), [x, *factors(fused)])
    return found


def decoding_rows(m: int, k: int, n: int, r: int) -> dict[str, Parts]:
    """A forward without gradients of m tokens, as `generate` runs it, on peft's layer and ours."""
    stock, fused = _pair(k, n, r)
    x = torch.randn(m, 1, k)

    def run(layer: nn.Module) -> Parts:
        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [layer(x)]

        return {"both": forward}

    return {"frozen": run(stock.base_layer), "peft": run(stock), "drop-in": run(fused)}


def same(runs: dict[str, Parts]) -> None:
    """Raise AssertionError unless all but `frozen` compute what `peft` does."""
    right = runs["peft"]["both"]()
    for name in runs.keys() - {"frozen", "peft"}:
        wrong = difference(runs[name]["both"](), right, BOUND[torch.float32])  # type: ignore[arg-type]
        if wrong:
            raise AssertionError(f"one layer: {name}: {wrong}")


def _pair(k: int, n: int, r: int) -> tuple[nn.Module, nn.Module]:
    """peft's LoRA layer and a fused copy with the same frozen weight: as warm in the caches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=False))
    config = peft.LoraConfig(
        r=r, lora_alpha=SCALE * r, target_modules=["0"], init_lora_weights=False
    )
    stock = peft.get_peft_model(model, config)
    weight = stock.base_model.model[0].base_layer.weight
    fused = copy.deepcopy(stock, {id(weight): weight})
    fedms.accelerate(fused)
    return stock.base_model.model[0], fused.base_model.model[0]
