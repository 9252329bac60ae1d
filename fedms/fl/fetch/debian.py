"""One-line descriptions of Debian's packages, to be filed under their section, by maintainer.

They come from this machine's package index, so they are those of its release: not pinned, but the
release is recorded in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedms.fl.fetch.packages import Client, Downloads, MissingClient
from fedms.fl.fetch.parquet import write_table
from fedms.fl.fetch.recipe import Recipe, Told
from fedms.fl.types import FedMSError

MIN_CLIENT = 100
"""A maintainer of fewer packages is no client, and these packages are left out."""

MIN_SOURCES = 20
"""A maintainer of fewer source packages is no client either: a source is never split."""

MIN_SECTION = 20
"""A section of fewer packages is no class."""


@dataclass(frozen=True)
class PackageIndex:
    """The index of packages that apt has on this machine, about 50 MB of text."""

    name: str = "apt"
    megabytes: int = 50

    def get(self, downloads: Downloads, client: Client) -> Path:
        path = downloads.own / "debian-index.txt"
        try:
            client(["apt-cache", "dumpavail"], path)
            client(["apt-cache", "policy"], downloads.own / "debian-release.txt")
        except MissingClient as error:
            raise MissingClient(
                "the descriptions come by apt-cache, which is not installed here: Debian has it"
            ) from error
        return path


def convert(files: Mapping[str, Path], out: Path, told: Told) -> None:
    """Write text (description), label (section), client (maintainer) and group (source package).

    Packages of one source say nearly the same, so they are a group. A package that stands in the
    index twice, in two versions, counts once.
    """
    index = files["apt"]
    found: dict[str, Mapping[str, str]] = {}
    with index.open(encoding="utf-8", errors="replace") as file:
        for entry in entries(file):
            if entry.keys() >= {"Package", "Maintainer", "Section", "Description"}:
                found.setdefault(entry["Package"], entry)
    told(1, 2)
    packages = Counter(maintainer(entry) for entry in found.values())
    sources = Counter(who for who, _ in {(maintainer(e), source(e)) for e in found.values()})
    clients = {
        who
        for who, count in packages.items()
        if count >= MIN_CLIENT and sources[who] >= MIN_SOURCES
    }
    kept = [entry for entry in found.values() if maintainer(entry) in clients]
    sections = Counter(section(entry) for entry in kept)
    kept = [entry for entry in kept if sections[section(entry)] >= MIN_SECTION]
    if not kept:
        raise FedMSError(
            f"apt's index has no maintainer of {MIN_CLIENT} packages and {MIN_SOURCES} sources or "
            f"more, of {len(found)} packages in all: bring it up to date by `apt-get update`; "
            "Debian's has 60,000 packages"
        )
    release = (index.parent / "debian-release.txt").read_text(encoding="utf-8", errors="replace")
    origins = sorted({line.split()[1] for line in release.splitlines() if "o=Debian" in line})
    write_table(
        out,
        {
            "text": [entry["Description"] for entry in kept],
            "label": [section(entry) for entry in kept],
            "client": [maintainer(entry) for entry in kept],
            "group": [source(entry) for entry in kept],
        },
        {"source": f"apt-cache dumpavail: {' '.join(origins)}", "licence": "Debian's index"},
    )
    told(2, 2)


def entries(lines: Iterator[str]) -> Iterator[Mapping[str, str]]:
    """The paragraphs of an index as fields, less the lines that continue one."""
    entry: dict[str, str] = {}
    for line in lines:
        if not line.strip():
            yield entry
            entry = {}
        elif not line[0].isspace():
            name, _, value = line.partition(":")
            entry[name] = value.strip()
    yield entry


def maintainer(entry: Mapping[str, str]) -> str:
    """The name without the address, which changes."""
    return entry["Maintainer"].partition("<")[0].strip(' "')


def source(entry: Mapping[str, str]) -> str:
    """The source package's name without the version."""
    return entry.get("Source", entry["Package"]).split()[0]


def section(entry: Mapping[str, str]) -> str:
    """The section without the archive's area ("contrib/")."""
    return entry["Section"].rpartition("/")[2]


RECIPE = Recipe(
    name="debian",
    kind="data",
    summary="descriptions of this machine's Debian packages, a client a maintainer",
    sources=(PackageIndex(),),
    modules=("pyarrow",),
    convert=convert,
    settings=(
        "data.source=debian",
        "data.partitioner=column",
        "data.client_column=client",
        "data.group_column=group",
    ),
    otherwise="use `fedms fetch wordnet-topics`, which every system can fetch",
)
