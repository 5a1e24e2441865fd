"""Pictures of devices at work: rows, ends, bars and bands by hand."""

import numpy as np
import pytest

from fedmoe_jax.report.timeline import (
    MOST_ROWS,
    Band,
    belief_bubbles,
    choose_rows,
    last_second,
    outcome_bands,
    timeline,
)


def test_choose_rows_samples_evenly():
    seconds = np.array([3.0, 9.0, 5.0])
    assert choose_rows(seconds).tolist() == [1, 2, 0]
    many = np.arange(100.0)
    chosen = choose_rows(many)
    assert len(set(chosen.tolist())) == MOST_ROWS
    assert chosen[:20].tolist() == list(range(99, 79, -1))
    # The sample is even, from the slowest of the others to the fastest.
    assert chosen[20] == 79 and chosen[-1] == 0
    assert set(np.diff(chosen[20:])) <= {-4, -5}


@pytest.mark.parametrize(
    ("phases", "deadline", "last"),
    [
        ([[1, 1, 2], [2, 2, 2]], 10.0, 10.0),  # up to the deadline
        ([[1, 1, 2], [2, 2, 2]], 1e9, 6.0),  # there is hardly one
        ([[1, 1, 2], [0, 0, np.inf]], 1e9, 4.0),  # an endless plan
    ],
)
def test_last_second(phases, deadline, last):
    spent = np.array([[1, 1, 1], [0, 0, 0]])
    found = last_second(np.array(phases, float), spent, deadline)
    assert found == pytest.approx(1.03 * last)


def test_last_second_where_nothing_was_done():
    phases, spent = np.array([[1.0, 1.0, 2.0], [0.0, 0.0, np.inf]]), np.zeros((2, 3))
    assert last_second(phases, spent, 10.0) == pytest.approx(10.3)


def bars_of(lines):
    """Start and length of every bar of one phase."""
    return [(x[0], x[1] - x[0]) for x in (bar[:, 0] for bar in lines.get_segments())]


def test_timeline_has_bars_by_hand():
    phases = np.array([[2.0, 1.0, 5.0], [np.inf, 1.0, 1.0]])
    spent = np.array([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    words = ("dropped out", "")
    figure = timeline(["7", "3"], phases, spent, words, 9.0, 10.0, of="Client")
    (axes,) = figure.axes
    bars = [bars_of(phase) for phase in axes.collections]
    # By phase: two plans, then what took place of them. An endless plan is cut.
    assert bars[0] == [(0, 2), (0, 20)] and bars[1] == [(0, 2), (0, 0)]
    assert bars[2][0] == (2, 1) and bars[3][0] == (2, 0.5)
    assert bars[4][0] == (3, 5) and bars[5][0] == (3, 0)
    assert [text.get_text() for text in axes.texts] == list(words)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["download", "training", "upload", "did not happen", "deadline"]


def test_timeline_explains_only_what_it_shows():
    phases, spent = np.ones((1, 3)), np.ones((1, 3))
    (axes,) = timeline(["0"], phases, spent, [""], 9.0, 3.09, of="").axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["download", "training", "upload"] and not axes.lines


def test_outcome_bands_stack():
    bands = [
        Band("merged", "k", np.array([2.0, 1.0])),
        Band("lost", "r", np.array([1.0, 2.0])),
    ]
    (axes,) = outcome_bands(np.array([1, 2]), bands).axes
    first, second = (patch.get_data() for patch in axes.patches)
    assert first.values.tolist() == [2, 1] and second.values.tolist() == [3, 3]
    assert second.baseline.tolist() == [2, 1]
    assert second.edges.tolist() == [0.5, 1.5, 2.5]


def test_belief_bubbles_count_clients():
    capacity, belief = np.array([1, 1, 2, 2]), np.array([1, 1, 3, 1])
    (axes,) = belief_bubbles(capacity, belief).axes
    places = {text.get_position(): text.get_text() for text in axes.texts}
    assert places == {(1, 1): "2", (2, 3): "1", (2, 1): "1"}
