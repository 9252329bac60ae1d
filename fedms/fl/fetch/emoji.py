"""Emoji drawn in ten styles: images of natural clients that differ in how they draw, not in what.

The class of a drawing is the emoji's subgroup in Unicode (animal-mammal, transport-ground ...). All
styles draw the same ideas, so a test emoji must be new in every style: the group is the idea.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedms.fl.fetch import dinov2
from fedms.fl.fetch.packages import Package, read_member
from fedms.fl.fetch.parquet import write_table
from fedms.fl.fetch.recipe import Recipe, Told
from fedms.fl.types import FedMSError

PIXELS = 98
"""Width and height of a drawing: a multiple of 14, the patch of DINOv2."""

LEFT_OUT = ("people-body", "component", "flags")
"""Groups of emoji that are told apart by skin or cloth, or are letters."""

MIN_NAMES = 4
"""A subgroup of fewer emoji is no class: it could not stand on all sides of a split."""


class Drawing(NamedTuple):
    """A drawing to be made."""

    style: str
    name: str
    subgroup: str
    svg: str


def convert(files: Mapping[str, Path], out: Path, told: Told) -> None:
    """Write image (PNG), label (subgroup), client (style) and group (the emoji's name)."""
    import resvg_py

    subgroups = subgroups_by_slug(files[NAMES.name])
    drawings = [
        drawing for style in STYLES for drawing in drawings_of(style, files[style.name], subgroups)
    ]
    images: list[bytes] = []
    for done, drawing in enumerate(drawings, start=1):
        try:
            png = resvg_py.svg_to_bytes(
                svg_string=drawing.svg, width=PIXELS, height=PIXELS, background="white"
            )
        except ValueError as error:
            raise FedMSError(f"{drawing.style}: {drawing.name} cannot be drawn: {error}") from error
        images.append(bytes(png))
        told(done, len(drawings))
    write_table(
        out,
        {
            "image": images,
            "label": [drawing.subgroup for drawing in drawings],
            "client": [drawing.style for drawing in drawings],
            "group": [drawing.name for drawing in drawings],
        },
        {"source": "npm @iconify-json/*, emojibase-data", "licence": json.dumps(LICENCES)},
    )


def subgroups_by_slug(archive: Path) -> dict[str, str]:
    """Each emoji's subgroup by its name as icon packs write it, out of emojibase-data."""
    data = json.loads(read_member(archive, "en/data.json"))
    names = json.loads(read_member(archive, "en/messages.json"))
    groups, subgroups = (
        {entry["order"]: entry["key"] for entry in names[kind]} for kind in ("groups", "subgroups")
    )
    found = {
        slug(emoji["label"]): subgroups[emoji["subgroup"]]
        for emoji in data
        if "group" in emoji and groups[emoji["group"]] not in LEFT_OUT
    }
    sizes = dict.fromkeys(found.values(), 0)
    for subgroup in found.values():
        sizes[subgroup] += 1
    return {name: subgroup for name, subgroup in found.items() if sizes[subgroup] >= MIN_NAMES}


def slug(label: str) -> str:
    """A CLDR name as icon packs write it: "eight o’clock" -> "eight-oclock"."""
    plain = unicodedata.normalize("NFKD", label.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")


def drawings_of(style: Package, archive: Path, subgroups: Mapping[str, str]) -> Iterator[Drawing]:
    """The drawings of an icon pack whose names are known, as whole SVG files."""
    pack: dict[str, Any] = json.loads(read_member(archive, "icons.json"))
    for name, icon in pack["icons"].items():
        if name in subgroups:
            width, height = (icon.get(side, pack.get(side, 16)) for side in ("width", "height"))
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" '
                f'xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}">'
                f"{icon['body']}</svg>"
            )
            yield Drawing(style.name.rpartition("/")[2], name, subgroups[name], svg)


def _pack(name: str, version: str, sha256: str, megabytes: int) -> Package:
    file = f"iconify-json-{name}-{version}.tgz"
    return Package("npm", f"@iconify-json/{name}", version, file, sha256, megabytes)


NAMES = Package(
    client="npm",
    name="emojibase-data",
    version="17.0.0",
    file="emojibase-data-17.0.0.tgz",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    megabytes=7,
)

STYLES = (
    _pack("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", 3),
    _pack(
        "noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", 2
    ),
    _pack(
        "twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", 2
    ),
    _pack(
        "fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        14,
    ),
    _pack(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        1,
    ),
    _pack(
        "fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        1,
    ),
    _pack(
        "openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5", 1
    ),
    _pack(
        "emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", 1
    ),
    _pack(
        "emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        4,
    ),
    _pack(
        "emojione-monotone",
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
        1,
    ),
)

LICENCES = {
    "Apache-2.0": ["noto", "noto-v1"],
    "MIT": ["fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast", "emojibase-data"],
    "CC-BY-4.0": ["twemoji", "emojione", "emojione-monotone"],
    "CC-BY-SA-4.0": ["openmoji", "emojione-v1"],
}

RECIPE = Recipe(
    name="emoji",
    kind="data",
    summary="11,000 emoji in ten styles, a client a style; Apache, MIT, CC-BY and CC-BY-SA",
    sources=(NAMES, *STYLES),
    modules=("resvg_py", "pyarrow"),
    convert=convert,
    settings=(
        *dinov2.RECIPE.settings,
        "data.source=emoji",
        "data.partitioner=column",
        "data.client_column=client",
        "data.group_column=group",
    ),
    otherwise="name a folder of class folders: data.source=FOLDER",
)
