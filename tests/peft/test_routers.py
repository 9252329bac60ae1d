"""Routers: what they give, that top-k skips the rest, and that they learn."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fedms
from fedms.kernels import native
from fedms.peft import layer as fused_layer

NAMES = ["one", "two", "three"]


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    lora = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    made = get_peft_model(LlamaForCausalLM(config), LoraConfig(**lora), adapter_name="one")
    for name in NAMES[1:]:
        made.add_adapter(name, LoraConfig(**lora))
    made.base_model.set_adapter(NAMES)
    fedms.accelerate(made)
    made.requires_grad_(False)
    return made


def test_router_starts_at_equal_gates():
    gates = fedms.Router(8, 4, hidden_features=6)(torch.randn(2, 5, 8, dtype=torch.bfloat16))
    torch.testing.assert_close(gates, torch.full((2, 5, 4), 0.25))


def test_top_k_lists_the_best():
    router, x = fedms.Router(8, 4, top_k=2), torch.randn(2, 5, 8)
    gates, idxs = router(x)
    probabilities = router.layers(x).softmax(-1)
    assert gates.shape == idxs.shape == (2, 5, 2)
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 5))
    rest = probabilities.scatter(-1, idxs, 0.0)
    assert (rest.amax(-1) <= probabilities.gather(-1, idxs).amin(-1)).all()
    one = fedms.Router(8, 4, top_k=1)
    one(x)[0].sum().backward()
    assert one.layers[0].weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"in \[1, 4\], got 5"):
        fedms.Router(8, 4, top_k=5)


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_adapters_that_no_token_lists_are_not_computed(model):
    """NaN in such an adapter reaches neither the result nor a gradient."""

    def only_two(x):
        idxs = torch.ones(*x.shape[:-1], 1, dtype=torch.int64)
        return idxs.to(x.dtype), idxs

    ids = torch.arange(10).reshape(2, 5)
    with fedms.gated(model, None, adapters=["two"]):
        want = model(ids).logits
    for name, p in model.named_parameters():
        if "three" in name:
            p.data.fill_(float("nan"))
    with fedms.gated(model, only_two, adapters=NAMES):
        torch.testing.assert_close(model(ids).logits, want)


@pytest.mark.parametrize("top_k", [None, 2])
def test_layer_routers_train(model, top_k):
    routers = fedms.LayerRouters(model, NAMES, top_k=top_k)
    assert len(routers.routers) == 4
    ids = torch.randint(0, 40, (4, 8))
    losses = _train(routers, lambda: _gated_loss(model, routers, ids))
    assert losses[-1] < losses[0] - 1e-3


def _gated_loss(model, routers, ids):
    with fedms.gated(model, routers.gates(), adapters=routers.adapters):
        return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("top_k", [None, 2])
def test_routed_model_trains_the_router_alone(model, top_k):
    routed = fedms.RoutedModel(model, fedms.Router(32, 3, top_k=top_k), NAMES)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 40, (4, 8))
    losses = _train(routed, lambda: routed(input_ids=ids, labels=ids).loss)
    assert losses[-1] < losses[0] - 1e-3
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert not p.requires_grad


def test_routed_model_equals_its_gates_by_hand(model, monkeypatch):
    router = fedms.Router(32, 3)
    nn.init.normal_(router.layers[0].weight)
    routed, ids = fedms.RoutedModel(model, router, NAMES).eval(), torch.arange(10).reshape(2, 5)
    with model.disable_adapter():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
    gates = router(hidden)
    assert gates.std() > 0.05
    seen = []
    op = fused_layer.gated_lora_linear

    def noted(*args, **kwargs):
        seen.append(kwargs["gates"])
        return op(*args, **kwargs)

    monkeypatch.setattr(fused_layer, "gated_lora_linear", noted)
    routed(ids)
    assert len(seen) == 4
    for found in seen:
        torch.testing.assert_close(found, gates)


def _train(module, loss_of):
    optimiser = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = loss_of()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses
