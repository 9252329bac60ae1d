"""Images and language models at sites: what their data look like, and the local engine's lines."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fedms.fl.cli import main
from fedms.fl.config import load_config
from fedms.fl.runs.folder import start

pytest.importorskip("flwr")

from post import Post, app_of

from fedms.fl.runs.flower import serve

BLOCKS = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3,
}  # fmt: skip
SETTINGS = ["data.num_clients=2", "data.unseen_clients=1", 'lora.targets=["q_proj", "v_proj"]']


@pytest.fixture
def model(tmp_path):
    """``model(make)``: the folder of what ``make`` makes, always with the same values."""

    def save(make, *with_it) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = make()
        for each in (made, *with_it):
            each.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.fixture
def assert_alike(tmp_path, quiet, read_lines, same_lines):
    """Run local and sites; their lines must be the same but for what no site can measure."""

    def check(settings: list[str], own: dict[str, Path]) -> None:
        config = load_config(None, settings)
        local = tmp_path / "local"
        start(config, local, quiet)
        (unseen,) = {c["client_id"] for c in read_lines(local / "clients.jsonl") if not c["seen"]}
        nodes = {
            name: {"client-id": name, "data": str(data), "folder": str(tmp_path / "disks" / name)}
            for name, data in own.items()
        }
        nodes[unseen]["unseen"] = True
        app = tmp_path / "app"
        assert main(["flower", "new", str(app), *settings]) == 0
        config = load_config(app / "app_app" / "config.toml")
        serve(config, tmp_path / "server", Post(nodes, app_of(config, app)), 5.0, quiet)
        for name in ("metrics.jsonl", "clients.jsonl"):
            found, wanted = (read_lines(tmp_path / run / name) for run in ("server", "local"))
            assert all(line.pop("pooled_accuracy") is None for line in found)
            for line in wanted:
                line.pop("pooled_accuracy")
            same_lines(found, wanted)

    return check


def test_a_site_has_a_folder_of_images_for_each_class(settings, model, assert_alike, tmp_path):
    """Or a table beside its images; not every site has every class."""
    draw, colors = np.random.default_rng(0), {"red": 0, "green": 1, "blue": 2}
    rows: list[tuple[str, str, str]] = []
    for site, has in (("east", colors), ("north", ["blue", "red"]), ("south", colors)):
        for color in sorted(has):
            (tmp_path / "images" / site / color).mkdir(parents=True)
            for i in range(12):
                noisy = draw.normal(99, 50, (28, 28, 3))
                noisy[..., colors[color]] += 99
                name = f"{site}/{color}/{i:02}.png"
                rows.append((name, color, site))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                    tmp_path / "images" / name
                )
    for name in ("all", "south"):
        with (tmp_path / "images" / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "site"])
            writer.writerows(row for row in rows if name in ("all", row[2]))
    sizes = {"height": 28, "width": 28}
    vit = model(
        lambda: t.ViTModel(t.ViTConfig(**BLOCKS, image_size=28, patch_size=7)),
        ViTImageProcessorPil(size=sizes),
    )
    assert_alike(
        [
            *settings, *SETTINGS, "task.kind=images", "task.head=linear", f"model.path={vit}",
            f"data.source={tmp_path / 'images' / 'all.csv'}", "data.partitioner=column",
            "data.client_column=site",
        ],
        {
            "east": tmp_path / "images" / "east",
            "north": tmp_path / "images" / "north",
            "south": tmp_path / "images" / "south.csv",
        },
    )  # fmt: skip


def test_a_site_has_a_table_of_texts_for_a_language_model(wards, tiny_bert, model, assert_alike):
    tokenizer = t.AutoTokenizer.from_pretrained(tiny_bert)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 3}
    llama = model(
        lambda: t.LlamaForCausalLM(t.LlamaConfig(**BLOCKS, **ids, num_key_value_heads=1)), tokenizer
    )
    three = wards.only("east", "north", "south")
    data = [setting for setting in three.settings if "data.class_names" not in setting]
    assert_alike(
        [*data, *SETTINGS, "task.kind=causal_lm", "model.max_tokens=5", f"model.path={llama}"],
        three.own,
    )
