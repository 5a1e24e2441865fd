"""The picture of attacks: a mark for each row, in panels of what is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedmoe_jax.attack.plots import (
    ACCURACY,
    Point,
    average_rows,
    draw_attacks,
    draw_epsilons,
    name_defence,
    pick_colours,
)
from fedmoe_jax.report.plots import COLOURS

NAN = float("nan")
MEAN = {"mix_majority_mean": 0.2}


def make_run(label, strategy="greedy", **private):
    config = {"strategy": strategy, "privacy": private}
    return SimpleNamespace(label=label, config=config)


def test_name_defence_of_none_one_and_several():
    assert name_defence(make_run("a")) == "none"
    assert name_defence(make_run("a", flip=1.0, clip=0.0)) == "flip"
    assert name_defence(make_run("a", flip=1.0, clip=2.0)) == "several"
    assert name_defence(SimpleNamespace(config={})) == "none"  # of an older version


def test_average_rows_takes_the_means_of_what_is_known():
    runs = [make_run("a"), make_run("b", "random", clip=1.0), make_run("a")]
    numbers = [{"x": 1.0, "y": NAN}, {"x": NAN}, {"x": 2.0, "z": 4.0}]
    assert average_rows(runs, numbers) == [
        ("greedy", "none", {"x": 1.5, "z": 4.0}),
        ("random", "clip", {}),
    ]


def test_draw_attacks_has_a_panel_for_each_attack_and_marks_its_chance():
    rows = [
        Point("greedy", "none", {ACCURACY: 0.5, "pairs_auc": 0.75} | MEAN),
        Point("greedy", "flip", {ACCURACY: 0.25, "mix_majority_link_ridge": 0.4}),
        Point("random", "none", {"pairs_auc": 0.5}),
    ]
    labels, pairs = draw_attacks(rows).axes
    (mark,) = [line for line in pairs.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(mark.get_xydata(), [[50, 0.75]])
    (mark,) = [line for line in labels.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(mark.get_xydata(), [[25, 40]])
    level = lambda axes: axes.lines[-1].get_ydata()[0]
    assert level(labels) == pytest.approx(20) and level(pairs) == 0.5
    texts = [text.get_text() for text in pairs.get_legend().get_texts()]
    assert texts == ["greedy", "random", "none", "flip"]
    assert draw_attacks([Point("greedy", "none", {ACCURACY: 0.5})]) is None
    numbers = {ACCURACY: 0.5, "groups_link_ridge": 0.9, "groups_mean": 0.25}
    (groups,) = draw_attacks([Point("greedy", "none", numbers)]).axes
    assert level(groups) == pytest.approx(25)


def test_draw_epsilons_has_a_mark_for_each_guarantee_and_a_line_for_none():
    private = {"epsilon": 4.0, ACCURACY: 0.25, "mean_load_cv": 0.3}
    rows = [
        Point("greedy", "none", {ACCURACY: 0.5, "mean_load_cv": 0.7}),
        Point("greedy", "selection", private),
        Point("greedy", "none", {ACCURACY: 0.9}),  # another row without a defence
        Point("load_balanced", "selection", {ACCURACY: 0.4}),  # has none
    ]
    accuracy, load = draw_epsilons(rows).axes
    level, mark = accuracy.lines
    assert level.get_ydata()[0] == 50 and mark.get_marker() == "^"
    np.testing.assert_allclose(mark.get_xydata(), [[4, 25]])
    np.testing.assert_allclose(load.lines[1].get_xydata(), [[4, 0.3]])
    assert accuracy.get_xscale() == "log"
    texts = [text.get_text() for text in load.get_legend().get_texts()]
    assert texts == ["greedy", "selection"]
    accuracy.set_xlim(2, 200)
    ticks = [text.get_text() for text in accuracy.get_xticklabels()]
    assert "10¹" in ticks and "10²" in ticks
    assert draw_epsilons([rows[0], rows[3]]) is None


def test_pick_colours_has_one_for_each_strategy_whatever_is_drawn():
    names = "random", "greedy", "greedy", "fedavg"
    points = [Point(name, "none", {}) for name in names]
    assert pick_colours(points) == dict(
        zip(("random", "greedy", "fedavg"), COLOURS, strict=False)
    )
