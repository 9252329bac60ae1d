"""What the pages of reports are made of: one file that needs nothing else, without scripts."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

Cell = tuple[str, bool]
"""What a table cell says, and whether it is bold."""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 68rem;
  margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .3rem; }
p, figcaption, summary { max-width: 46rem; } .note, figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; border-top: 1px solid #e4e4e4; }
th { font-weight: 600; color: #555; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
figure { margin: 1.5rem 0 2.5rem; } img { max-width: 100%; height: auto; }
summary { cursor: pointer; margin: .8rem 0; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
"""


def document(title: str, note: str, body: str) -> str:
    """A page; ``title`` and ``note`` are plain text, ``body`` is HTML."""
    name = escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>
<h1>{name}</h1><p class="note">{escape(note)}</p>
{body}</body></html>
"""


def figures(pictures: Iterable[Path], captions: Mapping[str, str]) -> str:
    """PNG files within the page, each over the caption of its name."""
    return "".join(
        f'<figure><img alt="{escape(captions[path.name])}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{escape(captions[path.name])}</figcaption></figure>\n"
        for path in pictures
    )


def details(summary: str, inner: str, is_open: bool = False) -> str:
    """HTML that opens when its summary is clicked."""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{escape(summary)}</summary>{inner}</details>\n"


def html_table(columns: Iterable[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Of plain text."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{f'<b>{escape(t)}</b>' if bold else escape(t)}</td>" for t, bold in row)
        + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'
