"""What the tests of Flower share."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def same_lines() -> Callable[[list[dict], list[dict]], None]:
    """Compares lines of two runs: numbers to fp32's rounding, all else exactly.

    But for ``bytes_down``: Flower's messages hold the order beside the state.
    """

    def compare(found: Any, wanted: Any, where: str = "") -> None:
        assert type(found) is type(wanted), (where, found, wanted)
        if isinstance(wanted, dict):
            assert found.keys() == wanted.keys(), where
            for key in wanted.keys() - {"bytes_down"}:
                compare(found[key], wanted[key], f"{where}/{key}")
        elif isinstance(wanted, list):
            assert len(found) == len(wanted), (where, found, wanted)
            for i, entry in enumerate(wanted):
                compare(found[i], entry, f"{where}/{i}")
        elif isinstance(wanted, float):
            assert found == pytest.approx(wanted, abs=1e-4), where
        else:
            assert found == wanted, where

    return compare


@dataclass(frozen=True)
class Wards:
    """Sites with data of their own each, and the table that has them all."""

    everyone: Path
    own: dict[str, Path]
    settings: list[str]

    def only(self, *names: str) -> Wards:
        """Some of them alone, and a table of these."""
        everyone = self.everyone.with_name("-".join(names) + ".csv")
        header, *_ = self.everyone.read_text(encoding="utf-8").splitlines()
        kept = [
            line
            for line in self.everyone.read_text(encoding="utf-8").splitlines()
            if line.rpartition(",")[2] in names
        ]
        everyone.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
        settings = [s.replace(str(self.everyone), str(everyone)) for s in self.settings]
        return Wards(everyone, {name: self.own[name] for name in names}, settings)

    def nodes(self, folder: Path, unseen: str = "") -> dict[str, dict[str, str | bool]]:
        """A node config for each ward; their files go to ``folder``."""
        return {
            ward: {
                "client-id": ward,
                "data": str(path),
                "folder": str(folder / ward),
                **({"unseen": True} if ward == unseen else {}),
            }
            for ward, path in self.own.items()
        }


@pytest.fixture(scope="session")
def wards(settings: list[str], table: Path, tmp_path_factory: pytest.TempPathFactory) -> Wards:
    """No text stands twice: in one table equal texts of two wards would be kept together."""
    folder = tmp_path_factory.mktemp("wards")
    with table.open(encoding="utf-8", newline="") as file:
        rows = list({row["text"]: row for row in csv.DictReader(file)}.values())
    own = {ward: folder / f"{ward}.csv" for ward in sorted({row["ward"] for row in rows})}
    everyone = folder / "everyone.csv"
    for path, ward in [(everyone, None), *((path, ward) for ward, path in own.items())]:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label", "ward"])
            writer.writeheader()
            writer.writerows(row for row in rows if ward in (None, row["ward"]))
    names = sorted({row["label"] for row in rows})
    wards = [
        *settings,
        f"data.source={everyone}",
        "data.partitioner=column",
        "data.client_column=ward",
        *(f"data.class_names.{name}={name}" for name in names),
    ]
    return Wards(everyone, own, wards)


BLOCKS = {
    "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_llama(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random decoder of three narrow blocks, with the words of ``table``."""
    import transformers as t

    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tokenizer = t.AutoTokenizer.from_pretrained(tiny_bert)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.LlamaForCausalLM(t.LlamaConfig(**BLOCKS, **ids, num_key_value_heads=1))
    for each in (model, tokenizer):
        each.save_pretrained(folder)
    return folder


@pytest.fixture
def galleries(settings: list[str], tmp_path: Path) -> Wards:
    """Three sites' images, two in folders by class and one in a table; not all have every class."""
    import transformers as t
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    vit, images = tmp_path / "tiny-vit", tmp_path / "images"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.ViTModel(t.ViTConfig(**BLOCKS, image_size=28, patch_size=7))
    for each in (model, ViTImageProcessorPil(size={"height": 28, "width": 28})):
        each.save_pretrained(vit)
    draw, colors = np.random.default_rng(0), ("red", "green", "blue")
    rows: list[tuple[str, str, str]] = []
    for site, has in (("east", colors), ("north", colors[::2]), ("south", colors)):
        for color in sorted(has):
            (images / site / color).mkdir(parents=True)
            for i in range(12):
                noisy = draw.normal(99, 50, (28, 28, 3))
                noisy[..., colors.index(color)] += 99
                rows.append((f"{site}/{color}/{i:02}.png", color, site))
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(images / rows[-1][0])
    for name in ("everyone", "south"):
        with (images / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "site"])
            writer.writerows(row for row in rows if name in ("everyone", row[2]))
    everyone = images / "everyone.csv"
    own = {"east": images / "east", "north": images / "north", "south": images / "south.csv"}
    of_images = [
        "task.kind=images", "task.head=linear", f"model.path={vit}", f"data.source={everyone}",
        "data.partitioner=column", "data.client_column=site", 'lora.targets=["q_proj", "v_proj"]',
    ]  # fmt: skip
    return Wards(everyone, own, [*settings, *of_images])
