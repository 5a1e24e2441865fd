"""Runs that diverged are counted, named and marked in every table."""

import io
import math

import pytest

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.report import budgets, diverged, tables
from fedmoe_jax.report.cells import Cell
from fedmoe_jax.report.sections import list_sections, markdown_tables

from .fake_runs import make_row, make_run

OLDER = {key: m for key, m in MEASURES.items() if key != "diverged"}
NOTE = "†: with runs that diverged: greedy (seed 0, 2)."


def make_greedy(tmp_path, *flags, label="greedy"):
    """Runs of one label, each of which diverges in its second round or not."""
    row = dict(global_accuracy=0.4, personal_accuracy=0.5)
    runs = []
    for seed, flag in enumerate(flags):
        rows = [make_row(1, diverged=0), make_row(2, **row, diverged=flag)]
        runs.append(make_run(tmp_path, label, rows, seed=seed))
    return runs


@pytest.fixture
def runs(tmp_path):
    calm = make_greedy(tmp_path, 0, 0, 0, label="random")
    return make_greedy(tmp_path, 1, 0, 1) + calm


def test_has_diverged_reads_the_measure(tmp_path):
    broken, calm = make_greedy(tmp_path, 2, 0)
    assert diverged.has_diverged(broken) and not diverged.has_diverged(calm)
    assert not diverged.has_diverged(broken._replace(measures=OLDER))


def test_count_cell_counts_the_runs_that_say():
    assert diverged.count_cell([0, 3, math.nan, 1]).text == "2 of 3"
    assert diverged.count_cell([math.nan]).text == "no data"


def test_mark_cell_leaves_cells_without_a_number():
    assert diverged.mark_cell(Cell("1.0", 1.0)).text == "1.0 †"
    assert diverged.mark_cell(Cell("–", math.nan)).text == "–"


def test_describe_diverged_names_labels_and_seeds(runs):
    assert diverged.describe_diverged(runs) == NOTE
    assert diverged.describe_diverged(runs[3:]) == ""


def test_table_counts_them_and_marks_the_means(runs):
    columns, rows = tables.table(runs)
    titles = [column.title for column in columns]
    cells = {label: dict(zip(titles, row, strict=True)) for label, row in rows.items()}
    assert cells["greedy"]["Diverged"].text == "2 of 3"
    assert cells["random"]["Diverged"].text == "0 of 3"
    assert cells["greedy"]["Global %"].text == "40.0 ± 0.0 †"
    assert cells["random"]["Global %"].text == "40.0 ± 0.0"
    assert "†" not in cells["greedy"]["Rounds to 95 % of own final"].text
    assert titles.count("Diverged") == 1
    calm = [column.title for column in tables.table(runs[3:])[0]]
    assert "Diverged" not in calm


def test_the_printed_table_and_markdown_name_them(runs):
    stream = io.StringIO()
    tables.print_table(runs, stream)
    assert "2 of 3" in stream.getvalue() and NOTE in stream.getvalue()
    text = markdown_tables(runs, "")
    assert "| 2 of 3 |" in text and text.count(NOTE) == 4


def test_further_tables_mark_them(runs):
    pairs, costs, targets = list_sections(runs, "random")
    assert pairs.sheets[0].rows["greedy"][1].text.startswith("+0.0 ± 0.0 †; 0 / 0")
    rows = costs.sheets[0].rows
    assert rows["greedy"][0].text == "40.0 ± 0.0 †"
    assert rows["random"][0].text == "40.0 ± 0.0"
    assert all(section.about.endswith(NOTE) for section in (pairs, costs, targets))
    assert not budgets.budget_section(runs[:3])
