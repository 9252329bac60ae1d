"""One page of many runs: `fedms report FOLDER ...`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from fedms.fl.compare.comparison import LEAST_BLOCKS, LEAST_METHODS, Comparison
from fedms.fl.compare.folders import Found
from fedms.fl.compare.pictures import draw
from fedms.fl.compare.tables import Table, difference_tables, rank_tables, setting_tables
from fedms.fl.runs.html import details, document, figures, html_table

CAPTIONS = {
    "frontier.png": "Own data against everyone's, up and right is better. A mark is a method's own "
    "answer, the larger the more it sends and receives; its line is what eval.priors scored as the "
    "knob prior turns. Numbers are those of the key; methods far off are named above a panel.",
    "cost.png": "Scores against bytes and against seconds, means over blocks.",
    "ranks.png": "Mean ranks within blocks; bars are 95 % of a bootstrap over blocks.",
}
COMPARED = f"""A block has one seed, the same data, clients, model and evaluation, and as many
rounds and local steps in all (config.toml and origin.json say so). Methods are compared within
blocks; the rest of their settings is what is compared, named where it differs and is no default.
Intervals are 95 % of a bootstrap over blocks; of few blocks they are narrow by luck. Ranks are over
as many blocks as have {LEAST_METHODS} methods in common, and of as many methods as have
{LEAST_BLOCKS} blocks in common, or as many as there are."""


def write_comparison(found: Found, folder: Path) -> list[Path]:
    """Draw the pictures and write ``comparison.html``, which holds them and needs nothing else.

    Raises:
        FedMSError: matplotlib is not installed.
    """
    comparison = Comparison(found.results.values())
    pictures = draw(comparison, folder)
    page = folder / "comparison.html"
    page.write_text(
        _page(_plain(Path(folder.resolve().name)), comparison, found, pictures), encoding="utf-8"
    )
    return [*pictures, page]


def common_folder(folders: Sequence[Path]) -> Path:
    """The innermost folder that all of them are in, or are; as they are named if there is one."""
    if len(folders) == 1:
        return folders[0]
    return Path(os.path.relpath(os.path.commonpath([folder.resolve() for folder in folders])))


def summary(found: Found) -> list[RichTable]:
    """The tables for a terminal: scores of each setting, mean ranks."""
    comparison = Comparison(found.results.values())
    tables = (*setting_tables(comparison, ranges=False), *rank_tables(comparison))
    return [_printed(table) for table in tables]


def left_out(found: Found) -> list[str]:
    """A line for each run that is not compared."""
    return [f"{_plain(folder)}: {reason}" for folder, reason in found.left_out.items()]


def _printed(table: Table) -> RichTable:
    printed = RichTable(
        title=Text(table.title, style="bold"), caption=Text(table.note), caption_justify="left",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    printed.add_column(table.columns[0], overflow="fold")
    for column in table.columns[1:]:
        printed.add_column(column, justify="right", no_wrap=True)
    for row in table.rows:
        printed.add_row(*(Text(text, style="bold" if bold else "") for text, bold in row))
    return printed


def _page(name: str, comparison: Comparison, found: Found, pictures: Iterable[Path]) -> str:
    counts = (
        (len(found.results), "run"), (len(comparison.labels), "method"),
        (len(comparison.settings()), "setting"), (len(comparison.blocks), "block"),
    )  # fmt: skip
    note = ", ".join(f"{count} {what}{'s' if count > 1 else ''}" for count, what in counts)
    ranked = [*rank_tables(comparison), *difference_tables(comparison)]
    too_few = "" if ranked else '<p class="note">Ranks and differences need two blocks.</p>'
    runs = [
        [
            (text, False)
            for text in (_plain(folder), run.label, run.block.setting, str(run.block.seed))
        ]
        for folder, run in found.results.items()
    ]
    omitted = "".join(f"<li>{escape(line)}</li>" for line in left_out(found))
    body = f"""<h2>Scores</h2>{_html(setting_tables(comparison, ranges=True))}
<h2>Pictures</h2>{figures(pictures, CAPTIONS)}
<h2>Ranks and differences</h2>{_html(ranked)}{too_few}
<h2>What was compared</h2><p>{COMPARED}</p>
{details(f"{len(runs)} runs", html_table(("run", "method", "setting", "seed"), runs))}
{f"<h2>Left out</h2><ul>{omitted}</ul>" if omitted else ""}
"""
    return document(f"Comparison: {name}", note, body)


def _html(tables: Iterable[Table]) -> str:
    return "".join(
        f"<h3>{escape(table.title)}</h3>{html_table(table.columns, table.rows)}"
        f'<p class="note">{escape(table.note)}</p>\n'
        for table in tables
    )


def _plain(path: Path) -> str:
    """A path may be no text."""
    return str(path).encode(errors="replace").decode()
