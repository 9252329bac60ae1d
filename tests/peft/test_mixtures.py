"""peft's X-LoRA and Arrow on the op give what peft's loops give, and skip what is not picked."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import ArrowConfig, XLoraConfig, get_peft_model
from peft.tuners.lora import create_arrow_model
from peft_models import fused_calls, small_llama, with_adapters

import fedms
from fedms.kernels import native

TARGETS = ["q_proj", "down_proj"]
IDS = torch.arange(12).reshape(2, 6)

pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # lora_bias


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters of one shape, saved."""
    return _saved(tmp_path_factory)


@pytest.fixture(scope="module")
def uncommon(tmp_path_factory):
    """Three with a dropout and biases."""
    return _saved(tmp_path_factory, lora_dropout=0.5, lora_bias=True)


def _saved(tmp_path_factory, **config):
    found = []
    for i in range(3):
        folder = tmp_path_factory.mktemp(f"adapter{i}")
        torch.manual_seed(i)
        model = with_adapters(small_llama(), target_modules=TARGETS, **config)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
        model.save_pretrained(folder)
        found.append(str(folder))
    return found


def _xlora(folders, **config):
    torch.manual_seed(0)
    model = get_peft_model(
        small_llama(use_cache=False),
        XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, xlora_size=16,
            adapters={str(i): folder for i, folder in enumerate(folders)}, **config,
        ),
    )  # fmt: skip
    for p in model.internal_xlora_classifier.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def _step(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "config",
    [
        {}, {"top_k_lora": 2}, {"layerwise_scalings": True},
        {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
        {"use_trainable_adapters": True, "global_scaling_weight": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_xlora(folders, config):
    model = _xlora(folders, **config)
    want = _step(model)
    assert len(want) > 4
    assert len(fedms.accelerate(model).fused) == 4
    with fused_calls() as calls:
        got = _step(model)
    assert len(calls) == 8  # the scaling pass too
    width = config.get("top_k_lora")
    assert all((c["expert_idxs"] is None) == (width is None) for c in calls)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    fedms.restore(model)
    with fused_calls() as calls:
        assert all(map(torch.equal, _step(model), want))
    assert not calls


@pytest.mark.parametrize("top_k", [None, 1])
def test_xlora_leaves_biases_ungated(uncommon, top_k):
    """peft's scalings enter before A: a bias of B is scaled alone, whoever is picked."""
    model = _xlora(uncommon, top_k_lora=top_k, global_scaling_weight=0.3).eval()
    want = _step(model)
    fedms.accelerate(model)
    with fused_calls() as calls:
        got = _step(model)
    assert len(calls) == 8
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", ["folders", "uncommon"])
def test_xlora_that_picks_none(request, which):
    """The base alone, and what biases add."""
    with pytest.warns(UserWarning, match="top_k_lora"):
        model = _xlora(request.getfixturevalue(which), top_k_lora=0).eval()
    want = _step(model)
    fedms.accelerate(model)
    for ours, theirs in zip(_step(model), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not fedms.stats(model).fallback


@pytest.mark.skipif(not native.available(), reason="the extension is not built")
def test_xlora_computes_what_is_picked(folders):
    """NaN in an adapter that no token picks reaches nothing; peft's zero times NaN does."""
    model = _xlora(folders, top_k_lora=1)
    layer = model.base_model.lora_model.model.model.layers[0].mlp.down_proj
    x, scalings = torch.randn(2, 6, 48), torch.tensor([5.0, 0.0, 1.0]).expand(2, 6, 4, 3)
    want = layer(x, scalings=scalings)
    fedms.accelerate(model)
    layer.lora_A["1"].weight.data.fill_(torch.nan)
    torch.testing.assert_close(layer(x, scalings=scalings), want)


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: fedms.set_gates(m, torch.zeros(3), adapters=["0", "1", "2"]),
        lambda m: fedms.set_gates(m, None, adapters=[]),
        lambda m: fedms.set_gates(m, {"q_proj": torch.zeros(3)}),
        lambda m: fedms.gated(m, torch.zeros(3)).__enter__(),
        lambda m: fedms.set_adapter_names(m, ["__base__", "0"]),
        lambda m: fedms.mixed_adapters(m, ["__base__", "0"]).__enter__(),
        lambda m: fedms.RoutedModel(m, fedms.Router(32, 3), ["0", "1", "2"])(input_ids=IDS),
    ],
    ids=["gates", "no adapter", "by layer", "block", "names", "block of names", "routed"],
)
def test_xlora_takes_no_other_gates(folders, ask):
    """Its own classifier gates: others would be left out in silence."""
    model = _xlora(folders)
    fedms.accelerate(model)
    with pytest.raises(ValueError, match="got a model whose X-LoRA classifier gates"):
        ask(model)
    fedms.set_gates(model, None)
    with fedms.gated(model, None):
        model(input_ids=IDS)


def test_xlora_generates_and_is_switched_off(folders):
    model, asked = _xlora(folders), {"max_new_tokens": 2, "pad_token_id": 0, "do_sample": False}
    want = model.generate(input_ids=IDS, **asked)
    fedms.accelerate(model)
    assert torch.equal(model.generate(input_ids=IDS, **asked), want)
    assert not fedms.stats(model, reset=True).fallback
    with model.disable_adapter():
        model(input_ids=IDS)
    assert fedms.stats(model).fallback == {"adapters are disabled": 4}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("use_gks", [False, True])
def test_arrow(folders, top_k, use_gks):
    config = ArrowConfig(top_k=top_k, router_temperature=0.7, rng_seed=1, use_gks=use_gks)
    general = folders[2:] if use_gks else None
    model = create_arrow_model(small_llama(), folders[:2], config, general).eval()
    stock = copy.deepcopy(model)
    assert len(fedms.accelerate(model).fused) == 4
    inputs = []
    for one in (stock, model):
        embeddings = stock.get_input_embeddings()(IDS).detach().requires_grad_()
        with fused_calls() as calls:
            logits = one(inputs_embeds=embeddings).logits
        logits.square().sum().backward()
        inputs.append((logits.detach(), embeddings.grad))
    assert len(calls) == 4
    assert all(c["expert_idxs"].shape[-1] == top_k for c in calls)
    for ours, theirs in zip(*inputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    model.set_adapter("task_0")
    stock.set_adapter("task_0")
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=1e-4, atol=1e-5)


def test_arrow_leaves_out_the_task_adapters_dropout_and_biases(uncommon):
    """peft routes over their factors alone, and its router has no dropout of its own."""
    model = create_arrow_model(small_llama(), uncommon[:2], ArrowConfig(top_k=1, rng_seed=1))
    stock = copy.deepcopy(model.train())
    fedms.accelerate(model)
    with fused_calls() as calls:
        got = model(IDS).logits
    assert [len(call["expert_idxs"][0, 0]) for call in calls] == [1] * 4
    torch.testing.assert_close(got, stock(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not fedms.stats(model).fallback


def test_arrow_with_dropout_is_pefts_own(folders):
    """peft drops out of what the adapters add, not of their input."""
    model = create_arrow_model(small_llama(), folders[:2], ArrowConfig(top_k=1, rng_seed=1))
    fedms.accelerate(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_dropout["arrow_router"] = torch.nn.Dropout(0.5)
    stock = copy.deepcopy(model.train())
    fedms.restore(stock)
    logits = []
    for one in (model, stock):
        torch.manual_seed(1)
        logits.append(one(IDS).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    why = "adapter 'arrow_router' is a variant (ArrowLinearVariant)"
    stats = fedms.stats(model)
    assert (stats.fused, stats.fallback) == (3, {why: 1})
