"""From every block on, each architecture gives what transformers' own whole forward gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as t
from torch import nn

from fedms.fl.model.blocks import Blocks
from fedms.fl.types import FedMSError

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
}
IMAGE = {"image_size": 28, "patch_size": 7}
BOS_EOS = {"bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0, **BOS_EOS, **SIZES}
GROUPED = {**TEXT, "num_key_value_heads": 1}
SLIDING = {**GROUPED, "sliding_window": 3}

ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: t.ViTModel(t.ViTConfig(**SIZES, **IMAGE)),
    "deit": lambda: t.DeiTModel(t.DeiTConfig(**SIZES, **IMAGE)),
    "beit": lambda: t.BeitModel(
        t.BeitConfig(**SIZES, **IMAGE, use_relative_position_bias=True, layer_scale_init_value=0.1)
    ),
    "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**SIZES, **IMAGE)),
    "dinov2 with registers": lambda: t.Dinov2WithRegistersModel(
        t.Dinov2WithRegistersConfig(**SIZES, **IMAGE)
    ),
    "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**SIZES, **IMAGE)),
    "clip": lambda: t.CLIPVisionModelWithProjection(
        t.CLIPVisionConfig(**SIZES, **IMAGE, projection_dim=16)
    ),
    "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES, **IMAGE)),
}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SLIDING)),
    "qwen2": lambda: t.Qwen2ForCausalLM(
        t.Qwen2Config(**SLIDING, use_sliding_window=True, max_window_layers=2)
    ),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SLIDING, head_dim=16)),
    "gemma3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(
            **SLIDING, head_dim=16, layer_types=["sliding_attention", "full_attention"] * 2
        )
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=4, n_head=2, **BOS_EOS)
    ),
    "gpt neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**TEXT, ffn_dim=64, word_embed_proj_dim=32)),
    "bloom": lambda: t.BloomForCausalLM(
        t.BloomConfig(vocab_size=61, hidden_size=32, n_layer=4, n_head=2, **BOS_EOS)
    ),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**TEXT)),
}


def random_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """Weights so large that a wrong position, mask or norm shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
    return model


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Three images, or three rows of which two are padded."""
    draw = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 28, 28, generator=draw)}
    ids = torch.randint(3, 61, (3, 12), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, 9:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_from_every_block_on_it_is_the_whole_forward(name):
    model = random_weights({**ENCODERS, **DECODERS}[name])
    inputs = inputs_of(model)
    more = {} if name in ENCODERS else {"use_cache": False}
    body = model if name in ENCODERS else model.base_model
    blocks = Blocks(model)
    assert len(blocks) == 4

    def forward(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = body(**changed, **more).last_hidden_state
        mask = inputs.get("attention_mask")
        return hidden if mask is None else hidden * mask.unsqueeze(-1)

    # What is read below the start may be anything of the same shape: images need not be decoded.
    other = {
        key: torch.zeros(()).expand(value.shape) if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    if "input_ids" in other:
        other["input_ids"] = torch.full_like(inputs["input_ids"], 5)
    with torch.no_grad():
        whole = forward(inputs)
        entering = blocks.entering(lambda: forward(inputs), [1, 2, 3])
        for depth in (1, 2, 3):
            with blocks.starting_at(depth, entering[depth]):
                torch.testing.assert_close(forward(other), whole, rtol=0, atol=1e-6)
            with blocks.starting_at(depth, entering[depth].roll(1, 0)):
                assert (forward(other) - whole).abs().max() > 1e-2
        assert torch.equal(forward(inputs), whole)  # everything is back in its place


def test_a_forward_is_left_when_all_is_seen():
    model = random_weights(ENCODERS["vit"])
    blocks, run = Blocks(model), []
    for index in range(4):
        blocks[index].register_forward_hook(lambda *_, index=index: run.append(index))
    seen = blocks.entering(lambda: model(**inputs_of(model)), [2])
    assert list(seen) == [2]
    assert run == [0, 1]


def test_models_that_are_not_one_list_of_blocks():
    swin = t.SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2
    )
    swin.num_hidden_layers = 4
    with pytest.raises(FedMSError, match="SwinModel has no list of 4 blocks"):
        Blocks(t.SwinModel(swin))
    t5 = t.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(FedMSError, match="T5Model is an encoder and a decoder"):
        Blocks(t.T5Model(t5))
