"""The command line: what each command says, and what it leaves on the disk."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from safetensors.torch import load_file

from fedms import __version__
from fedms.fl.cli import main
from fedms.fl.config import load_config
from fedms.fl.journal.states import ClientStates

ARGUMENTS = {
    "run": ["CONFIG.toml", "key=value", "--out DIR", "--quiet", "--settings", "fedms resume DIR"],
    "resume": ["DIR", "--quiet"],
    "report": ["DIR", "--out DIR", "comparison.html"],
    "predict": ["DIR", "--client ID", "TEXT"],
    "export": ["DIR", "ID", "--all"],
    "fetch": ["NAME", "fedms fetch dinov2-small emoji"],
    "doctor": ["--shape M K N R"],
    "tune": ["M", "K", "N", "--ranks", "--dtype", "--adapter-dtype"],
}
PREDICTION = r"  (bone|heart|lung|skin)  ([\d.]+) %   global expert ([\d.]+), local expert ([\d.]+)"


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory) -> Path:
    """A finished run of FedMS and one rival."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    rivals = 'rivals=["fedavg_ft", "fedms"]'
    assert main(["run", *settings, rivals, "--out", str(folder), "--quiet"]) == 0
    return folder


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {command} ", text, re.MULTILINE) for command in ARGUMENTS)


@pytest.mark.parametrize("command", ARGUMENTS)
def test_help_of_a_command_names_its_arguments(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(argument in text for argument in ARGUMENTS[command])


def test_fetch_shows_what_there_is_and_says_what_there_is_not(capsys):
    assert main(["fetch"]) == 0
    shown = capsys.readouterr().out
    for name in ("dinov2-small", "smollm2-135m", "emoji", "sotu", "wordnet", "debian"):
        assert re.search(rf"^{name} +\S", shown, re.MULTILINE)
    assert main(["fetch", "emojis"]) == 2
    assert "there is no 'emojis' to fetch" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fedms {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["train"], ["predict", "DIR", "text"], ["resume"]])
def test_usage_errors_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: fedms" in capsys.readouterr().err


