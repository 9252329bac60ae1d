"""Linears with experts: paths, gates, what an inactive one costs, peft's format both ways."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from fedms.fl.model.layers import (
    GatedLoraLinear,
    Routing,
    add_experts,
    gated_layers,
    load_adapter,
    routed,
    save_adapter,
)

TARGETS = ["query", "value", "attention.output.dense"]


class Two(nn.Module):
    """Two linears, the second twice as wide as it is long."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.inner = nn.Sequential(nn.Linear(8, 4, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.tanh(self.first(x)))


def trained(layers: dict[str, GatedLoraLinear]) -> dict[str, GatedLoraLinear]:
    with torch.no_grad():
        for layer in layers.values():
            for expert in layer.lora_B:
                layer.factors(expert)[1].normal_()
    return layers


@pytest.fixture
def model() -> Two:
    return Two()


@pytest.fixture
def layers(model: Two) -> dict[str, GatedLoraLinear]:
    return trained(add_experts(model, ["first", "0"], ["a", "b"], r=2, alpha=3.0))


def test_one_expert_by_hand():
    layer = GatedLoraLinear(nn.Linear(3, 2), Routing())
    layer.add_expert("a", r=2, alpha=6.0)
    A, B = layer.factors("a")
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.copy_(torch.tensor([10.0, 20.0]))
        A.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
        B.copy_(torch.tensor([[1.0, 1.0], [0.0, -1.0]]))
    x = torch.tensor([[1.0, 2.0, 99.0]])
    # A x = (1, 4); B A x = (5, -4); alpha / r = 3
    with routed({"": layer}, ["a"]):
        assert layer(x).tolist() == [[25.0, 8.0]]
    with routed({"": layer}, ["a"], gates=torch.tensor([[0.5]])):
        assert layer(x).tolist() == [[17.5, 14.0]]
    assert layer(x).tolist() == [[10.0, 20.0]]


def test_a_new_expert_starts_as_in_peft():
    layer = GatedLoraLinear(nn.Linear(100, 5), Routing())
    layer.add_expert("a", r=50, alpha=1.0)
    A, B = layer.factors("a")
    assert (B == 0).all()
    bound = 1 / math.sqrt(100)  # Kaiming-uniform with a = sqrt(5)
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert layer.scaling["a"] == 1 / 50


def test_paths_are_equal_parts_of_the_batch(model, layers):
    x = torch.randn(6, 5, 6)
    with routed(layers, ["a"], ["b"]):
        together = model(x)
    for half, expert in ((slice(0, 3), "a"), (slice(3, 6), "b")):
        with routed(layers, [expert]):
            torch.testing.assert_close(together[half], model(x[half]), rtol=0, atol=1e-6)
    with routed(layers, ["a", "b"], [], ["b"]):
        together = model(x)
    for part, path in zip(x.chunk(3), (["a", "b"], [], ["b"]), strict=True):
        with routed(layers, path):
            wanted = model(part)
        torch.testing.assert_close(together[:2], wanted, rtol=0, atol=1e-6)
        together = together[2:]


def test_gates_are_per_sample_and_exact(model, layers):
    x = torch.randn(4, 5, 6)
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    with routed(layers, ["a", "b"], gates=gates):
        gated = model(x)
    for row, path in enumerate((["a"], ["b"], ["a", "b"], [])):
        with routed(layers, path):
            torch.testing.assert_close(gated[row], model(x)[row], rtol=0, atol=1e-6)


def test_gates_follow_the_names_not_the_order_of_the_experts(model, layers):
    x, gates = torch.randn(4, 5, 6), torch.rand(4, 2)
    with routed(layers, ["a", "b"], gates=gates):
        one = model(x)
    with routed(layers, ["b", "a"], gates=gates.flip(1)):
        torch.testing.assert_close(model(x), one, rtol=0, atol=1e-6)


