"""A tiny model of each architecture, with weights so large that a wrong position or norm shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as t
from torch import nn

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
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**GROUPED, logits_scaling=4.0)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**GROUPED, logit_scale=0.25)),
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


def clip() -> nn.Module:
    """Two towers and a projection of each."""
    return t.CLIPModel(
        t.CLIPConfig(
            text_config={**SIZES, "vocab_size": 61, "max_position_embeddings": 16, **BOS_EOS},
            vision_config={**SIZES, **IMAGE},
            projection_dim=24,
        )
    )


def siglip() -> nn.Module:
    """Two towers; the image tower pools by attention."""
    return t.SiglipModel(
        t.SiglipConfig(
            text_config={
                **SIZES, "vocab_size": 61, "max_position_embeddings": 16, "projection_size": 32
            },
            vision_config={**SIZES, **IMAGE},
        )
    )  # fmt: skip
