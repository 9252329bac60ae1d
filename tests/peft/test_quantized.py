"""Fused adapters on bitsandbytes' and torchao's layers, against peft's own and against float64."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft_models import fused_calls, relative_error, small_llama
from torch import Tensor, nn

import fedms

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*get_apply_tensor_subclass.*:UserWarning",  # peft: merging would raise
    "ignore:.*inputs will be cast from .* to float16 during quantization:UserWarning",
)

K, N = 64, 96
NAMES = ["one", "two", "three"]


def _bnb(name: str, flag: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        kind = getattr(importlib.import_module("bitsandbytes").nn, name)
        for parent in list(model.modules()):
            for child, linear in list(parent.named_children()):
                if type(linear) is nn.Linear and child != "lm_head":
                    new = kind(
                        linear.in_features, linear.out_features, linear.bias is not None, **options
                    )
                    new.load_state_dict(linear.state_dict())
                    setattr(parent, child, new.to("cpu"))  # quantises
        setattr(model, flag, True)  # by which peft tells it
        return model

    return quantise


def _torchao(config: str) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own set-up
            torchao = importlib.import_module("torchao.quantization")
        torchao.quantize_(
            model,
            getattr(torchao, config)(),
            lambda module, name: type(module) is nn.Linear and name != "lm_head",
        )
        return model

    return quantise


def _4bit(compute_dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
    options = {"quant_type": "nf4", "compute_dtype": compute_dtype}
    return _bnb("Linear4bit", "is_loaded_in_4bit", **options)


QUANTISE = {
    "bitsandbytes 4 bit, fp32 products": _4bit(torch.float32),
    "bitsandbytes 4 bit, bf16 products": _4bit(torch.bfloat16),
    "bitsandbytes 8 bit": _bnb(
        "Linear8bitLt", "is_loaded_in_8bit", has_fp16_weights=False, threshold=6.0
    ),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": _torchao("Float8WeightOnlyConfig"),
}


def _on(*kinds: str) -> pytest.MarkDecorator:
    packages = {kind: kind.split()[0] for kind in kinds}
    missing = {p for p in packages.values() if importlib.util.find_spec(p) is None}
    return pytest.mark.parametrize(
        "kind",
        [
            pytest.param(
                kind, marks=pytest.mark.skipif(p in missing, reason=f"{p} is not installed")
            )
            for kind, p in packages.items()
        ],
    )


every_base = _on(*QUANTISE)


def quantised(kind: str, *names: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """One linear K -> N on a quantised base with these adapters, all active, B not zero."""
    torch.manual_seed(0)
    model = QUANTISE[kind](nn.Sequential(nn.Linear(K, N)).to(dtype))
    return _adapted(model, names or NAMES[:1], ["0"])


def _adapted(model: nn.Module, names: Any, targets: list[str]) -> PeftModel:
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    adapted.base_model.set_adapter(list(names))
    return adapted


def layer_of(model: PeftModel) -> nn.Module:
    return model.base_model.model[0]


class Step(NamedTuple):
    y: Tensor
    grads: dict[str, Tensor | None]


def step(model: nn.Module, x: Tensor, gates: Tensor | None = None) -> Step:
    """y and the gradients of x, gates and adapters, of one weighted sum of y."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    if gates is None:
        y = model(x)
    else:
        gates = gates.detach().clone().requires_grad_()
        with fedms.gated(model, gates, adapters=NAMES[: gates.shape[-1]]):
            y = model(x)
    (y * _dy(y)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return Step(y.detach(), grads | {"x": x.grad, "gates": None if gates is None else gates.grad})


def _dy(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)


def in_float64(model: PeftModel, x: Tensor, gates: Tensor | None = None) -> Step:
    """The same with the adapters' arithmetic in float64 around the base's own product."""
    layer = layer_of(model)
    mine = x.detach().clone().requires_grad_()
    base = layer.base_layer(mine)
    if base.requires_grad:
        (base * _dy(base)).sum().backward()
    names = layer.active_adapters
    x = x.double().requires_grad_()
    gates = torch.ones(len(names)) if gates is None else gates
    gates = gates.double().requires_grad_()
    y, factors = base.detach().double(), {}
    for e, name in enumerate(names):
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)[name].weight.detach().double().requires_grad_()
            factors[f"base_model.model.0.{part}.{name}.weight"] = weight
        A, B = list(factors.values())[-2:]
        y = y + gates[..., e, None] * layer.scaling[name] * (x @ A.T @ B.T)
    (y * _dy(base).double()).sum().backward()
    dx = x.grad if mine.grad is None else x.grad + mine.grad.double()
    grads = {name: factor.grad for name, factor in factors.items()}
    return Step(y.detach(), grads | {"x": dx, "gates": gates.grad})