def test_gates_have_gradients_at_zero_too(model, layers):
    x = torch.randn(2, 5, 6)
    gates = torch.tensor([[0.0, 0.7], [0.3, 0.0]], requires_grad=True)

    def output(gates: torch.Tensor) -> torch.Tensor:
        with routed(layers, ["a", "b"], gates=gates):
            return model(x).square().sum()

    (slope,) = torch.autograd.grad(output(gates), gates)
    step, base = 1e-3, gates.detach()
    for i in range(2):
        for j in range(2):
            nudge = torch.zeros(2, 2)
            nudge[i, j] = step
            wanted = (output(base + nudge) - output(base - nudge)) / (2 * step)
            assert slope[i, j].item() == pytest.approx(wanted.item(), rel=1e-2, abs=1e-2)


def test_an_inactive_expert_costs_nothing(model, layers):
    x = torch.randn(4, 6)
    base = nn.functional.linear(
        torch.tanh(layers["first"].base_layer(x)), layers["inner.0"].base_layer.weight
    )
    assert torch.equal(model(x), base)
    assert not model(x).requires_grad
    with routed(layers, ["unknown"]):
        assert torch.equal(model(x), base)
    for layer in layers.values():
        layer.awake = False
    with routed(layers, ["a", "b"], gates=torch.rand(4, 2)):
        out = model(x)
    assert torch.equal(out, base)
    assert out.grad_fn is None


def test_only_active_experts_get_gradients(model, layers):
    layers["inner.0"].awake = False
    with routed(layers, ["a"]):
        model(torch.randn(4, 6)).sum().backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {"first.lora_A.a.weight", "first.lora_B.a.weight"}


def test_a_frozen_expert_takes_part_without_a_gradient(model, layers):
    for layer in layers.values():
        for parameter in layer.factors("a"):
            parameter.requires_grad_(False)
    with routed(layers, ["a", "b"]):
        model(torch.randn(4, 6)).sum().backward()
    with_grad = {n.split(".")[-2] for n, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {"b"}


def test_dropout_acts_in_training_only(model):
    layers = trained(add_experts(model, ["first"], ["a"], r=2, alpha=3.0, dropout=0.5))
    x = torch.randn(50, 6)
    with routed(layers, ["a"]), torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        still = model(x)
        assert torch.equal(model(x), still)
    with torch.no_grad():
        weight = layers["first"].base_layer.weight
        A, B = layers["first"].factors("a")
        wanted = model.inner(
            torch.tanh(
                nn.functional.linear(x, weight + 1.5 * B @ A, layers["first"].base_layer.bias)
            )
        )
    torch.testing.assert_close(still, wanted, rtol=0, atol=1e-5)


def test_the_route_before_is_back_afterwards_even_after_an_error(model, layers):
    routing = layers["first"]._routing
    gates = torch.rand(4, 1)

    def fail() -> None:
        with routed(layers, ["b"], ["a"]):
            assert routing.paths == (("b",), ("a",))
            raise RuntimeError("inside")

    with routed(layers, ["a"], gates=gates):
        with pytest.raises(RuntimeError, match="inside"):
            fail()
        assert routing.paths == (("a",),)
        assert routing.gates is gates
    assert (routing.paths, routing.gates) == (((),), None)


def test_targets_are_dotted_names_or_their_ends(model):
    assert set(add_experts(model, ["inner.0"], ["a"], r=1, alpha=1.0)) == {"inner.0"}
    assert isinstance(model.inner[0], GatedLoraLinear)
    assert isinstance(model.first, nn.Linear)
    assert set(gated_layers(model)) == {"inner.0"}
    assert not model.inner[0].base_layer.weight.requires_grad
    with pytest.raises(
        ValueError,
        match=r"no linear of the model is named 'irst'; its linears end in .*first",
    ):
        add_experts(model, ["irst"], ["a"], r=1, alpha=1.0)


def test_gates_with_several_paths(layers):
    with (
        pytest.raises(ValueError, match="gates go with one path of experts, got 2 paths"),
        routed(layers, ["a"], ["b"], gates=torch.rand(4, 2)),
    ):
        pass


# peft ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert_config():
    transformers = pytest.importorskip("transformers")
    return transformers.BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )


def bert(config):
    from transformers import BertModel

    torch.manual_seed(0)
    return BertModel(config).eval()


