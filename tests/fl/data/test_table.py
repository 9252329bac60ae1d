import builtins
import csv
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fedms.fl.data.dataset import load_dataset
from fedms.fl.data.federation import EVERYONE
from fedms.fl.data.icd10 import _sample, load_icd10
from fedms.fl.data.partition import Fractions, make_federation, split_dataset
from fedms.fl.types import DataError, FedMSError

ROWS = [
    {"text": "Fieber, erhöht", "label": "b", "site": "Köln", "split": "train"},
    {"text": 'drei\nZeilen,\r\n"zitiert"', "label": "a", "site": "Ulm", "split": "train"},
    {"text": "発熱と咳 🤒", "label": "a", "site": "Köln", "split": "test"},
]


def write(path: Path, rows: list[dict], encoding: str = "utf-8") -> Path:
    if path.suffix.lower() == ".csv":
        with path.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding=encoding)
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(path: Path, **options):
    return load_dataset(path, **options)


def refuse(path: Path, *parts: str, **options) -> None:
    """Loading fails with one line that holds every part."""
    with pytest.raises(DataError) as caught:
        load(path, **options)
    for part in (*parts, path.name):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "A.CSV"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_comes_back_as_it_was_written(tmp_path, name, encoding):
    data = load(write(tmp_path / name, ROWS, encoding), client_column="site", split_column="split")
    assert data.inputs == tuple(row["text"] for row in ROWS)
    assert data.class_names == ("a", "b")
    assert data.labels.tolist() == [1, 0, 0]
    assert data.labels.dtype == np.int64
    assert data.clients == ("Köln", "Ulm", "Köln")
    assert data.splits == ("train", "train", "test")
    assert data.groups is None


def test_the_formats_agree(tmp_path):
    loaded = [load(write(tmp_path / f"a{end}", ROWS)) for end in (".csv", ".jsonl", ".parquet")]
    for data in loaded[1:]:
        assert (data.inputs, data.class_names) == (loaded[0].inputs, loaded[0].class_names)
        assert data.labels.tolist() == loaded[0].labels.tolist()
    assert loaded[0].clients is None
    assert loaded[0].splits is None


@pytest.mark.parametrize("end", [".csv", ".jsonl", ".parquet"])
def test_integer_labels_sort_as_numbers(tmp_path, end):
    path = write(tmp_path / f"a{end}", [{"text": "t", "label": n} for n in (10, 9, -1, 10)])
    data = load(path)
    assert data.class_names == ("-1", "9", "10")
    assert data.labels.tolist() == [2, 1, 0, 2]


