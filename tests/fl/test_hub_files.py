"""Models and data as the hub has them, on small stand-ins with the same files, without a network.

The stand-ins are as ``hf download`` leaves them: openai/clip-vit-base-patch32 (its preprocessor's
configuration of 2022, its byte-pair tokenizer, pickled weights) and data sets in Parquet.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers as t
from PIL import Image

from fedms.fl.cli import main
from fedms.fl.config import load_config
from fedms.fl.data.dataset import load_dataset
from fedms.fl.engines.world import load_federation
from fedms.fl.runs.report import read_rounds
from fedms.fl.types import DataError

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30)}
FEATURES = {"info": {"features": {"label": {"names": ["red", "green"], "_type": "ClassLabel"}}}}
TOKENS = ["<|startoftext|>", "<|endoftext|>"]


def png(color: str, draw: np.random.Generator) -> bytes:
    noisy = draw.normal(0, 40, (28, 28, 3)) + np.array(COLORS[color])
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, rows: list[dict], features: dict = FEATURES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)


@pytest.fixture
def cifar(tmp_path) -> Path:
    """Two configurations' worth of nothing but ``plain_text``: two files to train on, one to test
    on, one that is neither; images as structs, labels as numbers with names in the metadata."""
    draw, folder = np.random.default_rng(0), tmp_path / "cifar"

    def rows(count: int) -> list[dict]:
        return [
            {"img": {"bytes": png(name, draw), "path": f"{i}.png"}, "label": label}
            for i in range(count)
            for label, name in enumerate(COLORS)
        ]

    write(folder / "plain_text" / "train-00000-of-00002.parquet", rows(20))
    write(folder / "plain_text" / "train-00001-of-00002.parquet", rows(20))
    write(folder / "plain_text" / "test-00000-of-00001.parquet", rows(7))
    write(folder / "plain_text" / "validation-00000-of-00001.parquet", rows(3))
    (folder / "README.md").write_text("---\ndataset_info: {}\n---\n# Card\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    return folder


@pytest.fixture
def clip(tmp_path) -> Path:
    """A CLIP of three narrow blocks with the files of openai/clip-vit-base-patch32."""
    folder = tmp_path / "clip-vit-base-patch32"
    blocks = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }  # fmt: skip
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    known = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", *TOKENS]
    ids = {"bos_token_id": len(known) - 2, "eos_token_id": len(known) - 1}
    text = {**blocks, **ids, "vocab_size": len(known), "max_position_embeddings": 16}
    vision = {**blocks, "image_size": 28, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    model.config.architectures = ["CLIPModel"]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(known)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    special = dict(zip(("bos_token", "eos_token"), TOKENS, strict=True))
    special |= {"unk_token": TOKENS[1], "pad_token": TOKENS[1]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**special, "model_max_length": 16, "tokenizer_class": "CLIPTokenizer"})
    )
    preprocessing = {
        "crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 28,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def settings(cifar: Path, clip: Path) -> list[str]:
    return [
        "task.kind=images", f"data.source={cifar}", "data.image_column=img",
        f"model.path={clip}", 'lora.targets=["q_proj", "v_proj"]', "lora.r=2",
        "data.num_clients=3", "data.unseen_clients=0", "data.min_partition_size=4",
        "stage1.rounds=1", "stage2.rounds=1", "stage1.local_steps=2", "stage2.local_steps=2",
        "stage1.batch_size=8", "stage2.batch_size=8", "sal.max_blocks=1", "model.dtype=float32",
        "engine.threads=1", "rivals=[]",
    ]  # fmt: skip


def test_clip_and_images_of_the_hub(cifar, clip, tmp_path, capsys):
    assert main(["run", *settings(cifar, clip), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    last = read_rounds(tmp_path / "run")[-1]
    assert last.personalized_accuracy is not None
    assert not last.failed
    names = json.loads((tmp_path / "run" / "label_counts.json").read_text())["class_names"]
    assert names == ["red", "green"]


def test_the_files_names_say_what_is_tested_on(cifar):
    data = load_dataset(cifar, image_column="img")
    assert data.splits == ("test",) * 14 + ("train",) * 80
    assert data.inputs[0].size == (28, 28)
    chosen = ["task.kind=images", f"data.source={cifar}", "data.image_column=img"]
    more = ["data.num_clients=3", "data.unseen_clients=0", "data.min_partition_size=4"]
    clients = load_federation(load_config(None, [*chosen, *more])).clients
    assert sorted(i for client in clients for i in client.test) == list(range(14))


def texts(count: int, split: str) -> list[dict]:
    return [{"text": f"{split} {i}", "label": i % 2, "where": split} for i in range(count)]


def test_validation_serves_where_there_is_no_test(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.parquet", texts(6, "train"))
    write(tmp_path / "data" / "unsupervised-00000-of-00001.parquet", texts(9, "test"))
    assert load_dataset(tmp_path).splits is None  # no names that tell: all of it, to be split
    assert len(load_dataset(tmp_path)) == 15
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", texts(4, "test"))
    data = load_dataset(tmp_path)
    assert data.splits == ("train",) * 6 + ("test",) * 4
    assert data.class_names == ("red", "green")
    assert data.inputs[6:8] == ("test 0", "test 1")
    by_column = load_dataset(tmp_path, split_column="where")
    assert len(by_column) == 19  # every file, by what the user says


def test_several_configurations_are_named(tmp_path):
    for name in ("de", "en"):
        write(tmp_path / name / "train-00000-of-00001.parquet", texts(4, name))
    with pytest.raises(DataError, match="in one folder, got de, en: name one"):
        load_dataset(tmp_path)
    assert len(load_dataset(tmp_path / "en")) == 4