def output_of(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).view(3, 8)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_peft_loads_what_was_saved(bert_config, tmp_path):
    peft = pytest.importorskip("peft")
    model = bert(bert_config)
    layers = trained(add_experts(model, TARGETS, ["local"], r=4, alpha=6.0))
    layers["encoder.layer.0.attention.self.value"].awake = False
    model.eval()
    with routed(layers, ["local"]):
        ours = output_of(model)
    save_adapter(layers, "local", tmp_path)
    theirs = peft.PeftModel.from_pretrained(bert(bert_config), tmp_path)
    assert relative_error(output_of(theirs), ours) < 1e-6
    assert (ours - output_of(bert(bert_config))).abs().max() > 1e-2
    saved = peft.LoraConfig.from_pretrained(tmp_path)
    assert (saved.r, saved.lora_alpha, saved.bias) == (4, 6.0, "none")
    assert len(saved.target_modules) == 5


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saved_is_loaded(bert_config, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=rslora, init_lora_weights=False
    )
    theirs = peft.get_peft_model(bert(bert_config), settings).eval()
    theirs.save_pretrained(tmp_path)
    model = bert(bert_config)
    layers = add_experts(model, [*TARGETS, "key"], ["global", "local"], r=2, alpha=1.0)
    load_adapter(layers, "local", tmp_path)
    model.eval()
    with routed(layers, ["local"]):
        assert relative_error(output_of(model), output_of(theirs)) < 1e-6
    key = layers["encoder.layer.0.attention.self.key"]
    assert set(key.lora_A) == {"global"}  # the file does not name it
    query = layers["encoder.layer.0.attention.self.query"]
    assert len(query.factors("local")[0]) == 4
    assert query.scaling["local"] == pytest.approx(6 / 2 if rslora else 6 / 4)
    assert query.scaling["global"] == 0.5


def test_a_saved_expert_comes_back_bit_by_bit(bert_config, tmp_path):
    one = trained(add_experts(bert(bert_config), TARGETS, ["global"], r=3, alpha=5.0, dropout=0.25))
    save_adapter(one, "global", tmp_path / "deep" / "down", base_model="tiny")
    two = add_experts(bert(bert_config), TARGETS, ["local"], r=3, alpha=1.0)
    load_adapter(two, "local", tmp_path / "deep" / "down")
    for name, layer in one.items():
        for saved, loaded in zip(layer.factors("global"), two[name].factors("local"), strict=True):
            assert torch.equal(saved, loaded)
        assert two[name].scaling["local"] == pytest.approx(layer.scaling["global"])
        assert two[name].dropout["local"] == 0.25
    config = json.loads((tmp_path / "deep" / "down" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


def test_adapters_that_cannot_be_loaded(bert_config, tmp_path):
    layers = add_experts(bert(bert_config), TARGETS, ["global"], r=3, alpha=5.0)
    save_adapter(layers, "global", tmp_path)
    few = add_experts(bert(bert_config), ["query"], ["global"], r=3, alpha=5.0)
    with pytest.raises(
        ValueError, match=r"has weights for \['encoder.layer.0.attention.output.dense'"
    ):
        load_adapter(few, "global", tmp_path)
    path = tmp_path / "adapter_config.json"
    plain = json.loads(path.read_text())
    for change, named in (
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"query": 4}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
    ):
        path.write_text(json.dumps({**plain, **change}))
        with pytest.raises(ValueError, match=f"must hold a plain LoRA adapter, got .*{named}"):
            load_adapter(layers, "global", tmp_path)


def test_trained_biases_are_not_dropped_in_silence(bert_config, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["query"], bias="lora_only")
    peft.get_peft_model(bert(bert_config), settings).save_pretrained(tmp_path)
    layers = add_experts(bert(bert_config), ["query"], ["global"], r=2, alpha=1.0)
    with pytest.raises(ValueError, match="has weights for"):
        load_adapter(layers, "global", tmp_path)


def test_nothing_to_save(layers, tmp_path):
    with pytest.raises(ValueError, match="no awake layer holds the expert 'c'"):
        save_adapter(layers, "c", tmp_path)
    for layer in layers.values():
        layer.awake = False
    with pytest.raises(ValueError, match="no awake layer holds the expert 'a'"):
        save_adapter(layers, "a", tmp_path)
