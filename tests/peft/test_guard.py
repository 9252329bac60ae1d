"""When a call goes to peft's own forward, and that it says why."""

from __future__ import annotations

import pytest
import torch
from peft_models import IN, fused_calls, mlp
from torch import Tensor, nn

import fedms
from fedms.peft import why_not_fused


@pytest.fixture
def model():
    made = mlp("one", "two", lora_dropout=0.1).eval()
    made.base_model.set_adapter(["one", "two"])
    fedms.accelerate(made)
    return made


def _layer(model):
    return model.base_model.model.a


def _hook(name):
    def change(model):
        module = getattr(_layer(model), name)["two"]
        module.register_forward_hook(lambda *args: None)

    return change


def _own_forward(model):
    module = _layer(model).lora_A["one"]
    module.forward = lambda x, old=module.forward: old(x)


def _half(model):
    _layer(model).lora_A["two"].bfloat16()
    _layer(model).lora_B["two"].bfloat16()


def _parametrize(model):
    nn.utils.parametrizations.weight_norm(_layer(model).lora_B["one"])


def _full_dropout(model):
    for name in ("one", "two"):
        _layer(model).lora_dropout[name] = nn.Dropout(1.0).train()


def _other_dropout(model):
    _layer(model).lora_dropout["one"] = nn.AlphaDropout(0.1).eval()


def _meta(model):
    layer = _layer(model)
    layer.lora_A["one"] = nn.Linear(IN, 4, bias=False, device="meta")


REASONS = {
    "hook on A": (_hook("lora_A"), "has hooks or a forward of its own"),
    "hook on B": (_hook("lora_B"), "has hooks or a forward of its own"),
    "hook on dropout": (_hook("lora_dropout"), "has hooks or a forward of its own"),
    "instance forward": (_own_forward, "has hooks or a forward of its own"),
    "mixed dtypes": (_half, "the adapters mix torch.float32 and torch.bfloat16"),
    "parametrized": (_parametrize, "is made of Linear and ParametrizedLinear"),
    "dropout of 1": (_full_dropout, "dropout is 1"),
    "other dropout": (_other_dropout, "drops out with AlphaDropout"),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), "adapters are disabled"),
    "merged": (lambda m: m.merge_adapter(), "adapters are merged"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(model, case):
    change, reason = REASONS[case]
    layer, x = _layer(model), torch.randn(3, IN)
    assert why_not_fused(layer, x) is None
    change(model)
    assert reason in why_not_fused(layer, x)
    with fused_calls() as calls:
        ours = layer(x)
    assert not calls
    fedms.restore(model)
    torch.testing.assert_close(ours, layer(x))


def test_weights_without_data(model):
    _meta(model)
    assert "has no data here" in why_not_fused(_layer(model))


def test_arguments_and_inputs(model):
    layer, x = _layer(model), torch.randn(3, IN)
    assert "more arguments than x" in why_not_fused(layer, x, (), {"adapter_names": ["one"]})
    assert "the input is a Tensor torch.int64" in why_not_fused(layer, torch.ones(3, IN).long())
    assert "the input is a list" in why_not_fused(layer, [1.0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: torch.nested.as_nested_tensor([x, x[:2]], layout=torch.jagged), "nested"),
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
    ],
)
def test_inputs_that_are_not_strided(model, change, reason):
    layer, x = _layer(model), torch.randn(3, IN)
    want = layer(x)
    got = layer(change(x))
    for part in got.unbind() if got.is_nested else [got]:
        torch.testing.assert_close(part, want[: len(part)])
    assert fedms.stats(model).fallback == {f"the input is {reason}": 1}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize(
    ("where", "fallback"),
    [
        ("base_layer", {}),
        ("lora_A", {"a weight of adapter 'one' is a Parameter torch.float32 torch.sparse_csr": 1}),
    ],
)
def test_sparse_weights(model, where, fallback):
    """torch multiplies by them: a base layer's product stays its own, a factor's is peft's."""
    layer, x = _layer(model), torch.randn(3, IN, requires_grad=True)
    linear = layer.base_layer if where == "base_layer" else layer.lora_A["one"]
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse_csr(), requires_grad=False)

    def results() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y.sum(), x)

    got = results()
    assert fedms.stats(model).fallback == fallback
    fedms.restore(model)
    torch.testing.assert_close(got, results())


def test_global_hooks_see_every_module(model):
    layer, x, seen = _layer(model), torch.randn(3, IN), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(m))
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.lora_A["one"] in seen
    with fused_calls() as calls:
        layer(x)
    assert len(calls) == 1


def test_functional_transforms_and_forward_mode(model):
    layer, x = _layer(model), torch.randn(3, IN)
    got = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)
    y, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    fedms.restore(model)
    want = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close((y, tangent), torch.func.jvp(layer, (x,), (torch.ones_like(x),)))


def test_gates_under_functional_transforms(model):
    layer, x, gates = _layer(model), torch.randn(3, IN), torch.rand(2)

    def gradients(rows: Tensor, gates: Tensor) -> Tensor:
        with fedms.gated(model, gates, adapters=["one", "two"]):
            return torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(rows)

    base, one, two, both = (
        gradients(x, torch.tensor(g)) for g in ([0.0, 0], [1.0, 0], [0.0, 1], [*gates.tolist()])
    )
    torch.testing.assert_close(both, base + gates[0] * (one - base) + gates[1] * (two - base))
    model.set_adapter("one")
    fedms.restore(model)
    want = torch.func.vmap(torch.func.grad(lambda row: layer(row).sum()))(x)
    torch.testing.assert_close(one, want)


def test_exported_and_traced_programs_hold_torch_ops_only(model):
    x = torch.randn(3, IN)
    traced = torch.jit.trace(_layer(model), (x,))
    assert "fedms::" not in str(traced.graph)
    assert "_GatedLora" not in str(traced.graph)
    program = torch.export.export(model, (x,))
    assert "fedms" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_compile_without_gradients(context):
    """Dynamo fails on an autograd.Function then, with one adapter in a fresh process."""
    torch.compiler.reset()
    model, x = mlp().eval(), torch.randn(3, IN)
    fedms.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with context():
        torch.testing.assert_close(compiled(x), model(x))


def test_compile_with_dropout_stays_whole(model):
    x = torch.randn(3, IN)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with fused_calls() as calls:
        torch.testing.assert_close(compiled(x), model(x))
    assert calls
    model.train()
    assert compiled(x).shape == model(x).shape
    assert not torch.equal(compiled(x), compiled(x))
