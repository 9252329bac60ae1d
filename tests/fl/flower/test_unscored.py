"""A client whose examples cannot be read costs its own scores alone, whatever the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

from fedms.fl.config import load_config
from fedms.fl.engines.engine import Engine
from fedms.fl.engines.local import LocalEngine
from fedms.fl.engines.world import load_federation
from fedms.fl.journal.progress import Progress
from fedms.fl.runs.folder import start
from fedms.fl.runs.method import MakeEngine
from fedms.fl.runs.ranks import on_all_ranks

pytest.importorskip("flwr")

from flwr.app import Message
from post import Post, app_of

from fedms.fl.runs.flower import serve

SETTINGS = (
    "data.num_clients=3", "data.unseen_clients=0", "eval.pooled_examples=0", "model.dtype=float64",
    "engine.prefix_cache_mb=0",  # else the first visit reads all examples of its client
)  # fmt: skip


class Damaging:
    """Makes engines as ``make`` does; when one is made, a file loses its end."""

    def __init__(self, make: MakeEngine, path: Path) -> None:
        self._make, self._path = make, path

    def __call__(self, *args) -> Engine:
        made = self._make(*args)
        damage(self._path)
        return made


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def carry_out(settings: list[str], folder: Path, image: Path) -> bool:
    config, quiet = load_config(None, settings), Progress(quiet=True)
    return on_all_ranks(
        config, lambda make: start(config, folder, quiet, engine=Damaging(make, image))
    )


def test_an_image_among_the_tests_of_one_client_that_is_damaged_meanwhile(
    galleries, tmp_path, quiet, read_lines, same_lines
):
    settings = [*galleries.settings, *SETTINGS]
    config = load_config(None, settings)
    start(config, tmp_path / "whole", quiet)
    row = int(load_federation(config).client("north").test[0])
    name = galleries.everyone.read_text().splitlines()[row + 1].partition(",")[0]
    image = galleries.everyone.parent / name
    good = image.read_bytes()

    start(config, tmp_path / "local", quiet, engine=Damaging(LocalEngine, image))
    image.write_bytes(good)
    run_ranks(carry_out, settings, tmp_path / "ranks", image)
    image.write_bytes(good)
    classes = 'data.class_names={red="red", green="green", blue="blue"}'
    config = load_config(None, [*settings, classes])
    post = Post(galleries.nodes(tmp_path / "disks"), app_of(config, tmp_path / "app"))

    def spoil(client: str, order: Message, reply: Message) -> list[Message]:
        if client == "north" and order.metadata.message_type == "train":
            damage(image)
        return [reply]

    post.spoil = spoil
    serve(config, tmp_path / "sites", post, 5.0, quiet)

    whole, local, ranks, sites = (
        [read_lines(tmp_path / run / name) for name in ("metrics.jsonl", "clients.jsonl")]
        for run in ("whole", "local", "ranks", "sites")
    )
    for line in local[0]:
        assert line["participants"] == ["east", "north", "south"]
        (unscored,) = line["unscored"]
        assert unscored["client_id"] == "north"
        assert f"row {row + 1}: column 'image': the image is damaged" in unscored["reason"]
        assert line["personalized_accuracy"]["clients"] == 2
    others = [line for line in whole[1] if line["client_id"] != "north"]
    assert [line["accuracy"] for line in local[1]] == [line["accuracy"] for line in others]
    for round, line in enumerate(local[0][:2], start=1):  # there everybody has the common model
        clients = [each for each in local[1] if each["round"] == round]
        hits = sum(each["accuracy"] * each["num_test"] for each in clients)
        tested = sum(each["num_test"] for each in clients)
        assert line["global_accuracy"] == pytest.approx(hits / tested)
        assert line["pooled_accuracy"]["mean"] == pytest.approx(hits / tested)
    for line in (*ranks[0], *sites[0], *local[0]):
        line.pop("bytes_up")  # a loss is sent in as many digits as it has
    same_lines(ranks, local)
    for line in (*sites[0], *sites[1], *local[0], *local[1]):
        line.pop("pooled_accuracy")
    for line in (*sites[0], *local[0]):  # a table and a folder call it otherwise
        line["unscored"] = [each["client_id"] for each in line["unscored"]]
    same_lines(sites, local)
