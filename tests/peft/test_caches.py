"""`generate` on models whose cache does not say how many tokens it has seen."""

from __future__ import annotations

import pytest
import torch
from generating import NAMES, NEW, PROMPTS, append_best, generate
from peft_models import with_adapters
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

import fedms


@pytest.fixture(scope="module")
def mamba():
    """No layer of its cache knows how many tokens it has seen."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, hidden_size=32, state_size=8, num_hidden_layers=2)
    made = with_adapters(
        MambaForCausalLM(config), *NAMES, target_modules=["in_proj", "x_proj"], lora_alpha=16
    )
    made.base_model.set_adapter(NAMES)
    fedms.accelerate(made.eval())
    return made


@pytest.mark.parametrize("asked", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_a_cache_that_counts_no_tokens(mamba, asked):
    """Row-wise gates and names need no count; gates by token do, and say so."""
    prompts = [PROMPTS[0], PROMPTS[0][::-1]]
    gates = torch.tensor([[2.0, 0.0], [0.0, -2.0]])
    want = []
    for prompt, own in zip(prompts, gates, strict=True):
        with fedms.gated(mamba, own):
            want.append(generate(mamba, [prompt], **asked))
    with fedms.gated(mamba, gates):
        assert torch.equal(generate(mamba, prompts, **asked), torch.cat(want))
    if not asked:  # peft's own names, which know nothing of beams
        names = [NAMES[0], "__base__"]
        want_named = generate(mamba, prompts, adapter_names=names)
        with fedms.mixed_adapters(mamba, names):
            assert torch.equal(generate(mamba, prompts), want_named)
    with fedms.gated(mamba, gates[:, None].expand(2, len(PROMPTS[0]), 2)):
        if "use_cache" in asked:
            assert torch.equal(generate(mamba, prompts, **asked), torch.cat(want))
        else:
            with pytest.raises(ValueError, match="cache does not say how many tokens it has seen"):
                generate(mamba, prompts, **asked)


def test_a_state_that_is_no_cache():
    """RWKV's is a list of tensors, which says no more of a column than a missing cache would."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, context_length=32)
    made = with_adapters(RwkvForCausalLM(config), *NAMES, target_modules=["receptance"])
    made.base_model.set_adapter(NAMES)
    fedms.accelerate(made.eval())
    prompts = [PROMPTS[0], PROMPTS[0][::-1]]
    with fedms.gated(made, torch.ones(2, 2)):
        want = generate(made, prompts)
    assert torch.equal(generate(made, prompts), want)
    with (
        fedms.gated(made, torch.ones(2, len(PROMPTS[0]), 2)),
        pytest.raises(ValueError, match="cache does not say how many tokens it has seen"),
    ):
        generate(made, prompts)


def test_a_routed_model_whose_cache_counts_no_tokens(mamba):
    routed = fedms.RoutedModel(mamba, fedms.Router(32, 2), NAMES).eval()
    nn.init.normal_(routed.router.layers[0].weight, std=3.0)
    prompts = [PROMPTS[0], PROMPTS[0][::-1]]
    want = torch.tensor(prompts)
    for _ in range(NEW):
        with torch.no_grad():
            want = append_best(want, routed(input_ids=want, use_cache=False).logits)
    assert torch.equal(generate(routed, prompts), want[:, len(PROMPTS[0]) :])
    beams = {"num_beams": 3}
    whole = generate(routed, prompts, use_cache=False, **beams)
    assert torch.equal(generate(routed, prompts, **beams), whole)
    other = mamba(input_ids=torch.tensor(prompts), use_cache=True)
    name, cache = next((k, v) for k, v in other.items() if hasattr(v, "get_seq_length"))
    with pytest.raises(ValueError, match="must be empty or come from a RoutedModel"):
        routed(input_ids=torch.tensor(prompts), **{name: cache})
