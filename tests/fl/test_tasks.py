"""Every kind of task from a configuration to a report: both stages, gate, SAL, export, prediction.

The tiny models are random, the data are easy: what is looked at is that each part does its part.
"""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from safetensors.torch import load_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedms.fl.cli import main
from fedms.fl.config import load_config
from fedms.fl.journal.progress import Progress
from fedms.fl.runs.folder import resume, start
from fedms.fl.runs.report import read_clients, read_rounds

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (99, 99, 99)}
BLOCKS = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3,
}  # fmt: skip
PIXELS = {"image_size": 28, "patch_size": 7}
SMALL = [
    "model.dtype=float32",
    "data.num_clients=3",
    "data.unseen_clients=1",
    "data.min_partition_size=4",
    "data.alpha=1.0",
    "data.train=0.5",
    "data.gate=0.15",
    "data.val=0.1",
    "data.test=0.25",
    "lora.r=2",
    "stage1.rounds=2",
    "stage1.local_steps=2",
    "stage1.batch_size=8",
    "stage1.lr=0.01",
    "stage2.rounds=1",
    "stage2.local_steps=2",
    "stage2.batch_size=8",
    "stage2.lr=0.01",
    "sal.max_blocks=2",
    "sal.wake_blocks=1",
    "sal.trigger=every",
    "sal.every=1",
    "mofm.bottleneck=4",
    "mofm.gate_steps=3",
    "eval.pooled_examples=10",
    'rivals=["zero_shot"]',
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of a folder for each of four colours, with 16 noisy images in each."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / name).mkdir()
        for i in range(16):
            noisy = draw.normal(0, 50, (28, 28, 3)) + np.array(color)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def speeches(tmp_path_factory) -> Path:
    """48 texts by four speakers, each with words of their own."""
    path, draw = tmp_path_factory.mktemp("speeches") / "speeches.csv", random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "speaker"])
        for i in range(48):
            own = [f"w{(i % 4) * 8 + draw.randint(0, 7)}" for _ in range(draw.randint(8, 40))]
            writer.writerow([" ".join(own), f"speaker {i % 4}"])
    return path


def words() -> t.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["<unk>", "<s>", "</s>", *COLORS, *(f"w{i}" for i in range(33))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="</s>", eos_token="</s>"
    )


def saved(model: t.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``models("vit")``: the folder of a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    vocabulary = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}

    def make(kind: str) -> t.PreTrainedModel:
        if kind == "vit":
            return t.ViTModel(t.ViTConfig(**BLOCKS, **PIXELS))
        if kind == "dinov2":
            return t.Dinov2Model(t.Dinov2Config(**BLOCKS, **PIXELS))
        if kind == "bert":
            sizes = {"max_position_embeddings": 32, "pad_token_id": 2}
            return t.BertModel(t.BertConfig(vocab_size=40, **BLOCKS, **sizes))
        if kind == "clip":
            text = {**BLOCKS, **vocabulary, "max_position_embeddings": 16}
            vision = {**BLOCKS, **PIXELS}
            return t.CLIPModel(
                t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
            )
        if kind == "gpt2":
            ids = {key: vocabulary[key] for key in ("bos_token_id", "eos_token_id")}
            return t.GPT2LMHeadModel(
                t.GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=3, n_head=2, **ids)
            )
        return t.LlamaForCausalLM(t.LlamaConfig(**vocabulary, **BLOCKS, num_key_value_heads=1))

    def load(kind: str) -> Path:
        if not (folder / kind).exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                saved(make(kind), folder / kind)
            square = {"height": 28, "width": 28}
            if kind == "clip":
                processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square)
            else:
                processor = ViTImageProcessorPil(size=square)
            processor.save_pretrained(folder / kind)
        return folder / kind

    return load


def finished(folder: Path, *settings: str) -> Path:
    assert main(["run", *SMALL, *settings, "--out", str(folder), "--quiet"]) == 0
    return folder


