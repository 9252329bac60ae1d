"""What a run folder says: its records, a table that compares the methods, and a page with pictures.

Everything is read from the folder alone, so a run can be looked at while it runs and long after.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedms.fl.algorithms import ALGORITHMS, stages_of, title
from fedms.fl.config import Config
from fedms.fl.journal.files import read_record
from fedms.fl.journal.records import ClientRecord, RoundRecord, Spread
from fedms.fl.runs.html import Cell, details, document, figures, html_table
from fedms.fl.runs.origin import config_of
from fedms.fl.runs.plots import LabelCounts, MethodRun, draw
from fedms.fl.tasks import METRICS
from fedms.fl.tasks.task import Metric
from fedms.fl.types import Failure, FedMSError

T = TypeVar("T")

CAPTIONS = {
    "accuracy.png": "Scores of the clients' models, on their own and on everyone's test data.",
    "bytes.png": "Scores on own data against what all clients together sent and received.",
    "clients.png": "The clients' scores on their own data, after the last scored round.",
    "labels.png": "How the training examples are shared out.",
    "blocks_and_gate.png": "Blocks that sparsely activated LoRA has woken, and the gate's choice.",
}
COLUMNS = (
    "method", "rounds", "own\ndata", "worst\n10 %", "everyone's\ndata", "unseen\nclients",
    "share\ntrained", "MB\nup", "MB\ndown", "time\n(s)",
)  # fmt: skip
LEGEND = (
    "{scores}, mean over {clients} clients (own data: ± standard deviation), after the last scored "
    "round. Share trained: the largest of any round, in %. MB: 10⁶ bytes, all clients and rounds."
)
MOST_ROWS = 250
"""Clients and failures that the page lists; all of them are in the .jsonl files."""
ROUND_COLUMNS = (
    "round", "stage", "seconds", "clients", "awake blocks", "trainable, %", "MB up", "MB down",
    "loss", "own, {unit}", "worst tenth, {unit}", "everyone's, {unit}", "unseen, {unit}",
    "gate on local, %",
    "memory, MB",
)  # fmt: skip
CLIENT_COLUMNS = (
    "client", "test examples", "own, {unit}", "everyone's, {unit}", "gate on local, %",
    "largest class",
)  # fmt: skip


def read_rounds(folder: Path) -> list[RoundRecord]:
    """The rounds of one method, oldest first. A last line that a kill has torn is left out.

    Raises:
        FedMSError: there is no ``metrics.jsonl``, no round in it yet, or a line that is no round.
    """
    return _read(folder, "metrics.jsonl", "round", _round)


def read_clients(folder: Path) -> list[ClientRecord]:
    """Every client's scores after every scored round; like :func:`read_rounds`."""
    return _read(folder, "clients.jsonl", "client's score", lambda entry: ClientRecord(**entry))


def comparison_table(folder: Path, *, title: str) -> Table:
    """One row per method that has a round: FedMS, then the others by their accuracy on own data."""
    runs = _methods(folder)
    table = Table(
        title=Text(title, style="bold"), caption=_legend(runs), caption_justify="left",
        box=SIMPLE_HEAD, padding=0, show_edge=False,
    )  # fmt: skip
    table.add_column(COLUMNS[0], overflow="fold")
    for column in COLUMNS[1:]:  # headers break where they say, so that 80 columns are enough
        table.add_column(column, justify="right", no_wrap=True)
    for row in _rows(runs):
        table.add_row(*(Text(text, style="bold" if bold else "") for text, bold in row))
    return table


def write_report(folder: Path) -> list[Path]:
    """Draw the pictures and write ``report.html``, which holds them and needs nothing else.

    Raises:
        FedMSError: the folder is no run, has no round yet, or matplotlib is not installed.
    """
    runs = _methods(folder)
    labels = _label_counts(folder / "label_counts.json")
    pictures = draw(runs, labels, folder)
    page = folder / "report.html"
    config = (folder / "config.toml").read_text(encoding="utf-8")
    name = folder.resolve().name.encode(errors="replace").decode()  # a path may be no text
    page.write_text(_page(name, runs, labels, pictures, config), encoding="utf-8")
    return [*pictures, page]


# Reading ----------------------------------------------------------------------------------------


