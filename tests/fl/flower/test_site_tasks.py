"""Images and language models at sites: what their data look like, and the local engine's lines."""

from __future__ import annotations

import pytest

from fedms.fl.cli import main
from fedms.fl.config import load_config
from fedms.fl.runs.folder import start

pytest.importorskip("flwr")

from post import Post, app_of

from fedms.fl.runs.flower import serve


@pytest.fixture
def assert_alike(tmp_path, quiet, read_lines, same_lines):
    """Run local and sites; their lines must be the same but for what no site can measure."""

    def check(wards, *overrides: str) -> None:
        settings = [*wards.settings, "data.num_clients=2", "data.unseen_clients=1", *overrides]
        local, app = tmp_path / "local", tmp_path / "app"
        start(load_config(None, settings), local, quiet)
        (unseen,) = {c["client_id"] for c in read_lines(local / "clients.jsonl") if not c["seen"]}
        assert main(["flower", "new", str(app), *settings]) == 0
        config = load_config(app / "app_app" / "config.toml")
        post = Post(wards.nodes(tmp_path / "sites", unseen), app_of(config, app))
        serve(config, tmp_path / "server", post, 5.0, quiet)
        for name in ("metrics.jsonl", "clients.jsonl"):
            found, wanted = (read_lines(tmp_path / run / name) for run in ("server", "local"))
            assert all(line.pop("pooled_accuracy") is None for line in found)
            for line in wanted:
                line.pop("pooled_accuracy")
            same_lines(found, wanted)

    return check


def test_a_site_has_a_folder_of_images_for_each_class_or_a_table(galleries, assert_alike):
    assert_alike(galleries)


def test_a_site_has_a_table_of_texts_for_a_language_model(wards, tiny_llama, assert_alike):
    assert_alike(
        wards.only("east", "north", "south"), "task.kind=causal_lm", "model.max_tokens=5",
        f"model.path={tiny_llama}", 'lora.targets=["q_proj", "v_proj"]',
    )  # fmt: skip