def check_run(folder: Path) -> None:
    """Both stages were trained and scored, blocks woke, nobody failed, and a report was drawn."""
    rounds = read_rounds(folder)
    assert [record.stage for record in rounds] == ["stage1", "stage1", "stage2"]
    assert [len(record.awake_blocks) for record in rounds] == [1, 2, 2]
    assert not any(record.failed for record in rounds)
    assert all(math.isfinite(record.train_loss) for record in rounds)
    assert rounds[2].gate_local_mean is not None
    assert 0 < rounds[2].bytes_up < rounds[0].bytes_up  # the gate adapter alone
    assert all(0 <= client.gate_local <= 1 for client in read_clients(folder) if client.round == 3)
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_size > 10_000


def check_adapters(folder: Path, base: t.PreTrainedModel, inputs: dict, expert: str) -> None:
    """peft loads what was written, and it changes the model's output."""
    from peft import PeftModel

    path = folder / "adapters" / expert
    with torch.no_grad():
        plain = base(**inputs)[0].clone()
        tuned = PeftModel.from_pretrained(base, path)
        assert (tuned(**inputs)[0] - plain).abs().max() > 1e-6
    names = load_file(path / "adapter_model.safetensors")
    loaded = {name.replace(".default", "") for name in tuned.state_dict() if "lora_" in name}
    assert set(names) == loaded


