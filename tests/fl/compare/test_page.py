"""The page of many runs, its tables and pictures, and the command that makes it."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from folders import write_run
from matplotlib.text import Text
from results import result

from fedms.fl.cli import main
from fedms.fl.compare.comparison import Comparison
from fedms.fl.compare.looks import STAND_OUT, beaten, looks_of
from fedms.fl.compare.marks import Mark, number
from fedms.fl.compare.pictures import costs, draw
from fedms.fl.compare.result import Point
from fedms.fl.compare.tables import Table, difference_tables, rank_tables, setting_tables
from fedms.fl.runs.plots import new_figure
from fedms.fl.tasks.causal_lm import BITS


def texts(table: Table) -> list[list[str]]:
    return [[text for text, _ in row] for row in table.rows]


def bold(table: Table) -> list[str]:
    return [text for row in table.rows for text, is_bold in row if is_bold]


# Tables -----------------------------------------------------------------------------------------


def test_a_settings_table_is_of_the_seeds_that_its_methods_have_in_common():
    found = Comparison([
        result("a", 0.6, 0.4, 0), result("a", 0.8, 0.4, 1), result("b", 0.5, 0.7, 0),
        result("b", 0.5, 0.8, 1), result("c", 0.9, 0.9, 1),
    ])  # fmt: skip
    (table,) = setting_tables(found, ranges=True)
    assert table.title == "one"
    assert texts(table) == [
        ["B", "2", "50.0 (50.0–50.0)", "25.0 (25.0–25.0)", "75.0 (70.0–80.0)", "–", "1.0", "1.0",
         "2"],
        ["A", "2", "70.0 (60.0–80.0)", "35.0 (30.0–40.0)", "40.0 (40.0–40.0)", "–", "1.0", "1.0",
         "2"],
        ["C †", "1", "90.0", "45.0", "90.0", "–", "1.0", "1.0", "2"],
    ]  # fmt: skip
    assert bold(table) == ["75.0 (70.0–80.0)", "70.0 (60.0–80.0)", "35.0 (30.0–40.0)"]
    assert "seeds 0, 1" in table.note
    assert "†" in table.note
    (short,) = setting_tables(found, ranges=False)
    assert texts(short)[0][:5] == ["B", "2", "50.0", "25.0", "75.0"]


def test_seeds_that_most_methods_lack_are_named():
    found = Comparison([*(result(m, 0.5) for m in "abc"), result("a", 0.1, seed=7)])
    (table,) = setting_tables(found, ranges=False)
    assert [row[:3] for row in texts(table)] == [[m, "1", "50.0"] for m in "ABC"]
    assert "Not all methods have seed 7." in table.note


def test_ranks_need_two_blocks_and_the_scores_that_all_have():
    one = [result("a", 0.6, None), result("b", 0.5, None)]
    assert rank_tables(Comparison(one)) == []
    assert difference_tables(Comparison(one)) == []
    worst = [result("c", 0.4, None, seed) for seed in (0, 1)]
    two = Comparison([*worst, *one, result("a", 0.6, None, 1), result("b", 0.7, None, 1)])
    (table,) = rank_tables(two)
    assert table.columns == ("1 is the best", "own", "worst tenth")
    assert texts(table) == [
        ["A", "1.5 [1.0, 2.0]", "1.5 [1.0, 2.0]"],
        ["B", "1.5 [1.0, 2.0]", "1.5 [1.0, 2.0]"],
        ["C", "3.0 [3.0, 3.0]", "3.0 [3.0, 3.0]"],
    ]


def test_differences_are_of_fedms_and_units_stand_apart():
    def runs(method: str, own: float, **more: object) -> list:
        return [result(method, own, own, seed, **more) for seed in (0, 1)]

    bits = {"setting": "two", "metric": BITS}
    found = Comparison([
        *runs("fedms", 0.5), *runs("fedavg", 0.7), *runs("fedms", -4.0, **bits),
        *runs("fedavg", -4.5, **bits),
    ])  # fmt: skip
    accuracy, language = difference_tables(found)
    assert accuracy.title == "Fedms less each other method, in %"
    assert texts(accuracy)[0][:3] == ["Fedavg", "2", "-20.0 [-20.0, -20.0]"]
    assert language.title == "Fedms less each other method, in bit"
    assert texts(language)[0][:3] == ["Fedavg", "2", "+0.500 [+0.500, +0.500]"]


# Pictures ---------------------------------------------------------------------------------------


def test_of_thirty_methods_a_dozen_stand_out_and_all_are_numbered():
    names = [f"fedms, {i}" for i in range(18)] + [f"rival {i}" for i in range(12)]
    runs = [result(name, 0.5 + i / 100, 0.5, seed) for seed in (0, 1, 2)
            for i, name in enumerate(names)]  # fmt: skip
    looks = looks_of(Comparison(runs), first=("fedms, 3", "nobody", "rival 0"))
    assert [look.number for look in looks.values()] == list(range(1, 31))
    assert list(looks)[:2] == ["fedms, 3", "fedms, 17"]  # then the best
    assert list(looks)[18:20] == ["rival 0", "rival 11"]
    shown = {name: look for name, look in looks.items() if look.stands_out}
    assert len(shown) == STAND_OUT
    assert {"fedms, 3", "rival 0"} < set(shown)
    assert sum(name.startswith("rival") for name in shown) == 6
    assert len({(look.color, look.marker) for look in shown.values()}) == STAND_OUT


def test_who_is_beaten_least_needs_no_full_table():
    found = Comparison([
        result("a", 0.9, 0.1), result("b", 0.4, 0.4), result("c", 0.6, 0.6),
        result("a", 0.9, 0.1, 1), result("c", 0.2, 0.2, 1),
        result("b", 0.4, None, 2), result("c", 0.3, 0.9, 2),
    ])  # fmt: skip
    assert beaten(found) == pytest.approx({"a": 0.25, "b": 0.5, "c": 2 / 3})


def test_numbers_hide_neither_one_another_nor_marks():
    figure = new_figure(5, 4)
    axes = figure.subplots()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    marks = [Mark(0.5 + 0.01 * (i % 5), 0.5 + 0.01 * (i // 5), str(i), "black", 6, i < 5)
             for i in range(20)]  # fmt: skip
    figure.draw_without_rendering()
    number(axes, marks)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the mark
    assert len(boxes) == 20
    for i, box in enumerate(boxes):
        middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
        assert not any(other.contains(*middle) for other in boxes[:i])
        assert axes.get_window_extent().contains(*middle)


def test_pictures_of_all_there_can_be(tmp_path):
    knobs = {0.5: Point(0.8, 0.7, 0.3, None)}
    bits = {"setting": "two", "metric": BITS}
    runs = [
        *(result(f"m{i}", 0.5 + i / 100, 0.6, by_knob=knobs) for i in range(6)),
        result("bad", 0.01, 0.01, by_knob=knobs),
        result("m1", -4.0, -5.0, **bits), result("m2", -3.0, -5.0, **bits),
    ]  # fmt: skip
    written = draw(Comparison(runs), tmp_path / "new")
    assert [path.name for path in written] == ["frontier.png", "cost.png", "ranks.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_cost_is_shown_where_it_is_known():
    runs = [
        result(f"m{i}", 0.5, seed=seed, cpu_seconds=9.0 if seed and i < 6 else None)
        for i in range(7)
        for seed in range(3)
    ]
    comparison = Comparison(runs)
    titles = [axes.get_title(loc="left") for axes in costs(comparison, looks_of(comparison)).axes]
    assert titles == ["7 methods, 3 blocks", "6 methods, 2 blocks"]


def test_one_run_of_a_name_that_no_font_has(tmp_path):
    run = result("$x_$ 疾病", 0.5, setting="疾病 $y_$.csv", bytes_up=0, bytes_down=0)
    assert len(draw(Comparison([run]), tmp_path)) == 3


def test_where_nobody_has_everyones_data_there_is_no_frontier(tmp_path):
    runs = [result("a", 0.5, None), result("b", 0.5, None, bytes_up=0, bytes_down=0)]
    assert [path.name for path in draw(Comparison(runs), tmp_path)] == ["cost.png", "ranks.png"]


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two methods, two seeds, a run that is not finished."""
    knobs = {"0.5": (0.8, 0.3)}
    for seed in (0, 1):
        for method, own in (("fedms", 0.6), ("fedavg", 0.5)):
            write_run(tmp_path / "sweep" / f"{method}-{seed}", f"seed={seed}", f"method={method}",
                      own=(own,), by_prior=knobs)  # fmt: skip
    write_run(tmp_path / "sweep" / "stopped <b>", rounds=1)
    return tmp_path / "sweep"