def _errors(got: Step, exact: Step) -> dict[str, float]:
    pairs = {"y": (got.y, exact.y)}
    pairs |= {name: (grad, exact.grads[name]) for name, grad in got.grads.items()}
    return {n: relative_error(a, b) for n, (a, b) in pairs.items() if a is not None}


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("active", [1, 3])
def test_error_is_not_worse_than_pefts(kind, dtype, active):
    model = quantised(kind, *NAMES[:active], dtype=dtype)
    x = torch.randn(2, 20, K).to(dtype)
    exact = in_float64(model, x)
    stock = step(model, x)
    assert len(fedms.accelerate(model).fused) == 1
    with fused_calls() as calls:
        fused = step(model, x)
    assert len(calls) == 1
    assert fused.y.dtype == stock.y.dtype
    ours, theirs = _errors(fused, exact), _errors(stock, exact)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 + 2 * active
    for name, error in ours.items():
        assert error <= 1.5 * theirs[name] + 1e-6, f"{name}: {error:.1e}, peft {theirs[name]:.1e}"
    assert max(ours.values()) < (1e-5 if dtype == torch.float32 else 1e-2)


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gates_reach_the_adapters_and_not_the_base(kind, dtype):
    model = quantised(kind, *NAMES[:2], dtype=dtype)
    x, gates = torch.randn(2, 20, K).to(dtype), torch.rand(2, 20, 2)
    gates[0] = 0.0
    exact = in_float64(model, x, gates)
    fedms.accelerate(model)
    found = step(model, x, gates)
    errors = _errors(found, exact)
    assert {"x", "y", "gates"} < errors.keys()
    assert max(errors.values()) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(found.y[0], layer_of(model).base_layer(x)[0])


@every_base
def test_peft_goes_on_as_before(kind):
    """Its report, repr, disabling and our undoing: the base class is peft's own again."""
    model, x = quantised(kind), torch.randn(3, K)
    stock, text = type(layer_of(model)), repr(model)
    plain = copy.deepcopy(model)
    assert isinstance(layer_of(model), stock)
    report = fedms.accelerate(model)
    assert report.fallback == {}
    assert repr(model) == text
    with model.disable_adapter():
        assert torch.equal(model(x), layer_of(model).base_layer(x))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    fedms.restore(model)
    assert type(layer_of(model)) is stock
    assert torch.equal(model(x), plain(x))


@_on("bitsandbytes 4 bit, fp32 products", "bitsandbytes 8 bit")
@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module:UserWarning")
def test_merging_stays_pefts(kind):
    stock, x = quantised(kind), torch.randn(3, K)
    fused = copy.deepcopy(stock)
    fedms.accelerate(fused)
    for model in (stock, fused):
        model.merge_adapter()
    with fused_calls() as calls:
        assert torch.equal(fused(x), stock(x))
    assert not calls
    for model in (stock, fused):
        model.unmerge_adapter()
    torch.testing.assert_close(fused(x), stock(x))


@every_base
def test_enabled_for_every_model_made_later(kind):
    fedms.enable_peft()
    try:
        model = quantised(kind)
    finally:
        fedms.disable_peft()
    with fused_calls() as calls:
        model(torch.randn(3, K))
    assert len(calls) == 1


@every_base
def test_training_of_a_llama(kind):
    """Loss curves with checkpointing are peft's; gated and mixed batches train too."""
    torch.manual_seed(0)
    base = QUANTISE[kind](small_llama(hidden_size=64, intermediate_size=128))
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    stock = _adapted(base, NAMES[:2], ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    stock.enable_input_require_grads()
    stock.gradient_checkpointing_enable({"use_reentrant": False})
    stock.train()
    fused = copy.deepcopy(stock)
    assert len(fedms.accelerate(fused).fused) == 10
    ids = torch.randint(0, 40, (4, 12))
    curves = []
    for model in (stock, fused):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with fused_calls() as calls:
            curves.append([_train(model, optimiser, ids) for _ in range(4)])
        assert len(calls) == (4 * 10 * 2 if model is fused else 0)  # twice: checkpointing
    # dynamic int8 rounds activations: stock peft itself, nudged in its last bits, is as far from it
    rtol = 1e-3 if "dynamic" in kind else 2e-4
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=rtol, atol=0)
    assert curves[0][-1] < curves[0][0]
    gates = torch.full((4, 12, 2), 0.5, requires_grad=True)
    with fedms.gated(fused, gates):
        fused(input_ids=ids, labels=ids).loss.backward()
    assert gates.grad.norm() > 0
    with fedms.mixed_adapters(fused, ["one", "__base__", "two", "one"]):
        logits = fused(input_ids=ids).logits
    with fused.disable_adapter():
        assert torch.equal(logits[1], fused(input_ids=ids).logits[1])


def _train(model: nn.Module, optimiser: torch.optim.Optimizer, ids: Tensor) -> float:
    optimiser.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    return loss.item()