def test_images_with_a_trained_head(pictures, models, tmp_path, capsys):
    folder = finished(
        tmp_path / "run",
        "task.kind=images",
        "task.head=linear",
        f"data.source={pictures}",
        f"model.path={models('vit')}",
        'lora.targets=["q_proj", "v_proj"]',
        "stage1.local_steps=6",
    )
    check_run(folder)
    own = read_rounds(folder)[-1].personalized_accuracy
    assert own.mean > 0.5  # four classes, and the base alone knows none of them
    zero_shot = read_rounds(folder / "rivals" / "zero_shot")[-1]
    assert zero_shot.global_accuracy < 0.5
    pixels = {"pixel_values": torch.randn(2, 3, 28, 28)}
    check_adapters(folder, t.ViTModel.from_pretrained(models("vit")), pixels, "global")
    head = load_file(folder / "adapters" / "global" / "head.safetensors")
    assert head["weight"].shape == (4, 32)
    assert head["weight"].abs().max() > 0
    clients = json.loads((folder / "label_counts.json").read_text())["clients"]
    capsys.readouterr()
    image = str(pictures / "red" / "3.png")
    assert main(["predict", str(folder), "--client", clients[0], image, image]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == image
    assert lines[1].split()[0] in COLORS
    assert "local expert" in lines[1]
    assert main(["predict", str(folder), "--client", clients[0], "no.png"]) == 2
    assert "no.png: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_images_with_class_names(pictures, models, tmp_path, kind):
    """By the model's own text tower, or by a text model through a projection that is trained."""
    folder = finished(
        tmp_path / "run",
        "task.kind=images",
        f"task.text_model={models('bert')}",
        f"data.source={pictures}",
        'data.class_names={red="red w1", green="green w2", blue="blue w3", grey="grey w4"}',
        f"model.path={models(kind)}",
        'lora.targets=["q_proj", "v_proj"]',
    )
    check_run(folder)
    pixels = {"pixel_values": torch.randn(2, 3, 28, 28)}
    if kind == "clip":
        model = t.CLIPModel.from_pretrained(models("clip"))
        ids = {"input_ids": torch.tensor([[1, 4, 2], [1, 5, 2]])}
        check_adapters(folder, model, {**pixels, **ids}, "global")
        assert not (folder / "adapters" / "global" / "head.safetensors").exists()
    else:
        check_adapters(folder, t.AutoModel.from_pretrained(models(kind)), pixels, "global")
        head = load_file(folder / "adapters" / "global" / "head.safetensors")["weight"]
        assert head.shape == (32, 32)  # from the encoder's width to the text model's


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_modelling(speeches, models, tmp_path, capsys, kind):
    targets = '["q_proj", "v_proj"]' if kind == "llama" else '["c_attn"]'
    folder = finished(
        tmp_path / "run",
        "task.kind=causal_lm",
        f"data.source={speeches}",
        "data.partitioner=column",
        "data.client_column=speaker",
        f"model.path={models(kind)}",
        "model.max_tokens=12",
        f"lora.targets={targets}",
        "stage1.local_steps=10",
        "stage2.local_steps=10",
    )
    check_run(folder)
    last = read_rounds(folder)[-1]
    base = read_rounds(folder / "rivals" / "zero_shot")[-1]
    # scores are log2 of the probability of the right token: an untrained model knows nothing of 40
    assert base.global_accuracy == pytest.approx(-math.log2(40), abs=0.5)
    assert last.personalized_accuracy.mean > base.global_accuracy + 0.05
    assert "Bits per token, less is better" in (folder / "report.html").read_text()
    with torch.no_grad():
        model = t.AutoModelForCausalLM.from_pretrained(models(kind))
    check_adapters(folder, model, {"input_ids": torch.tensor([[4, 5, 6, 7]])}, "global")
    config = json.loads((folder / "adapters" / "global" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    capsys.readouterr()
    text = "w0 w1 w2 w3"
    assert main(["predict", str(folder), "--client", "speaker 0", text]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == text
    assert "bits per token" in lines[1]


@pytest.mark.parametrize("kind", ["dinov2", "llama"])
def test_a_kept_prefix_changes_nothing(pictures, speeches, models, tmp_path, kind):
    """Nor does it matter that images are not decoded then, and that windows are padded."""
    of_kind = {
        "dinov2": ["task.kind=images", "task.head=linear", f"data.source={pictures}"],
        "llama": [
            "task.kind=causal_lm", f"data.source={speeches}", "model.max_tokens=12",
        ],
    }  # fmt: skip
    scores = []
    for megabytes in (0, 1000):
        folder = finished(
            tmp_path / str(megabytes),
            *of_kind[kind],
            f"model.path={models(kind)}",
            "model.dtype=float64",
            'lora.targets=["q_proj", "v_proj"]',
            f"engine.prefix_cache_mb={megabytes}",
            "rivals=[]",
        )
        scores.append([record.train_loss for record in read_rounds(folder)])
        scores[-1] += [client.accuracy for client in read_clients(folder)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_a_model_that_does_not_say_how_it_wants_its_images(pictures, models, tmp_path, capsys):
    """How images are normalised is not guessed."""
    model = shutil.copytree(models("vit"), tmp_path / "vit")
    (model / "preprocessor_config.json").unlink()
    settings = ["task.kind=images", "task.head=linear", f"data.source={pictures}"]
    assert (
        main(["run", *SMALL, *settings, f"model.path={model}", "--out", str(tmp_path / "r")]) == 2
    )
    assert "preprocessor_config.json" in capsys.readouterr().err


def test_a_source_that_is_an_object(pictures, models, tmp_path):
    """A run in Python on a ``datasets.Dataset``, whose images lie where they lay."""
    datasets = pytest.importorskip("datasets")
    names = list(COLORS)
    labels = [label for label in range(len(names)) for _ in range(16)]
    files = [str(pictures / names[label] / f"{i % 16}.png") for i, label in enumerate(labels)]
    table = datasets.Dataset.from_dict(
        {"image": files, "label": labels},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        ),
    )
    settings = ["task.kind=images", "task.head=linear", f"model.path={models('vit')}"]
    targets = ['lora.targets=["q_proj"]', "rivals=[]", "stage2.rounds=0"]
    config = load_config(None, [*SMALL, *settings, *targets])
    start(config, tmp_path / "run", Progress(quiet=True), table)
    assert [record.stage for record in read_rounds(tmp_path / "run")] == ["stage1", "stage1"]
    record = json.loads((tmp_path / "run" / "label_counts.json").read_text())
    assert record["class_names"] == names
    resume(tmp_path / "run", Progress(quiet=True), table)
