"""The app that `fedms flower new` writes, and what a site must say of itself."""

from __future__ import annotations

import tomllib

import pytest

from fedms.fl.cli import main
from fedms.fl.config import load_config
from fedms.fl.types import ConfigError

pytest.importorskip("flwr")

from fedms.fl.runs.flower import Node


def test_an_app_holds_the_settings_and_the_classes(settings, tmp_path, capsys):
    folder = tmp_path / "Two Hospitals"
    assert main(["flower", "new", str(folder), *settings, "data.num_clients=2"]) == 0
    assert str(folder / "README.md") in capsys.readouterr().out
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == "two-hospitals"
    components = project["tool"]["flwr"]["app"]["components"]
    assert components["clientapp"] == "app_two_hospitals.client:app"
    config = load_config(folder / "app_two_hospitals" / "config.toml")
    assert list(config.data.class_names) == ["bone", "heart", "lung", "skin"]
    assert config.data.num_clients == 2
    assert config.rivals == ()
    assert config.engine.deadline == 900
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "A federation of 2 sites and 1 that take part in no round" in readme
    assert "{" not in readme.replace("`--node-config`", "")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("text", "texts: a .csv, .jsonl or .parquet file with the columns text and label"),
        ("images", "images: a folder of a folder for each class, or a .csv, .jsonl or .parquet"),
        ("causal_lm", "texts: a .csv, .jsonl or .parquet file with the column text;"),
    ],
)
def test_an_app_says_what_a_sites_data_are(settings, tmp_path, kind, says):
    classes = 'data.class_names={red="red", blue="blue"}'
    assert (
        main(["flower", "new", str(tmp_path / "app"), *settings, f"task.kind={kind}", classes]) == 0
    )
    readme = (tmp_path / "app" / "README.md").read_text(encoding="utf-8")
    assert f"| `data` | its {says}" in readme
    assert ('data="/data/north"' in readme) == (kind == "images")


def test_an_app_overwrites_nothing(settings, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("three years")
    assert main(["flower", "new", str(tmp_path), *settings]) == 2
    assert f"{tmp_path} exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_somebody_must_say_what_the_classes_are(settings, tmp_path, capsys):
    source = f"data.source={tmp_path / 'elsewhere.csv'}"
    assert main(["flower", "new", str(tmp_path / "app"), *settings, source]) == 2
    said = capsys.readouterr().err
    assert "every site must number the classes alike" in said
    assert "no such file" in said
    assert not (tmp_path / "app").exists()


def test_a_node_config():
    here = {"client-id": "north", "data": "north.csv", "folder": "/var/fedms"}
    assert Node.of({**here, "unseen": True}) == Node("north", "north.csv", "/var/fedms", "", True)
    for config, message in (
        ({"client-id": "north", "folder": "x"}, "--node-config lacks data"),
        ({**here, "client-id": 7}, "client-id must be of type str, got 7"),
        ({**here, "partition-id": 0}, "unknown partition_id"),
    ):
        with pytest.raises(ConfigError, match=message):
            Node.of(config)