def test_run_tells_rounds_and_ends_with_the_folder(settings, tmp_path, capsys):
    folder = tmp_path / "new" / "run"
    assert main(["run", *settings, "stage2.rounds=1", "--out", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(folder)
    assert "FedMS" in out
    for number, stage in ((1, "stage1"), (2, "stage1"), (3, "stage2")):
        assert f"fedms {stage} round {number}/3" in err


def test_quiet_is_quiet(settings, tmp_path, capsys):
    short = ["stage1.rounds=1", "stage2.rounds=0"]
    assert main(["run", *settings, *short, "--out", str(tmp_path / "r"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_settings_file_comes_first(settings, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[stage1]\nrounds = 1\nlocal_steps = 1\n[stage2]\nrounds = 0\n")
    left = [s for s in settings if not s.startswith(("stage1.rounds", "stage2.rounds"))]
    assert main(["run", str(path), *left, "--out", str(tmp_path / "r"), "--quiet"]) == 0
    config = load_config(tmp_path / "r" / "config.toml")
    assert (config.stage1.rounds, config.stage2.rounds) == (1, 0)
    assert config.stage1.local_steps == 2  # an override beats the file
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_printed_settings_are_a_settings_file(tmp_path, capsys):
    path = tmp_path / "my.toml"
    asked = ["stage1.rounds=3", "data.client_column=ward", "data.partitioner=column"]
    assert main(["run", "--settings", *asked]) == 0
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(path) == load_config(None, asked)
    assert main(["run", "--settings", str(path), "sal.max_blocks=0"]) == 2
    assert capsys.readouterr().err == "fedms: sal.max_blocks must be at least 1, got 0\n"


def test_the_folder_is_named_after_method_and_time(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *settings, "method=zero_shot", "--quiet"]) == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"runs/zero_shot-\d{8}-\d{6}", folder)
    assert (tmp_path / folder / "finished").exists()


def test_what_a_run_leaves_on_the_disk(finished, config, read_lines):
    for place, method in ((finished, "fedms"), (finished / "rivals" / "fedavg_ft", "fedavg_ft")):
        assert (place / "finished").exists()
        assert len(read_lines(place / "metrics.jsonl")) == 4
        assert len(list((place / "checkpoints").iterdir())) == 2
        assert load_config(place / "config.toml").method == method
        assert len(list((place / "clients").glob("*/*"))) == 2 * 4  # a file a client and checkpoint
        assert [path.name for path in (place / "adapters").iterdir()] == ["global"]
        weights = load_file(place / "adapters" / "global" / "adapter_model.safetensors")
        assert len(weights) == 2 * 3 * 2
    assert [path.name for path in (finished / "rivals").iterdir()] == ["fedavg_ft"]
    gates = load_file(finished / "gate.safetensors")
    assert sorted({name.rpartition(".")[0] for name in gates}) == [
        "gate.adapter.0",
        "gate.adapter.2",
    ]
    assert not (finished / "rivals" / "fedavg_ft" / "gate.safetensors").exists()
    assert list(finished.rglob(".*")) == []
    counts = json.loads((finished / "label_counts.json").read_text())
    assert counts["class_names"] == ["bone", "heart", "lung", "skin"]
    assert len(counts["clients"]) == 5


def test_export_writes_the_clients_that_are_asked_for(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(["export", str(run), "client-02", "client-03"]) == 0
    places = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert places == [run / "adapters" / "clients" / f"client-0{k}" for k in (2, 3)]
    assert sorted((run / "adapters" / "clients").iterdir()) == places
    states = ClientStates(run / "clients")
    for place in places:
        kept = states.read(place.name, 99)
        weights = load_file(place / "local" / "adapter_model.safetensors")
        assert len(weights) == 2 * 3 * 2
        for name, tensor in weights.items():
            layer = name.removeprefix("base_model.model.").removesuffix(".weight")
            assert torch.equal(tensor, kept[f"local.{layer}"])
        assert json.loads((place / "local" / "adapter_config.json").read_text())["r"] == 2
        gate = load_file(place / "gate.safetensors")
        assert torch.equal(gate["gate.linear.bias"], kept["gate.linear.bias"])
        assert "gate.adapter.0.weight" in gate
    assert main(["export", str(run), "--all"]) == 0
    assert (
        len(capsys.readouterr().out.splitlines()) == 5
    )  # an unseen one too: what it would receive


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the clients to export, or give --all"),
        (["client-00", "--all"], "name the clients to export, or give --all"),
        (["client-99"], "has no client 'client-99'; its clients are client-00, "),
    ],
)
def test_export_of_nobody(finished, capsys, arguments, said):
    assert main(["export", str(finished), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_resume_of_a_finished_run_changes_nothing(finished, capsys):
    def state() -> dict[Path, tuple[int, bytes]]:
        files = (path for path in finished.rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    assert main(["resume", str(finished)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(finished)
    assert state() == before


@pytest.mark.parametrize("client", ["client-00", "client-03"])
def test_predict_prints_a_class_and_two_weights(finished, capsys, client):
    texts = ["acute cough wheeze", "knee fracture"]
    assert main(["predict", str(finished), "--client", client, *texts]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == texts
    for line in lines[1::2]:
        found = re.fullmatch(PREDICTION, line)
        assert found, line
        assert 25 <= float(found[2]) <= 100
        assert float(found[3]) + float(found[4]) == pytest.approx(1, abs=0.011)


def test_predict_says_what_the_run_measured(finished, table, config, quiet, read_lines):
    """From the folder alone: a client's accuracy on its test texts is the last round's."""
    from fedms.fl.engines.world import load_federation
    from fedms.fl.runs.predict import predict

    federation = load_federation(config())
    last = {c["client_id"]: c for c in read_lines(finished / "clients.jsonl") if c["round"] == 4}
    for client in (*federation.clients, *federation.unseen):
        dataset = federation.dataset
        texts = [dataset.inputs[i] for i in client.test]
        names = [dataset.class_names[dataset.labels[i]] for i in client.test]
        found = predict(finished, client.client_id, texts, quiet)
        right = sum(p.class_name == name for p, name in zip(found, names, strict=True))
        score = last[client.client_id]
        assert right / len(texts) == pytest.approx(score["accuracy"])
        mean = sum(p.weight_local for p in found) / len(found)
        assert mean == pytest.approx(score["gate_local"], abs=1e-5)


def test_predict_with_a_rival(finished, capsys):
    rival = str(finished / "rivals" / "fedavg_ft")
    assert main(["predict", rival, "--client", "client-01", "rash"]) == 0
    assert re.fullmatch(r"rash\n  \w+  [\d.]+ %\n", capsys.readouterr().out)


def test_predict_is_the_same_twice_also_with_dropout(settings, tmp_path, capsys):
    folder = str(tmp_path / "r")
    assert main(["run", *settings, "lora.dropout=0.5", "--out", folder, "--quiet"]) == 0
    capsys.readouterr()
    said = set()
    for _ in range(2):
        assert main(["predict", folder, "--client", "client-01", "rash", "old knee"]) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1


def test_report(finished, capsys):
    assert main(["report", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "FedMS" in out
    assert (finished / "report.html").is_file()
    assert str(finished / "report.html") in out


def test_report_of_the_folder_that_runs_lie_in(finished, tmp_path, capsys):
    assert main(["report", str(finished.parent), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "left out" not in out
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "2 runs, 2 methods, 1 setting, 1 block<" in page
    assert str(finished / "rivals" / "fedavg_ft") in page
    scored = (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    own = 100 * json.loads(scored)["personalized_accuracy"]["mean"]
    assert re.search(rf"<td>FedMS</td><td>1</td><td>(<b>)?{own:.1f}<", page)


@pytest.mark.parametrize(
    ("encoding", "errors"),
    [("cp1252", "strict"), ("ascii", "strict"), ("ascii", "surrogateescape"), ("cp437", "strict")],
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "{run}"],
        ["resume", "{run}"],
        ["predict", "{run}", "--client", "client-01", "Fieber über 39° 🤒 ±"],
        ["run", "--settings", "data.source=Köln 発熱.csv"],
        ["run", "data.source=発熱.csv", "--out", "{run}/発熱"],
        ["doctor"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_any_console_takes_what_is_said(finished, monkeypatch, arguments, encoding, errors):
    """What its encoding lacks is replaced. A run must not die of ± after its last round."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    status = main([argument.format(run=finished) for argument in arguments])
    said = []
    for stream in streams:
        stream.flush()
        said.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    if "--out" in arguments:
        assert status == 2
        assert said[1].startswith("fedms: ")
    else:
        assert (status, said[1]) == (0, "")
        assert len(said[0]) > 40


def test_a_folder_whose_name_is_no_text(finished, tmp_path, capsys):
    """A name of bytes that are no UTF-8 comes out as far as it can."""
    folder = tmp_path / os.fsdecode(b"run \xff")
    shutil.copytree(finished, folder)
    assert main(["report", str(folder)]) == 0
    assert "run ?" in capsys.readouterr().out
    assert "run ?" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["my.toml", "--out", "D", "seed=7", "sal.every=2"],
        ["--out", "D", "my.toml", "seed=7", "sal.every=2"],
        ["my.toml", "seed=7", "--out", "D", "sal.every=2", "--quiet"],
        ["--quiet", "my.toml", "--settings", "seed=7", "sal.every=2", "--out", "D"],
    ],
)
def test_settings_stand_before_and_after_options(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text("[data]\nnum_clients = 3\n")
    assert main(["run", *arguments, "--settings"]) == 0
    Path("out.toml").write_text(capsys.readouterr().out)
    config = load_config(Path("out.toml"))
    assert (config.seed, config.sal.every, config.data.num_clients) == (7, 2, 3)


@pytest.mark.parametrize(
    "arguments",
    [["run", "seed=1", "--quite"], ["resume", "a", "b"], ["report", "a", "--quiet", "b"]],
)
def test_what_no_command_knows(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {' '.join(arguments[2:])}" in capsys.readouterr().err


def test_a_rank_without_a_world_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert main(["resume", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["resume", str(tmp_path)]) == 2
    assert not capsys.readouterr().err  # the first of torchrun's ranks says it


def test_without_flower_the_error_says_what_to_install(settings, tmp_path, capsys, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    assert main(["flower", "new", str(tmp_path / "app"), *settings]) == 2
    assert "pip install 'fedms[flower]'" in capsys.readouterr().err
    assert not (tmp_path / "app").exists()


def test_interrupt(settings, tmp_path):
    """Ctrl-C once the first round is done, in a process of its own: it falls anywhere."""
    heard = (  # also where the tests run in the background of a shell, which ignores it
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from fedms.fl.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", heard, "run", *settings, "stage1.rounds=1000", "--quiet"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "r")], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while process.poll() is None and not (tmp_path / "r" / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert "`fedms resume DIR` goes on" in said
