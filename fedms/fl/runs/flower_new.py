"""``fedms flower new DIR``: a Flower app for real sites, written from a configuration.

What it writes is small: Flower ships the folder to the SuperLink and to every site, where fedms is
installed already.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import tomli_w

from fedms import __version__
from fedms.fl.config import Config, to_toml
from fedms.fl.engines.world import read_dataset
from fedms.fl.journal.files import replace_file
from fedms.fl.types import ConfigError, FedMSError

DEADLINE = 900.0
"""Seconds that a site may take for an answer, unless the configuration says it."""

APP = '''"""{what}"""

from pathlib import Path

from fedms.fl.runs.flower import {function}

app = {function}(Path(__file__).with_name("config.toml"))
'''

README = """\
# {name}

A federation of {clients}, written by `fedms flower new` (fedms {version}).
`{package}/config.toml` holds every setting; `fedms run --settings` explains them.
Everywhere: `pip install 'fedms[flower,demo]'`.

1. On the server:

       flower-superlink --insecure --disable-runtime-dependency-installation

2. On each site:

       flower-supernode --insecure --superlink SERVER:8000 \\
         --node-config 'client-id="north" data="{example}" folder="/var/lib/fedms"'

3. From anywhere, with `[superlink.NAME]`, `address = "SERVER:8000"` and `insecure = true` in
   `~/.flwr/config.toml`:

       flwr run . NAME --stream

`--insecure` is for a network that you trust. TLS: `--ssl-ca-certfile`, `--ssl-certfile` and
`--ssl-keyfile` for the SuperLink, `--root-certificates` for SuperNodes. Authentication of sites:
`--enable-supernode-auth`, `flwr supernode register KEY.pub NAME`, `--auth-supernode-private-key`.

| in a site's `--node-config` | |
| --- | --- |
| `client-id` | its name, one of its own |
| `data` | its {data}; they stay there |
| `folder` | where its own expert and gate are kept and exported to; made if it is not there |
| `model` | its copy of the model, where that is not found as `{model}` |
| `unseen` | `true`: it is scored and takes part in no round |

The server writes metrics, checkpoints and the global expert to `out`, a path on its machine
(`--run-config 'out="/path"'`). If it is stopped, the same `flwr run` goes on from the last finished
round. Another `out` is another run.
"""


def write_app(config: Config, folder: Path) -> None:
    """Write the app to a new folder.

    The class names go with it: a site sees no labels but its own, and all must number them alike.

    Raises:
        FedMSError: the folder holds something, or nobody says what the classes are.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FedMSError(f"{folder} exists; name another folder for the app")
    config = _for_sites(config)
    name = re.sub(r"[^a-z0-9]+", "-", folder.absolute().name.lower()).strip("-") or "federation"
    package = "app_" + name.replace("-", "_")
    project = {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {
            "name": name,
            "version": "1.0.0",
            "description": "A federation with fedms",
            "dependencies": [f"fedms[flower,demo]=={__version__}", f"flwr=={version('flwr')}"],
        },
        "tool": {
            "hatch": {"build": {"targets": {"wheel": {"packages": [package]}}}},
            "flwr": {
                "app": {
                    "publisher": "fedms",
                    "components": {
                        "serverapp": f"{package}.server:app",
                        "clientapp": f"{package}.client:app",
                    },
                    "config": {"out": f"runs/{name}", "wait": 600.0},
                }
            },
        },
    }
    seen, unseen = config.data.num_clients, config.data.unseen_clients
    readme = README.format(
        name=name,
        clients=f"{seen} sites" + (f" and {unseen} that take part in no round" if unseen else ""),
        version=__version__,
        package=package,
        data=_data_of_a_site(config),
        example="/data/north" if config.task.kind == "images" else "/data/north.csv",
        model=config.model.path,
    )
    files = {
        "pyproject.toml": tomli_w.dumps(project),
        "README.md": readme,
        f"{package}/__init__.py": "",
        f"{package}/config.toml": to_toml(config),
        f"{package}/server.py": APP.format(
            what="The rounds, on the server.", function="server_app"
        ),
        f"{package}/client.py": APP.format(
            what="A site's answers to the server's orders.", function="client_app"
        ),
    }
    (folder / package).mkdir(parents=True)
    for path, content in files.items():
        replace_file(folder / path, content.encode())


def _data_of_a_site(config: Config) -> str:
    """What lies at a site, in words."""
    data, table = config.data, ".csv, .jsonl or .parquet file"
    if config.task.kind == "images":
        return (
            f"images: a folder of a folder for each class, or a {table} with the columns "
            f"{data.image_column} (file names beside it) and {data.label_column}"
        )
    if config.task.kind == "causal_lm":
        return f"texts: a {table} with the column {data.text_column}"
    return f"texts: a {table} with the columns {data.text_column} and {data.label_column}"


def _for_sites(config: Config) -> Config:
    """Without rivals, each of which would cost as much again, and with the classes' names."""
    data = config.data
    if config.task.kind != "causal_lm" and not data.class_names:
        try:
            dataset = read_dataset(config)
        except FedMSError as error:
            raise ConfigError(
                "every site must number the classes alike: say what they are, "
                'data.class_names.LABEL = "name in words" for each, or let data.source be a table '
                f"here that has them all ({error})"
            ) from error
        labels = dataset.class_labels or dataset.class_names
        data = data.replace(class_names=dict(zip(labels, dataset.class_names, strict=True)))
    engine = config.engine.replace(kind="local", deadline=config.engine.deadline or DEADLINE)
    return config.replace(rivals=(), data=data, engine=engine)
