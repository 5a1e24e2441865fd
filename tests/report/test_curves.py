"""Curves and the names at their ends: places, means and bands by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_jax.report.curves import (
    Series,
    Tracks,
    common_mean,
    cost_curves,
    curves,
    find_span,
    spread,
)

BROKEN_LINES = [
    (np.array([1.0, 3.0]), np.array([0.0, 20.0])),
    (np.array([2.0, 4.0]), np.array([30.0, 50.0])),
]
APART = [BROKEN_LINES[0], (np.array([5.0, 6.0]), np.array([1.0, 2.0]))]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_spread_keeps_order_and_gap(places):
    places = np.array(places)
    moved = spread(places, 0.05, 0.0, 1.0)
    assert np.all(np.diff(np.sort(moved)) >= 0.05 - 1e-9)
    assert np.all(np.diff(moved[np.argsort(places, kind="stable")]) > 0)
    assert moved.min() >= 0 and moved.max() <= 1 + 1e-9


def test_spread_by_hand():
    moved = spread(np.array([0.52, 0.9, 0.5]), 0.1, 0.0, 1.0)
    np.testing.assert_allclose(moved, [0.56, 0.9, 0.46])


def test_spread_passes_the_high_end_where_labels_do_not_fit():
    moved = spread(np.array([0.9, 1.0, 0.95]), 0.6, 0.0, 1.0)
    np.testing.assert_allclose(moved, [0.0, 1.2, 0.6])


def test_common_mean_by_hand():
    costs, mean = common_mean(BROKEN_LINES)
    # At 2 the lines are at 10 and 30, at 3 they are at 20 and 40.
    assert costs.tolist() == [2, 3] and mean.tolist() == [20, 30]
    assert [len(part) for part in common_mean(APART)] == [0, 0]


def lines_of(axes):
    """Points of every line in the axes but the leaders of the names."""
    inside = [line for line in axes.lines if line.get_transform() == axes.transData]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in inside]


def places_of(axes):
    """The place that the name at each curve's end points to, by name."""
    names = [text.get_text() for text in axes.texts]
    leaders = [line for line in axes.lines if line.get_transform() != axes.transData]
    starts = [float(line.get_ydata()[0]) for line in leaders]
    return dict(zip(names[-len(starts) :], starts, strict=True))


def test_curves_by_hand():
    values = np.array([[10.0, np.nan, 40.0], [30.0, 20.0, 20.0]])
    two = Series(0, "two", np.array([2, 4, 6]), values)
    one = Series(1, "one", np.array([3, 5]), np.array([[1.0, 2.0]]))
    (axes,) = curves([two, one], "y", None).axes
    lines = lines_of(axes)
    assert lines[0] == ([2, 4, 6], [20, 20, 30])
    assert lines[1] == ([3, 5], [1, 2])
    (band,) = axes.collections  # of one seed there is none
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert corners == {(2, 10), (2, 30), (4, 20), (6, 20), (6, 40)}
    assert axes.get_xlim() == (0, 6)
    assert places_of(axes) == {"two": 30, "one": 2}


@pytest.mark.parametrize(
    ("places", "expected"),
    [([0.7, 0.95, 1.0], (0.7, 1.0)), ([0.5, 1.0], (0, 1.0)), ([3.0], (0, 3.0))],
)
def test_find_span_begins_at_0_or_near_the_last_place(places, expected):
    assert find_span([np.array(places), np.array(places[-1:])]) == expected


def test_curves_of_one_round_and_their_reference():
    alone = Series(0, "alone", np.array([1]), np.array([[50.0]]))
    (axes,) = curves([alone], "y", (10.0, "chance")).axes
    assert list(axes.lines[0].get_ydata()) == [10, 10]
    assert lines_of(axes)[0] == ([1], [50])
    assert [text.get_text() for text in axes.texts] == ["chance", "alone"]
    assert axes.get_xlim() == (0, 1) and axes.get_ylim()[0] == 0
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[1]]  # a line would be none


@pytest.mark.parametrize(
    ("seeds", "end"),
    [(BROKEN_LINES, (3, 30)), (APART, (6, 2)), (APART[::-1], (6, 2))],
)
def test_cost_curves_are_named_at_the_mean_or_the_later_seed(seeds, end):
    (axes,) = cost_curves([Tracks(0, "a", seeds)], "x", "y", None).axes
    lines = lines_of(axes)
    assert lines[:2] == [(list(x), list(y)) for x, y in seeds]
    assert lines[3] == ([end[0]], [end[1]])  # the dot
    assert places_of(axes) == {"a": end[1]}
    assert axes.get_xlim() == (0, max(costs[-1] for costs, _ in seeds))