def test_class_names_in_words(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    assert load(path, class_names=["cough", "fever"]).class_names == ("cough", "fever")
    named = load(path, class_names={"b": "fever", "a": "cough", "z": "unused"})
    assert named.class_names == ("cough", "fever")
    with pytest.raises(DataError, match=r"class_names must hold 2 names, .*got 1 names"):
        load(path, class_names=["cough"])
    with pytest.raises(DataError, match=r"class_names must name every label, got none for \['b'\]"):
        load(path, class_names={"a": "cough"})


def test_a_part_of_the_whole_numbers_classes_as_the_whole_does(tmp_path):
    path = tmp_path / "part.csv"
    path.write_text("text,label\na,10\nb,10\n", encoding="utf-8")
    names = {"10": "ten", "9": "nine", "2": "two"}
    data = load_dataset(path, class_names=names, every_class=True)
    assert data.class_names == ("two", "nine", "ten")
    assert data.class_labels == ("2", "9", "10")
    assert data.labels.tolist() == [2, 2]
    path.write_text("text,label\na,10\nb,11\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"part.csv.*class_names names, got '11' \(1 rows\)"):
        load_dataset(path, class_names=names, every_class=True)


def test_blanks_around_a_label_and_blank_lines_do_not_count(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx, a\n\ny,a\nz,b\n\n")
    assert load(path).labels.tolist() == [0, 0, 1]
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "x", "label": "a"}\n\n{"text": "y", "label": "b"}\n')
    assert load(path).labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["*", "everyone", EVERYONE])
def test_no_name_in_a_table_stands_for_everyone(tmp_path, name):
    rows = [{**ROWS[0], "text": str(i), "site": name if i % 4 else "b"} for i in range(40)]
    path = write(tmp_path / "a.csv", [*rows, {**ROWS[1], "site": "b"}])
    federation = make_federation(load(path, client_column="site"), partitioner="column")
    (own,) = (client for client in federation.clients if client.client_id == name.strip())
    assert federation.client(own.client_id) is own


def test_a_cell_may_be_of_any_length(tmp_path):
    long = "word " * 40_000
    path = write(tmp_path / "a.csv", [{**ROWS[0], "text": long}, ROWS[1]])
    assert load(path).inputs[0] == long


def test_equal_texts_are_one_group(tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip("xyxzyx", "ababab", strict=True)]
    path = write(tmp_path / "a.csv", rows)
    assert load(path).groups.tolist() == [0, 1, 0, 2, 1, 0]
    sides = split_dataset(load(path), Fractions(0.5, 0, 0, 0.5), seed=0)
    for one in sides:
        for other in sides:
            if one is not other:
                assert not {rows[i]["text"] for i in one} & {rows[i]["text"] for i in other}


def test_groups_of_a_column(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    assert load(path, group_column="site").groups.tolist() == [0, 1, 0]
    refuse(path, "no column 'sight'", "did you mean 'site'?", group_column="sight")


def test_no_classes_at_all(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": "x"}, {"text": "y"}])
    data = load(path, label_column=None)
    assert data.labels.tolist() == [0, 0]
    assert len(data.class_names) == 1


def test_no_such_file(tmp_path):
    refuse(tmp_path / "none.csv", "no such file")


def test_unknown_ending(tmp_path):
    path = tmp_path / "a.xlsx"
    path.touch()
    refuse(path, "'icd10'", ".csv, .jsonl, .parquet")


@pytest.mark.parametrize("end", [".csv", ".jsonl", ".parquet"])
def test_missing_column(tmp_path, end):
    path = write(tmp_path / f"a{end}", ROWS)
    refuse(path, "no column 'labels'", "'site'", "did you mean 'label'?", label_column="labels")
    refuse(path, "no column 'hospital'", client_column="hospital")


@pytest.mark.parametrize("end", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("column", "value", "parts"),
    [
        ("text", None, ["'text'", "a text, got none"]),
        ("text", " \n", ["'text'", "a text, got none"]),
        ("label", None, ["'label'", "a label", "got none"]),
        ("site", None, ["'site'", "a client", "got none"]),
    ],
)
def test_missing_cell(tmp_path, end, column, value, parts):
    rows = [*ROWS[:2], {**ROWS[2], column: value}]
    where = "line 3" if end == ".jsonl" else "row 3"
    refuse(write(tmp_path / f"a{end}", rows), where, *parts, client_column="site")


def test_missing_cell_in_csv(tmp_path):
    path = write(tmp_path / "a.csv", [*ROWS, {**ROWS[0], "label": ""}])
    refuse(path, "row 4", "'label'", "got none")  # row 2 has three lines; rows are counted


def test_a_cell_of_another_type(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], {"text": 3, "label": "a"}])
    refuse(path, "line 2", "'text'", "got type int")
    path = write(tmp_path / "a.parquet", [{"text": "x", "label": 0.5}])
    refuse(path, "row 1", "'label'", "string or an integer", "got type float")


def test_label_only_in_the_test_rows(tmp_path):
    rows = [*ROWS, *[{**ROWS[2], "label": "c"}] * 2]
    refuse(write(tmp_path / "a.csv", rows), "training row", "'c' (2 rows)", split_column="split")


@pytest.mark.parametrize("bad", ["dev", ""])
def test_split_is_neither_train_nor_test(tmp_path, bad):
    path = write(tmp_path / "a.csv", [*ROWS, {**ROWS[2], "split": bad}])
    refuse(path, "'train'", "'test'", split_column="split")


def test_split_column_without_test_rows(tmp_path):
    refuse(write(tmp_path / "a.csv", ROWS[:2]), "'test'", "['train']", split_column="split")


def test_only_one_class(tmp_path):
    refuse(write(tmp_path / "a.csv", ROWS[1:]), "2 classes", "'a'")


@pytest.mark.parametrize("end", [".csv", ".jsonl"])
@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file(tmp_path, end, content):
    path = tmp_path / f"a{end}"
    path.write_text(content)
    refuse(path, "at least one row", "empty")


def test_header_alone(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n")
    refuse(path, "at least one row")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"text": "x", "label": "a"}\n{"text": \n', ["line 2", "not valid JSON"]),
        ("a.jsonl", b'["x", "a"]\n', ["line 1", "JSON object", "list"]),
        ("a.jsonl", b'{"text": "\\ud83d", "label": "a"}\n', ["line 1", "'text'", "surrogate"]),
        ("a.csv", b"text,label\nx,a\none, two,b\n", ["row 2", "expected 2 cells", "got 3"]),
        ("a.csv", b"text,label\nx\n", ["row 1", "expected 2 cells", "got 1"]),
        ("a.csv", b'text,label\n"x,a\n', ["line 2", "not valid CSV"]),
        ("a.csv", b"text,label,label\nx,a,b\n", ["'label'", "once"]),
        ("a.csv", b"text,label\nM\xfcller,a\n", ["UTF-8"]),
        ("a.parquet", b"text", ["Parquet"]),
        ("a.parquet", b"", ["Parquet"]),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", ["Parquet"]),
    ],
)
def test_malformed_file(tmp_path, name, content, parts):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    refuse(path, *parts)


