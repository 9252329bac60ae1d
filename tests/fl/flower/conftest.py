"""What the tests of Flower share."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


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
    """Four wards with a table each, and the table that has them all."""

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
