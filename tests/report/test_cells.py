"""Cells of the tables, by hand."""

import math

from fedmoe_jax.report import cells


def test_mean_cell_by_hand():
    assert cells.mean_cell([0.1, 0.2, 0.3], 100, 1).text == "20.0 ± 24.8"
    assert cells.mean_cell([0.1, math.nan], 100, 1).text == "10.0 (1/2 seeds)"
    assert cells.mean_cell([math.nan], 1, 1).text == "no data"


def test_one_seed_is_no_seeds_that_agree():
    assert cells.mean_cell([0.431], 100, 1).text == "43.1 (1 seed)"
    assert cells.mean_cell([2.0, 2.0], 1, 1).text == "2.0 ± 0.0"
    both = cells.mean_cell([2.0, 2.0, math.nan], 1, 1)
    assert both.text == "2.0 ± 0.0 (2/3 seeds)"


def test_median_cell_by_hand():
    assert cells.median_cell([10, math.inf, 20]).text == "20 (2/3)"
    assert cells.median_cell([10, math.inf, math.inf]).text == "– (1/3)"
    assert cells.median_cell([math.nan]).text == "no data"
    assert cells.median_cell([10, math.nan]).text == "10 (1/1)"