def test_parquet_that_holds_a_column_twice_or_bytes_as_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path, column = tmp_path / "a.parquet", pa.array(["a", "b"])
    write_table(pa.Table.from_arrays([column] * 3, names=["text", "label", "label"]), path)
    refuse(path, "'label'", "once")
    latin = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"b"]).buffers())
    write_table(pa.table({"text": latin, "label": column}), path)
    refuse(path, "cannot be read as Parquet", "utf-8")


def without(monkeypatch, package: str) -> None:
    """Make ``import package`` fail as if it were not installed."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fake)


def test_missing_extras_are_named(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.touch()
    without(monkeypatch, "pyarrow")
    refuse(path, "fedms[parquet]")
    without(monkeypatch, "simple_icd_10_cm")
    with pytest.raises(FedMSError, match=r"fedms\[demo\]"):
        load_dataset("icd10")


def test_load_dataset_by_name_or_path(tmp_path):
    data = load_dataset(str(write(tmp_path / "a.csv", ROWS)), client_column="site")
    assert data.clients == ("Köln", "Ulm", "Köln")
    with pytest.raises(DataError, match=r"must be 'icd10' or a file ending in .*got 'icd9'"):
        load_dataset("icd9")


@pytest.fixture(scope="module")
def icd10():
    if find_spec("simple_icd_10_cm") is None:  # importorskip would import it, with its warning
        pytest.skip("simple-icd-10-cm is not installed")
    return load_icd10()


def test_icd10_classes_are_chapters(icd10):
    assert len(icd10.class_names) == 21
    assert icd10.class_names[1] == "Neoplasms"
    assert not any(c in name for name in icd10.class_names for c in "()0123456789")
    assert np.bincount(icd10.labels).min() > 100
    first = icd10.inputs.index("Typhoid and paratyphoid fevers")
    assert icd10.labels[first] == 0
    assert icd10.labels[icd10.inputs.index("Cervicalgia")] == 12


def test_icd10_texts_are_distinct_and_few_a_category(icd10):
    assert len({text.casefold() for text in icd10.inputs}) == len(icd10) > 7000
    assert np.bincount(icd10.groups).max() == 6
    assert np.bincount(icd10.groups).min() >= 1
    assert not any(text.endswith(("encounter", "sequela")) for text in icd10.inputs)
    for group in range(icd10.groups.max() + 1):
        assert len(set(icd10.labels[icd10.groups == group])) == 1


@pytest.mark.parametrize("seed", range(5))
def test_icd10_sample_takes_turns_among_subcategories(seed):
    branches = [["own", "own 2"], ["left", "right", "both"], [], ["other"]]
    sample = _sample(branches, 5, np.random.default_rng(seed))
    assert sample[0] == "own"
    assert "other" in sample[1:3]  # the first turn: one of each branch
    assert sample[3] == "own 2"
    assert len({"left", "right", "both"} & {*sample[1:3]}) == 1
    assert len(set(sample)) == 5


def test_icd10_repeats_with_the_seed(icd10):
    again, other = load_icd10(), load_icd10(seed=1)
    assert again.inputs == icd10.inputs
    assert (again.groups == icd10.groups).all()
    assert other.inputs != icd10.inputs
    assert (again.labels == icd10.labels).all()


def test_icd10_size_of_the_sample(icd10):
    assert len(load_icd10(max_per_category=1)) == len(set(icd10.groups))
    with pytest.raises(DataError, match="max_per_category must be at least 1, got 0"):
        load_icd10(max_per_category=0)


def test_icd10_categories_stand_on_one_side_and_classes_on_all(icd10):
    parts = split_dataset(icd10, Fractions(), seed=0)
    groups = [set(icd10.groups[part]) for part in parts]
    assert sum(len(g) for g in groups) == len(set(icd10.groups))
    for part in parts:
        assert len(set(icd10.labels[part])) == 21