def _read(folder: Path, name: str, what: str, build: Callable[[Any], T]) -> list[T]:
    path = folder / name
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise FedMSError(
            f"{folder} is not the folder of a run: {name} cannot be read ({error.strerror})"
        ) from error
    records: list[T] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(build(json.loads(line)))
        except json.JSONDecodeError as error:
            if number < len(lines):  # the last one has no line end: a kill has torn it
                raise FedMSError(f"{path}, line {number}: not valid JSON: {error}") from error
        except (TypeError, KeyError) as error:
            raise FedMSError(f"{path}, line {number}: not a {what}: {error}") from error
    if not records:
        raise FedMSError(f"{path} has no {what} yet")
    return records


def _has_lines(path: Path) -> bool:
    return path.exists() and "\n" in path.read_text(encoding="utf-8", errors="replace")


def _label_counts(path: Path) -> LabelCounts | None:
    if not path.exists():
        return None
    found = read_record(path, "class_names", "clients", "counts")
    return LabelCounts(found["class_names"], found["clients"], found["counts"])


def _round(entry: dict[str, Any]) -> RoundRecord:
    spreads = {
        key: None if entry[key] is None else Spread(**entry[key])
        for key in ("personalized_accuracy", "pooled_accuracy", "unseen_accuracy")
    }
    failures = {
        key: [Failure(**failure) for failure in entry.get(key, [])]
        for key in ("failed", "unscored")
    }
    return RoundRecord(**{**entry, **spreads, **failures})


def _methods(folder: Path) -> list[MethodRun]:
    """The run's method and the rivals that have a round, in the table's order."""
    rounds = read_rounds(folder)
    config = config_of(folder)
    runs = [method_run(folder, config.method, config, rounds)]
    for path in sorted(folder.glob("rivals/*/metrics.jsonl")):
        if _has_lines(path):
            rounds = read_rounds(path.parent)
            runs.append(method_run(path.parent, path.parent.name, config, rounds))
    return sorted(runs, key=lambda run: (run.method != "fedms", -(_own_mean(run) or 0.0)))


def method_run(folder: Path, method: str, config: Config, rounds: list[RoundRecord]) -> MethodRun:
    """What a method wrote into its folder, with its clients' scores if there are any yet."""
    clients = read_clients(folder) if _has_lines(folder / "clients.jsonl") else []
    planned = len(rounds)
    known = method in ALGORITHMS
    if known:
        stages = stages_of(config.replace(method=method))
        planned = sum(stage.settings.rounds for stage in stages)
    metric = METRICS[config.task.kind]
    return MethodRun(method, title(method) if known else method, rounds, clients, planned, metric)


# The table --------------------------------------------------------------------------------------


def _own_mean(run: MethodRun) -> float | None:
    own = _scored(run).personalized_accuracy
    return own.mean if own else None


def _scored(run: MethodRun) -> RoundRecord:
    """The last round that was scored, or the last one if none was."""
    return next((r for r in reversed(run.rounds) if r.personalized_accuracy), run.rounds[-1])


def _scores(record: RoundRecord) -> tuple[float | None, ...]:
    """Own data, its worst tenth, everyone's data, unseen clients."""
    own, everyone, unseen = (
        record.personalized_accuracy, record.pooled_accuracy, record.unseen_accuracy
    )  # fmt: skip
    return (
        own.mean if own else None,
        own.worst10 if own else None,
        everyone.mean if everyone else None,
        unseen.mean if unseen else None,
    )


def _rows(runs: Sequence[MethodRun]) -> list[list[Cell]]:
    """The cells below :data:`COLUMNS`; the best of each accuracy column is bold."""
    scores = [_scores(_scored(run)) for run in runs]
    best = [
        max((value for value in column if value is not None), default=None)
        for column in zip(*scores, strict=True)
    ]
    rows: list[list[Cell]] = []
    for run, values in zip(runs, scores, strict=True):
        texts = [run.metric.shown(value) for value in values]
        own = _scored(run).personalized_accuracy
        if own:
            texts[0] += f" ± {run.metric.spread(own.std)}"
        done = run.rounds[-1].round
        rows.append([
            (run.label, False),
            (f"{done}" if run.finished else f"{done}/{run.planned}", False),
            *((t, v is not None and v == b) for t, v, b in zip(texts, values, best, strict=True)),
            (_percent(max(r.trainable_share for r in run.rounds), 2), False),
            (_megabytes(sum(r.bytes_up for r in run.rounds)), False),
            (_megabytes(sum(r.bytes_down for r in run.rounds)), False),
            (f"{sum(r.seconds for r in run.rounds):,.0f}", False),
        ])  # fmt: skip
    return rows


