"""Differences seed by seed, by hand."""

import pytest
from scipy.stats import binomtest

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.report import paired

KEY = "final_global_accuracy"
BASE = {0: 0.4, 1: 0.5, 2: 0.6}


def seeds_of(values):
    return {seed: {KEY: value} for seed, value in values.items()}


def pair(ours, others=BASE, measure=MEASURES[KEY]):
    return paired.pair_up(seeds_of(ours), seeds_of(others), KEY, measure)


def test_pair_up_by_hand():
    # Differences of 10, 20 and 30 points: 20 ± 4.30265 * 10 / sqrt(3).
    found = pair({0: 0.5, 1: 0.7, 2: 0.9, 7: 0.1})
    assert found.mean == pytest.approx(20)
    assert found.half == pytest.approx(24.8414, abs=1e-3)
    assert found[2:] == (3, 3, 0, 0.25, 0)


def test_pair_up_counts_equal_pairs_as_neither():
    found = pair({0: 0.4, 1: 0.6, 2: 0.5})
    assert (found.pairs, found.wins, found.losses, found.p) == (3, 1, 1, 1.0)
    less = pair({0: 0.4, 1: 0.6, 2: 0.7}, measure=MEASURES[KEY]._replace(better=-1))
    assert (less.wins, less.losses) == (0, 2)


def test_pair_up_without_a_common_seed_is_unknown():
    for ours in ({5: 0.4}, {0: float("nan")}):
        assert pair(ours)[2:5] == (0, 0, 0)
        assert paired.difference_cell(pair(ours), 1).text == "no pair"
    assert paired.difference_cell(pair({0: 0.5}), 1).text == "+10.0 (1 pair)"


def test_pair_up_counts_pairs_with_a_run_that_diverged():
    ours, others = seeds_of({0: 0.5, 1: 0.6, 2: 0.8}), seeds_of(BASE)
    ours[0]["diverged"], others[0]["diverged"], others[1]["diverged"] = 1.0, 1.0, 2.0
    found = paired.pair_up(ours, others, KEY, MEASURES[KEY])
    assert found.diverged == 2
    assert paired.difference_cell(found, 1).text == "+13.3 ± 14.3 †"


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (1, 4), (3, 3), (2, 9)])
def test_sign_test_is_that_of_scipy(wins, losses):
    p = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert paired.sign_test(wins, losses) == pytest.approx(p)


def test_difference_cell_is_bold_beyond_its_interval():
    cell = paired.difference_cell(pair({0: 0.5, 1: 0.61, 2: 0.69}), 1)
    assert cell.text == "+10.0 ± 2.5" and cell.bold
    cell = paired.difference_cell(pair({0: 0.2, 1: 0.3, 2: 0.7}), 1)
    assert cell.text == "-10.0 ± 43.0" and not cell.bold
    assert paired.difference_cell(pair(BASE), 1).text == "+0.0 ± 0.0"


@pytest.mark.parametrize(
    ("ours", "better", "gain"),
    [
        ({0: 0.5, 1: 0.61, 2: 0.69}, 1, 1),  # 10 ± 2.5 points
        ({0: 0.5, 1: 0.61, 2: 0.69}, -1, -1),
        ({0: 0.5, 1: 0.61, 2: 0.69}, 0, 1),
        ({0: 0.2, 1: 0.3, 2: 0.7}, 1, 0),  # -10 ± 43
        ({0: 0.5}, 1, 0),  # one pair
        ({5: 0.5}, 1, 0),  # none
    ],
)
def test_find_gain_says_what_can_be_told(ours, better, gain):
    measure = MEASURES[KEY]._replace(better=better)
    assert paired.find_gain(pair(ours, measure=measure), measure) == gain