def test_a_folder_of_runs_becomes_a_page_that_needs_nothing_else(sweep, capsys):
    assert main(["report", str(sweep)]) == 0
    names = ["frontier.png", "cost.png", "ranks.png", "comparison.html"]
    out = capsys.readouterr().out
    assert out.splitlines()[-4:] == [str(sweep / name) for name in names]
    assert "left out: " in out
    assert "Mean ranks of 2 methods over 2 blocks" in out
    page = (sweep / "comparison.html").read_text("utf-8")
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(e) for e in embedded] == [(sweep / n).read_bytes() for n in names[:3]]
    assert "4 runs, 2 methods, 1 setting, 2 blocks" in page
    assert "60.0 (60.0–60.0)" in page
    assert "<td>+10.0 [+10.0, +10.0]</td>" in page
    assert "stopped &lt;b&gt;: unfinished: 1 of 2 rounds" in page
    assert "<script" not in page


def test_several_runs_become_a_page_in_the_folder_that_holds_them(sweep, tmp_path, capsys):
    runs = [str(sweep / name) for name in ("fedms-0", "fedavg-0")]
    assert main(["report", *runs]) == 0
    assert "Ranks and differences need two blocks" in (sweep / "comparison.html").read_text("utf-8")
    assert main(["report", *runs, "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "comparison.html").exists()


def test_one_run_is_reported_as_before(sweep, tmp_path, capsys):
    assert main(["report", str(sweep / "fedms-0")]) == 0
    assert (sweep / "fedms-0" / "report.html").exists()
    assert main(["report", str(sweep / "fedms-0"), "--out", str(tmp_path)]) == 2
    assert "--out is for many runs" in capsys.readouterr().err


def test_a_folder_without_runs_is_one_clear_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"fedms: {tmp_path} holds no run, nor does any folder in it\n"