def _legend(runs: Sequence[MethodRun]) -> str:
    metric = runs[0].metric
    in_percent = metric.unit == "%"
    scores = f"{metric.name.capitalize()}{' in %' if in_percent else ', less is better'}"
    clients = {own.clients for run in runs if (own := _scored(run).personalized_accuracy)}
    return LEGEND.format(scores=scores, clients=" or ".join(map(str, sorted(clients))) or "no")


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


# The page ---------------------------------------------------------------------------------------


def _page(
    name: str,
    runs: Sequence[MethodRun],
    labels: LabelCounts | None,
    pictures: Iterable[Path],
    config: str,
) -> str:
    first = runs[0]
    state = f"{first.rounds[-1].round} of {first.planned} rounds"
    rounds = "".join(
        details(run.label, html_table(_named(ROUND_COLUMNS, run), _round_rows(run)), run is first)
        for run in runs
    )
    shown = first.final_clients
    some = ""
    if len(shown) > MOST_ROWS:
        shown = sorted(shown, key=lambda client: client.accuracy)[:MOST_ROWS]
        some = f": the lowest {MOST_ROWS} of {len(first.final_clients)} clients"
    clients = html_table(_named(CLIENT_COLUMNS, first), _client_rows(first, shown, labels))
    failed = [
        f"{run.name}, round {r.round}: {f.client_id}: {f.reason}"
        for run in runs for r in run.rounds for f in (*r.failed, *r.unscored)
    ]  # fmt: skip
    failures = "".join(f"<li>{escape(text)}</li>" for text in failed[:MOST_ROWS])
    if len(failed) > MOST_ROWS:
        failures += f"<li>and {len(failed) - MOST_ROWS} more, in metrics.jsonl</li>"
    body = f"""<h2>Methods</h2>{html_table(COLUMNS, _rows(runs))}<p class="note">{_legend(runs)}</p>
<h2>Pictures</h2>{figures(pictures, CAPTIONS)}
<h2>Round by round</h2>{rounds}
{f"<h2>Clients that were dropped or not scored</h2><ul>{failures}</ul>" if failures else ""}
<h2>Clients</h2>{details(f"{first.label}, after the last scored round{some}", clients)}
<h2>Settings</h2>{details("config.toml", f"<pre>{escape(config)}</pre>")}
"""
    return document(f"{first.name}: {name}", state, body)


def _named(columns: Iterable[str], run: MethodRun) -> list[str]:
    return [column.format(unit=run.metric.unit) for column in columns]


def _round_rows(run: MethodRun) -> list[list[Cell]]:
    return [_round_cells(record, run.metric) for record in run.rounds]


def _round_cells(record: RoundRecord, metric: Metric) -> list[Cell]:
    failed = f" ({len(record.failed)} dropped)" if record.failed else ""
    texts = (
        str(record.round),
        record.stage,
        f"{record.seconds:.1f}",
        f"{len(record.participants)}{failed}",
        ", ".join(map(str, record.awake_blocks)) or "–",
        _percent(record.trainable_share, 2),
        _megabytes(record.bytes_up),
        _megabytes(record.bytes_down),
        "–" if record.train_loss is None else f"{record.train_loss:.3f}",
        *map(metric.shown, _scores(record)),
        _percent(record.gate_local_mean),
        f"{record.peak_memory_mb:,.0f}",
    )
    return [(text, False) for text in texts]


def _client_rows(
    run: MethodRun, clients: Sequence[ClientRecord], labels: LabelCounts | None
) -> list[list[Cell]]:
    largest: dict[str, str] = {}
    if labels is not None:
        for client_id, counts in zip(labels.clients, labels.counts, strict=True):
            share = max(counts) / max(1, sum(counts))
            name = labels.class_names[counts.index(max(counts))]
            largest[client_id] = f"{name} ({_percent(share)} %)"
    return [
        [
            (text, False)
            for text in (
                client.client_id if client.seen else f"{client.client_id} (unseen)",
                str(client.num_test),
                run.metric.shown(client.accuracy),
                "–" if client.pooled_accuracy is None else run.metric.shown(client.pooled_accuracy),
                _percent(client.gate_local),
                largest.get(client.client_id, "–"),
            )
        ]
        for client in clients
    ]
