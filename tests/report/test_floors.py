"""Floors of participation in a report, by hand."""

import numpy as np
import pytest
from scipy import stats

from fedmoe_jax.report.floors import (
    find_trend,
    floor_picture,
    floor_section,
)

from .fake_runs import make_row, make_run

SPREADS = {0.0: (0.30, 0.28, 0.33), 0.1: (0.25, 0.26, 0.24), 0.2: (0.20, 0.22, 0.21)}


def make_floors(tmp_path, spreads=SPREADS, label="greedy", power=0.0):
    """A run of each floor and seed; accuracy falls by a point with each floor."""
    runs = []
    for place, (floor, values) in enumerate(spreads.items()):
        for seed, value in enumerate(values):
            row = make_row(1, accuracy_spread=value, global_accuracy=0.5 - place / 100)
            run = make_run(tmp_path, label, [row], seed=seed)
            fairness = {"floor": floor, "power": power}
            runs.append(run._replace(config=run.config | {"fairness": fairness}))
    return runs


def rows_of(sheet, *heads):
    places = [sheet.heads.index(head) - 1 for head in heads]
    texts = {label: [cells[at] for at in places] for label, cells in sheet.rows.items()}
    return {label: [cell.text for cell in cells] for label, cells in texts.items()}


def test_find_trend_is_pages_test():
    values = np.array([[3.0, 2.0, 1.0, 0.5], [3.0, 1.0, 2.0, 0.1]])
    trend = find_trend(values)
    expected = stats.page_trend_test(-values, method="exact").pvalue
    assert trend[:2] == (4, 2) and trend.falls == pytest.approx(expected)
    rho = [stats.spearmanr(range(4), row).statistic for row in values]
    assert trend.correlation == pytest.approx(np.mean(rho))
    assert trend.rises > 0.9 and find_trend(-values).rises == trend.falls


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (5, 2)])
def test_find_trend_needs_seeds_and_floors(shape):
    assert find_trend(np.ones(shape)) is None


def test_floor_section_has_differences_to_the_lowest_floor(tmp_path):
    section = floor_section(make_floors(tmp_path))
    sheet, trends = section.sheets
    found = rows_of(sheet, "SD over clients, points", "Global %")
    assert found == {
        "greedy, floor 0": ["30.3 ± 6.3", "50.0 ± 0.0"],
        # -5, -2 and -9: their mean, and 4.303 standard errors of 2.028.
        "greedy, floor 0.1": ["-5.3 ± 8.7", "-1.0 ± 0.0"],
        "greedy, floor 0.2": ["-9.3 ± 7.6", "-2.0 ± 0.0"],
    }
    spreads = [
        cells[sheet.heads.index("Global %") - 1] for cells in sheet.rows.values()
    ]
    assert [cell.bold for cell in spreads] == [False, True, True]
    # All three seeds fall: 1 of 6 orders each.
    p = stats.page_trend_test(np.tile([1, 2, 3], (3, 1)), method="exact").pvalue
    cells = rows_of(trends, *trends.heads[1:])["greedy"]
    assert cells[:4] == ["3", "3", "-1.00", f"{p:.2g}"]


def test_floor_section_marks_runs_that_diverged_and_tests_no_two_floors(tmp_path):
    runs = make_floors(tmp_path, {0.0: (0.3, 0.2), 0.1: (0.2, 0.1)})
    runs[0].rows[0]["diverged"] = 1.0
    sheet, trends = floor_section(runs).sheets
    found = rows_of(sheet, "SD over clients, points")
    assert all(text.endswith("†") for (text,) in found.values())
    assert {cell.text for cell in trends.rows["greedy"]} == {"no data"}


def test_no_section_and_no_picture_below_two_floors(tmp_path):
    runs = make_floors(tmp_path, {0.1: (0.3, 0.2)})
    assert floor_section(runs) is None and list(floor_picture(runs)) == []
    assert floor_section([make_run(tmp_path)]) is None


def test_floor_picture_draws_the_spread_against_the_floor(tmp_path):
    runs = make_floors(tmp_path) + make_floors(tmp_path, label="random")
    (picture,) = floor_picture(runs)
    (axes,) = picture.figure.axes
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(x, [0, 10, 20])
    np.testing.assert_allclose(y, 100 * np.mean([*SPREADS.values()], axis=1))
    assert {text.get_text() for text in axes.texts} == {"greedy", "random"}
