"""Histories of clients from what was observed, by hand."""

import numpy as np

from fedmoe_jax.attack.histories import (
    FEATURES,
    average_feedback,
    count_assignments,
    make_histories,
    sum_rounds,
)

# Two rounds of two clients among three; one layer, two experts. Client 2 is out of
# reach in the second round, client 1 never takes part.
CLIENT = np.array([[0, 2], [0, 2]])
HELD = np.array([[[[1, 0]], [[1, 1]]], [[[0, 1]], [[0, 0]]]], bool)
REPORT = np.array([[[[0.4, np.nan]], [[0.6, 0.8]]], [[[np.nan, 1.0]], [[np.nan] * 2]]])
SEEN = {"client": CLIENT, "held": HELD} | dict.fromkeys(FEATURES, REPORT)


def test_sum_rounds_leaves_out_what_is_unknown():
    total, count = sum_rounds(REPORT, CLIENT, 3)
    np.testing.assert_allclose(total[:, 0], [[0.4, 1.0], [0, 0], [0.6, 0.8]])
    assert count[:, 0].tolist() == [[1, 1], [0, 0], [1, 1]]


def test_count_assignments_by_hand():
    found = count_assignments(SEEN, 3)
    assert found.tolist() == [[0.5, 0.5], [0, 0], [1, 1]]


def test_average_feedback_by_hand_and_the_usual_where_it_is_unknown():
    found = average_feedback(SEEN, 3).reshape(3, len(FEATURES), 2)
    np.testing.assert_allclose(found[0], [[0.4, 1.0]] * len(FEATURES))
    np.testing.assert_allclose(found[1], [[0.5, 0.9]] * len(FEATURES))


def test_make_histories_of_a_listener_and_of_the_server():
    link, server = (make_histories(SEEN, 3, feedback) for feedback in (False, True))
    np.testing.assert_array_equal(link, count_assignments(SEEN, 3))
    np.testing.assert_array_equal(server[:, :2], link)
    assert server.shape == (3, 2 + 2 * len(FEATURES)) and np.isfinite(server).all()


def test_make_histories_of_the_server_has_what_it_assigned_and_what_is_there():
    """Where clients ask for other sets, and where they do not probe."""
    hidden = SEEN | {"assigned": ~HELD}
    hidden.pop("probe")
    link, server = (make_histories(hidden, 3, feedback) for feedback in (False, True))
    np.testing.assert_array_equal(link, count_assignments(SEEN, 3))
    np.testing.assert_array_equal(
        server[:, :2], count_assignments(hidden, 3, "assigned")
    )
    assert server.shape == (3, 2 + 2 * (len(FEATURES) - 1))
    probe = np.where(np.isnan(REPORT), np.nan, REPORT + 1)
    leaking = make_histories(SEEN | {"probe": probe}, 3, True)
    assert not np.array_equal(leaking, make_histories(SEEN, 3, True))
