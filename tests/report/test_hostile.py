"""Names of users that mean something to matplotlib, rich, HTML, Markdown or a file.

And terminals that cannot show them.
"""

import csv
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.text import Text

from fedmoe_jax.report.clients import write_clients_csv
from fedmoe_jax.report.page import write_report
from fedmoe_jax.report.plots import capacity_bars, save_png
from fedmoe_jax.report.runs import load_run
from fedmoe_jax.report.tables import markdown_table, print_table, write_runs_csv

from .fake_runs import ARRAYS, change_summary, make_run, write_run

NAMES = {
    "mathtext": r"$\frac$",
    "dollar": "a$b",
    "markup": "[/q] [bold]x[/bold] :smile:",
    "html": "<b>&amp;</i>",
    "table": "a|b_c^d*e`f",
    "lines": "two\nlines\r\x1b[2J",
    "emoji": "😀 ü ж",
    "surrogate": "half \udcff",
    "long": "x" * 500,
    "path": "../../a/b",
}
NAMED = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


class Page(HTMLParser):
    """The text of a page, and whether its tags fit together."""

    def __init__(self):
        super().__init__()
        self.text, self.open = "", []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def name_all(tmp_path, name):
    """A run in which all that users name has the name."""
    named = ARRAYS | {
        "tier_names": np.array([name, f"{name}2"]),
        "label_names": np.array([name, "b"]),
        "client_accuracy": np.array([0.5, 0.7, 1.0]),
    }
    run = make_run(tmp_path, name, arrays=named)
    origin = {"commit": None, "xla_flags": name}
    run.config["data"] = {"name": name}
    return run._replace(summary={"note": name, "needs": name, "made_by": origin})


@pytest.mark.slow
@NAMED
def test_write_report_shows_names_as_they_are(tmp_path, name):
    runs = [name_all(tmp_path, name), make_run(tmp_path, "random")]
    for few in (runs, runs[:1]):
        path = write_report(tmp_path / "out", few, f"python launch.py --x={name}")
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        assert not page.open
        seen = name.encode(errors="backslashreplace").decode().replace("\r", "\n")
        assert page.text.count(seen) >= 5


@NAMED
def test_tables_show_names_as_they_are(tmp_path, name):
    runs = [name_all(tmp_path, name), make_run(tmp_path, "random")]
    stream = io.StringIO()
    print_table(runs, stream)
    assert len(stream.getvalue().splitlines()) >= 3
    if name in ("$\\frac$", NAMES["markup"], NAMES["html"], NAMES["table"]):
        assert name in stream.getvalue()
    lines = markdown_table(runs).splitlines()
    assert len(lines) == 2 + 2
    assert lines[2].replace("\\|", "").count("|") == lines[3].count("|")


@NAMED
def test_csv_files_keep_names(tmp_path, name):
    runs = [name_all(tmp_path, name), make_run(tmp_path, "random")]
    kept = name.encode(errors="backslashreplace").decode()
    for write, field in ((write_runs_csv, "strategy"), (write_clients_csv, "tier")):
        path = tmp_path / "table.csv"
        write(path, runs)
        with path.open(newline="", encoding="utf-8") as file:
            first = next(csv.DictReader(file))
        assert first[field] == kept


def test_pictures_write_a_dollar_as_a_dollar(tmp_path):
    figure = capacity_bars(np.array([1, 2]), np.array([0, 1]), [r"$\frac$", "a$b$"])
    save_png(figure, io.BytesIO())
    texts = figure.findobj(Text)
    assert {r"$\frac$", "a$b$"} <= {text.get_text() for text in texts}
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.slow
def test_write_report_of_folders_says_what_made_the_runs(tmp_path):
    folders = [write_run(tmp_path / name, name) for name in ("greedy", "random")]
    for folder, commit in zip(folders, ("a" * 40, "b" * 40), strict=True):
        change_summary(folder, made_by={"commit": commit, "jax": "0.10"})
    runs = [load_run(folder) for folder in folders]
    text = write_report(tmp_path / "out", runs, "c").read_text(encoding="utf-8")
    assert "Made by: jax 0.10" in text
    different = "commit aaaaaaaaa (1 run), bbbbbbbbb (1 run)"
    assert f"<b>Made by different</b>: {different}" in text
    write_runs_csv(tmp_path / "runs.csv", runs)
    with (tmp_path / "runs.csv").open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    assert [r["made_by.commit"][0] for r in records] == ["a", "b"]
    assert {r["made_by.jax"] for r in records} == {"0.10"}
