"""Small random models under the names of the hub models that peft's tests load.

transformers takes a folder of that name below the working folder for the model, so nothing of peft
or transformers is patched. Architecture and tokenizer are real, weights are random, and sizes are
what the tests ask of them: two layers, 1024 tokens (some tests name token 1000).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 2, 1024


def _sizes(**more: Any) -> dict[str, Any]:
    """What nearly every config calls the same."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        **more,
    }  # fmt: skip


def _decoder(kind: str, **more: Any) -> Callable[[], transformers.PreTrainedModel]:
    values = _sizes(**{"num_key_value_heads": 2, **more})
    return _model(f"{kind}ForCausalLM", f"{kind}Config", **values)


def _encoder(architecture: str, **more: Any) -> Callable[[], transformers.PreTrainedModel]:
    kind = architecture.removesuffix("Model").removesuffix("ForSequenceClassification")
    return _model(architecture, f"{kind}Config", **_sizes(type_vocab_size=2, **more))


def _model(
    architecture: str, config: str, **values: Any
) -> Callable[[], transformers.PreTrainedModel]:
    def make() -> transformers.PreTrainedModel:
        return getattr(transformers, architecture)(getattr(transformers, config)(**values))

    return make


def _opt(width: int) -> Callable[[], transformers.PreTrainedModel]:
    return _model(
        "OPTForCausalLM", "OPTConfig",
        **_sizes() | {
            "hidden_size": width, "ffn_dim": 2 * WIDTH, "word_embed_proj_dim": width,
            "bos_token_id": 2, "num_hidden_layers": 5,  # which some tests count
        },
    )  # fmt: skip


_GPT2 = _model(
    "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_positions=256, n_embd=WIDTH,
    n_layer=LAYERS, n_head=HEADS, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GPTJ = _model(
    "GPTJForCausalLM", "GPTJConfig", vocab_size=VOCABULARY, n_positions=256, n_embd=WIDTH,
    n_layer=LAYERS, n_head=HEADS, rotary_dim=4, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_T5 = _model(
    "T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8,
    d_ff=2 * WIDTH, num_layers=LAYERS, num_heads=HEADS, pad_token_id=0, eos_token_id=1,
    decoder_start_token_id=0,
)  # fmt: skip
_BART = _model(
    "BartForConditionalGeneration", "BartConfig", vocab_size=VOCABULARY, d_model=WIDTH,
    encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS, encoder_ffn_dim=2 * WIDTH, decoder_ffn_dim=2 * WIDTH,
    max_position_embeddings=256,
)  # fmt: skip
_LLAMA = _decoder("Llama", num_key_value_heads=HEADS)  # some tests ask for rank 20
_GEMMA3 = _model(
    "Gemma3ForCausalLM", "Gemma3TextConfig", **_sizes(num_key_value_heads=2, head_dim=8)
)
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LLAMA4 = _model(
    "Llama4ForCausalLM", "Llama4TextConfig",
    **_sizes(
        num_key_value_heads=2, head_dim=8, intermediate_size_mlp=2 * WIDTH, num_local_experts=4,
        interleave_moe_layer_step=1,
    ),
)  # fmt: skip
_RESNET = _model(
    "ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 8],
    depths=[1, 1], layer_type="basic",
)  # fmt: skip

MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt(16),  # a test names its width
    "peft-internal-testing/opt-125m": _opt(WIDTH),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _GPT2,
    "peft-internal-testing/tiny-random-gpt2": _GPT2,
    "hf-internal-testing/tiny-random-gpt2": _GPT2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _GPTJ,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _LLAMA,
    "hf-internal-testing/tiny-random-MistralForCausalLM": _decoder("Mistral"),
    "peft-internal-testing/tiny-dummy-qwen2": _decoder("Qwen2"),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": _decoder("Qwen3", head_dim=8),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _GEMMA3,
    "hf-internal-testing/Mixtral-tiny": _decoder("Mixtral", **_MOE),
    "trl-internal-testing/tiny-Llama4ForCausalLM": _LLAMA4,
    "trl-internal-testing/tiny-GptOssForCausalLM": _decoder("GptOss", head_dim=8, **_MOE),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _T5,
    "peft-internal-testing/tiny-random-t5": _T5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _BART,
    "peft-internal-testing/tiny-random-BertModel": _encoder("BertModel"),
    "peft-internal-testing/tiny-random-RobertaModel": _encoder("RobertaModel"),
    "peft-internal-testing/tiny-random-DebertaModel": _encoder(
        "DebertaModel", relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": _encoder(
        "DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _encoder(
        "BertForSequenceClassification"
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _encoder(
        "RobertaForSequenceClassification"
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": _RESNET,
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _model(
        "LlamaForSequenceClassification", "LlamaConfig", **_sizes(num_key_value_heads=2)
    ),
}


def build(folder: Path) -> None:
    """Write every model of MODELS with a tokenizer to `folder`/<hub name>, where it is not yet."""
    tokenizer = _tokenizer()
    for name, make in MODELS.items():
        if (folder / name / "tokenizer.json").exists():  # the last file
            continue
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte pairs, so that it takes every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a small text, for a small tokenizer"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
