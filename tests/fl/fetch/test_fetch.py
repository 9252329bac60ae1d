"""Fetching: what stands in the cache is whole and checked; each refusal says what would do."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedms.fl.config import load_config
from fedms.fl.data.dataset import load_dataset
from fedms.fl.fetch import RECIPES, bring, fetch
from fedms.fl.fetch.cache import built_whole, cache_folder
from fedms.fl.fetch.packages import Downloads, MissingClient, Package, run_client
from fedms.fl.fetch.parquet import FILE, write_table
from fedms.fl.fetch.recipe import Recipe
from fedms.fl.types import FedMSError

CONTENT = b"what the registry has"


def package(**more) -> Package:
    digest = hashlib.sha256(CONTENT).hexdigest()
    settings = {"client": "npm", "name": "@some/thing", "version": "1.2.3", "file": "thing.tgz"}
    return Package(**{**settings, "sha256": digest, "megabytes": 1, **more})


def recipe(convert=None, **more) -> Recipe:
    def copy(files, out, told):
        (out / "copy").write_bytes(files["@some/thing"].read_bytes())
        told(1, 1)

    settings = {
        "name": "thing", "kind": "data", "summary": "", "sources": (package(),), "modules": (),
        "convert": convert or copy, "settings": (), "otherwise": "name a table of your own",
    }  # fmt: skip
    return Recipe(**{**settings, **more})


class Registry:
    """A client that brings a file, and remembers how it was called."""

    def __init__(self, content: bytes = CONTENT, file: str = "thing.tgz") -> None:
        self.content, self.file, self.calls = content, file, []

    def __call__(self, command, output) -> None:
        self.calls.append(list(command))
        folder = Path(command[command.index("--pack-destination") + 1])
        (folder / self.file).write_bytes(self.content)


def no_client(command, output) -> None:
    raise MissingClient(f"{command[0]} is not installed")


def nobody(command, output) -> None:
    raise AssertionError("nothing is to be downloaded")


def quiet(what: str, done: int, total: int) -> None: ...


def test_a_name_is_fetched_once_and_leaves_nothing_behind(tmp_path):
    registry, told = Registry(), []
    place = bring(recipe(), lambda *step: told.append(step), tmp_path, registry)
    assert place == tmp_path / "thing"
    assert (place / "copy").read_bytes() == CONTENT
    assert registry.calls[0][:2] == ["npm", "pack"]
    assert registry.calls[0][-1] == "@some/thing@1.2.3"
    assert [what for what, _, _ in told] == ["@some/thing, 1 MB", "convert"]
    assert bring(recipe(), quiet, tmp_path, nobody) == place
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["copy"]


def test_a_file_that_was_put_there_by_hand(tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "thing.tgz").write_bytes(CONTENT)
    assert bring(recipe(), quiet, tmp_path, nobody).is_dir()


def test_a_file_that_is_not_the_pinned_one(tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "thing.tgz").write_bytes(b"half of it")
    with pytest.raises(FedMSError, match=r"thing.tgz has the sha256 .*, expected .* was deleted"):
        bring(recipe(), quiet, tmp_path, Registry(b"another one"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_client_that_brings_another_file(tmp_path):
    with pytest.raises(FedMSError, match=r"npm did not bring thing.tgz"):
        bring(recipe(), quiet, tmp_path, Registry(file="thing-2.tgz"))


def test_a_missing_client_is_named_with_what_else_would_do(tmp_path):
    with pytest.raises(FedMSError) as caught:
        bring(recipe(), quiet, tmp_path, no_client)
    for part in (
        "@some/thing comes by npm, which is not installed here: install npm",
        f"or put thing.tgz of @some/thing 1.2.3 (sha256 {package().sha256}) into "
        f"{tmp_path / 'downloads'}",
        "or name a table of your own",
    ):
        assert part in str(caught.value)


def test_a_missing_module_is_named_before_anything_is_downloaded(tmp_path):
    with pytest.raises(FedMSError, match=r"needs no_such_module: pip install 'fedms\[fetch\]'"):
        bring(recipe(modules=("json", "no_such_module")), quiet, tmp_path, nobody)


def test_a_conversion_that_fails_leaves_no_name(tmp_path):
    def fails(files, out, told):
        (out / "half").write_bytes(b"")
        raise FedMSError("the disk is full")

    with pytest.raises(FedMSError, match="the disk is full"):
        bring(recipe(fails), quiet, tmp_path, Registry())
    assert not (tmp_path / "thing").exists()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["thing.tgz"]
    assert bring(recipe(), quiet, tmp_path, nobody).is_dir()  # the download is not lost


def test_a_fetch_that_ends_takes_nothing_from_another(tmp_path):
    """While one converts, a second begins, with what the first has downloaded, and ends."""

    def copy_last(files, out, told):
        other = bring(recipe(name="other"), quiet, tmp_path, nobody)
        assert (other / "copy").read_bytes() == CONTENT
        (out / "copy").write_bytes(files["@some/thing"].read_bytes())

    place = bring(recipe(copy_last), quiet, tmp_path, Registry())
    assert (place / "copy").read_bytes() == CONTENT
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"copy"}


def test_a_disk_that_knows_one_name_a_file(tmp_path, monkeypatch):
    def no_links(*_) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    test_a_name_is_fetched_once_and_leaves_nothing_behind(tmp_path / "a")
    (tmp_path / "b").mkdir()
    test_a_file_that_was_put_there_by_hand(tmp_path / "b")


def test_an_index_leaves_nothing_behind_either(tmp_path):
    """Whether its conversion ends or fails: a second try reads a new one."""

    def apt_cache(command, output):
        output.write_text("")

    with pytest.raises(FedMSError, match="apt's index has no maintainer"):
        bring(RECIPES["debian"], quiet, tmp_path, apt_cache)
    converted = replace(RECIPES["debian"], convert=lambda files, out, told: None)
    assert bring(converted, quiet, tmp_path, apt_cache).is_dir()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_fetches_at_once(tmp_path):
    place = tmp_path / "thing"
    with built_whole(place) as mine:
        (mine / "file").write_text("mine")
        with built_whole(place) as other:
            (other / "file").write_text("the other's")
    assert (place / "file").read_text() == "the other's"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_name_that_nobody_knows(tmp_path):
    with pytest.raises(FedMSError, match=r"no 'emojis' to fetch; there are .*emoji, sotu"):
        fetch("emojis", cache=tmp_path, client=nobody)


def test_every_recipe_is_whole():
    for name, one in RECIPES.items():
        assert one.name == name
        assert one.summary
        assert one.otherwise
        key = "model.path" if one.kind == "model" else "data.source"
        assert f"{key}={name}" in one.settings
        load_config(None, one.settings)  # they are settings that there are
        for source in one.sources:
            if isinstance(source, Package):
                assert len(source.sha256) == 64
                assert source.version in source.file


def test_a_fetched_name_is_a_data_source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / "fedms"
    with pytest.raises(FedMSError, match="wordnet has not been fetched: `fedms fetch wordnet`"):
        load_dataset("wordnet")
    folder = cache_folder() / "wordnet"
    folder.mkdir(parents=True)
    write_table(folder, {"text": ["a dog", "to run"], "label": ["noun", "verb"]}, {"source": "x"})
    assert (folder / FILE).is_file()
    assert load_dataset("wordnet").class_names == ("noun", "verb")


def test_pip_is_asked_for_one_wheel_and_nothing_that_it_needs(tmp_path):
    seen = []

    def pip(command, output):
        seen.append(list(command))
        (tmp_path / "thing.whl").write_bytes(CONTENT)

    wheel = package(client="pip", name="thing", file="thing.whl")
    (tmp_path / "shared").mkdir()
    wheel.get(Downloads(tmp_path / "shared", tmp_path), pip)
    (command,) = seen
    assert command[-1] == "thing==1.2.3"
    assert "--no-deps" in command
    assert command[command.index("--dest") + 1] == str(tmp_path)


def test_a_client_that_fails_says_why(tmp_path):
    code = "import sys; print('noise', file=sys.stderr); print('ERROR: no such', file=sys.stderr);"
    with pytest.raises(FedMSError, match=r"failed with status 3: ERROR: no such"):
        run_client([sys.executable, "-c", code + "sys.exit(3)"], None)
    with pytest.raises(MissingClient, match="no-such-client is not installed"):
        run_client(["no-such-client"], None)
    run_client([sys.executable, "-c", "print('an index')"], tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text().strip() == "an index"
