"""The best mixture beside the best control, by hand."""

import pytest

from fedmoe_jax.measures import MEASURES
from fedmoe_jax.options import Measure
from fedmoe_jax.report.duels import GROUPS, duel_cell, find_best, hold_duel

KEY = "final_global_accuracy"
GLOBAL, LOSS = MEASURES[KEY], Measure("loss", better=-1)


def by_seed(*values, key=KEY):
    return {seed: {key: value} for seed, value in enumerate(values)}


NAN = float("nan")
SEEDS = {
    "greedy": by_seed(0.50, 0.54, 0.58),
    "random": by_seed(0.45, 0.45, NAN),
    "dense": by_seed(0.40, 0.42, 0.44),
    "alone": by_seed(NAN, NAN, NAN),
}


def test_the_best_has_the_best_mean_of_what_is_known():
    assert find_best(SEEDS, KEY, GLOBAL) == "greedy"
    assert find_best(SEEDS, KEY, Measure("loss", better=-1)) == "dense"
    assert find_best({"alone": SEEDS["alone"]}, KEY, GLOBAL) is None
    # Of equals the first.
    assert find_best({"a": by_seed(0.5), "b": by_seed(0.5)}, KEY, GLOBAL) == "a"


def test_the_best_of_each_kind_meet():
    duel = hold_duel(SEEDS, {"dense", "alone"}, KEY, GLOBAL)
    assert duel.gain == duel.paired.mean
    assert duel[:2] == ("greedy", "dense") and duel.lead == 1
    assert duel.paired.mean == pytest.approx(12)
    cell = duel_cell(duel, 1)
    # Differences of 10, 12 and 14: sd 2, and t(2) = 4.303.
    assert cell.text == "greedy 12.0 ± 5.0 over dense" and cell.bold


def test_less_is_better_of_a_loss():
    losses = {"a": by_seed(2.0, 2.1, key="l"), "b": by_seed(1.0, 1.2, key="l")}
    duel = hold_duel(losses, {"b"}, "l", LOSS)
    assert duel.lead == -1 and duel.paired.mean > 0
    assert duel_cell(duel, 2).text == "b 0.95 ± 0.64 over a"


def test_what_can_be_chance_is_above_0_where_the_mixture_is_better():
    losses = {"a": by_seed(1.0, 1.3, key="l"), "b": by_seed(1.2, 1.2, key="l")}
    duel = hold_duel(losses, {"b"}, "l", LOSS)
    assert duel.lead == 0 and duel.paired.mean < 0 < duel.gain
    assert duel_cell(duel, 2).text == "a +0.05 ± 1.91 against b"


def test_one_network_is_no_mixture():
    groups = lambda *found: {
        seed: {KEY: 0.9, GROUPS: value} for seed, value in enumerate(found)
    }
    seeds = SEEDS | {"merged": groups(1.0, 1.0, 1.0)}
    assert hold_duel(seeds, {"dense"}, KEY, GLOBAL).mixture == "greedy"
    seeds = SEEDS | {"found": groups(1.0, 2.0, 1.0)}
    assert hold_duel(seeds, {"dense"}, KEY, GLOBAL).mixture == "found"


def test_one_pair_decides_nothing():
    duel = hold_duel({"a": by_seed(0.9), "b": by_seed(0.1)}, {"b"}, KEY, GLOBAL)
    assert duel.lead == 0
    quoted = duel_cell(duel, 1, quote="`{}`".format)
    assert quoted.text == "`a` +80.0 (1 pair) against `b`" and not quoted.bold


def test_a_duel_needs_both_kinds_and_a_common_seed():
    assert hold_duel(SEEDS, set(), KEY, GLOBAL) is None
    assert hold_duel(SEEDS, {"alone"}, KEY, GLOBAL) is None
    apart = {"a": {0: {KEY: 0.5}}, "b": {1: {KEY: 0.4}}}
    assert hold_duel(apart, {"b"}, KEY, GLOBAL) is None
