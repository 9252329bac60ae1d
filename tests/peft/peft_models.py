"""Small models with peft adapters for the tests, and comparison with peft's own layers.

The adapters' B matrices are random, not zero, so that a forgotten adapter shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedms.peft import layer as fused_layer

IN, HIDDEN, OUT = 24, 32, 20

# torch 2.11 closes nested checkpoints in the wrong order when one raises, of plain linears too
nested_may_raise = pytest.mark.filterwarnings(
    "ignore:.*_checkpoint_without_reentrant_generator:pytest.PytestUnraisableExceptionWarning"
)


class Mlp(nn.Module):
    """Two linears, `a` [HIDDEN, IN] and `b` [OUT, HIDDEN] with a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(IN, HIDDEN)
        self.b = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.nn.functional.gelu(self.a(x)))


def mlp(*names: str, dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """An Mlp with the adapters `names` (default one, "default") on both linears."""
    torch.manual_seed(0)
    return with_adapters(Mlp().to(dtype), *names, **{"target_modules": ["a", "b"], **config})


def small_llama(**config: Any) -> LlamaForCausalLM:
    """Two blocks, vocabulary 40, width 32, random weights, no adapters."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))


def with_adapters(model: nn.Module, *names: str, **config: Any) -> PeftModel:
    """`model` with one or more adapters of the same config; the first is active."""
    names = names or ("default",)
    config = {"r": 4, "init_lora_weights": False, **config}
    peft_model = get_peft_model(model, LoraConfig(**config), adapter_name=names[0])
    for name in names[1:]:  # peft takes one adapter with bias per model
        peft_model.add_adapter(name, LoraConfig(**{**config, "bias": "none"}))
    return peft_model


def step(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor | None]:
    """y, dx and every trainable parameter's gradient of one forward and backward."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    y = model(x, **kwargs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    (y.double() * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **gradients}


def in_float64(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor | None]:
    """The same step of peft's own layers in float64."""
    return step(copy.deepcopy(model).double(), x.double(), **kwargs)


def assert_same(
    got: dict[str, Tensor | None], want: dict[str, Tensor | None], bound: float
) -> None:
    """Same tensors, same ones None, and a relative L2 error of at most `bound` in each."""
    assert got.keys() == want.keys()
    for name, right in want.items():
        value = got[name]
        assert (value is None) == (right is None), name
        if value is None or right is None:
            continue
        assert value.shape == right.shape, name
        error = relative_error(value, right)
        assert error <= bound, f"{name}: relative error {error:.1e}"


def relative_error(value: Tensor, right: Tensor) -> float:
    value, right = value.double(), right.double()
    norm = right.norm().item()
    return (value - right).norm().item() / (norm if norm else 1.0)


@contextmanager
def fused_calls() -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every call of the op by a fused layer within the block."""
    calls: list[dict[str, Any]] = []
    op: Callable[..., Tensor] = fused_layer.gated_lora_linear

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return op(*args, **kwargs)

    fused_layer.gated_lora_linear = noted  # type: ignore[assignment]
    try:
        yield calls
    finally:
        fused_layer.gated_lora_linear = op
