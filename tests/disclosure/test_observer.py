"""What the link shows of a round, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    make_feedback,
    make_program,
    make_replies,
    plan_run,
    start_run,
    use_linear_model,
)

from fedmoe_jax.disclosure.observer import (
    OBSERVED,
    REPORTED,
    mask_slots,
    see_feedback,
    see_held,
)
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.types import Assignment
from fedmoe_jax.world.outcome import BROKEN, MERGED, UNREACHABLE, Outcome

E = 4
# Three clients, two layers, two slots; the last client cannot be reached.
HELD = jnp.array([[[2, 0], [1, 3]], [[3, 1], [0, 0]], [[0, 1], [2, 3]]], jnp.int32)
SLOT = jnp.array([[[1, 1], [1, 1]], [[1, 0], [1, 0]], [[1, 1], [1, 1]]], bool)
WISH = Assignment(HELD, SLOT)
NOTHING = [[0, 0, 0, 0]] * 2


def reply(code=(MERGED, MERGED, UNREACHABLE), **changes):
    load = jnp.arange(12.0).reshape(3, 2, 2)
    feedback = make_feedback(load).replace(**changes.pop("feedback", {}))
    code = jnp.array(code, jnp.int32)
    spent = jnp.where((code == UNREACHABLE)[:, None], 0.0, jnp.ones((3, 3)))
    outcome = Outcome(code, jnp.ones((3, 3)), spent)
    return make_replies(feedback, code == MERGED, **changes).replace(outcome=outcome)


def see(assignment=WISH, replies=None, **strategy):
    program = make_program()
    program = program._replace(strategy=program.strategy._replace(**strategy))
    found = see_held(assignment, replies or reply(), program)
    assert found.shape == (3, 2, E) and found.dtype == bool
    return found.astype(int).tolist()


def test_see_held_of_clients_that_can_be_reached():
    first = [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert see() == [first, [[0, 0, 0, 1], [1, 0, 0, 0]], NOTHING]
    # What arrives, and is left out as it is broken, was seen on its way.
    assert see(replies=reply((MERGED, BROKEN, UNREACHABLE))) == see()


def test_see_held_leaves_out_what_stays_with_the_client():
    first = [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert see(local_experts=1) == [first, [[0, 0, 0, 0], [1, 0, 0, 0]], NOTHING]
    assert see(silent=True) == [NOTHING] * 3


def test_see_held_is_what_clients_send_back_where_they_choose():
    chosen = SLOT.at[:, :, 0].set(False).at[1, :, 0].set(True)
    first = [[1, 0, 0, 0], [0, 0, 0, 1]]
    found = see(replies=reply(chosen=chosen))
    assert found == [first, [[0, 0, 0, 1], [1, 0, 0, 0]], NOTHING]


def test_see_held_is_what_clients_ask_for_whatever_they_train():
    asked = np.random.default_rng(0).random((3, 2, E)) < 0.5
    found = see(WISH.replace(asked=jnp.asarray(asked)))
    assert found[:2] == asked[:2].astype(int).tolist() and found[2] == NOTHING


def test_mask_slots_by_hand():
    found = mask_slots(HELD, SLOT, E)
    assert found[1].astype(int).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]


def test_see_feedback_places_the_reports_that_arrive():
    found = see_feedback(WISH, reply((MERGED, BROKEN, UNREACHABLE)), E)
    assert set(found) == set(REPORTED)
    load = np.array(found["load"])
    expected = np.full((3, 2, E), np.nan)
    expected[0, 0, [2, 0]], expected[0, 1, [1, 3]] = [0, 1], [2, 3]
    np.testing.assert_array_equal(load, expected)


def test_see_feedback_has_probes_of_what_was_received_and_not_chosen():
    probe = jnp.arange(12.0).reshape(3, 2, 2) + 100
    chosen = SLOT.at[:, :, 1].set(False)
    found = see_feedback(WISH, reply(feedback={"probe": probe}, chosen=chosen), E)
    np.testing.assert_array_equal(found["load"][0, 0], [np.nan, np.nan, 0, np.nan])
    np.testing.assert_array_equal(found["probe"][0, 0], [101, np.nan, 100, np.nan])


@pytest.mark.slow
def test_a_round_shows_the_bytes_of_each_client_that_its_metrics_add_up():
    """Under a deadline that drops clients, with losses of all kinds."""
    plan = plan_run(
        **{
            "privacy.observe": True,
            "availability.share": 0.7,
            "availability.dropout": 0.3,
        }
    )
    program = use_linear_model(plan.program)
    run = start_run(plan, program)
    before = np.array(run.state.align.times_held)
    state, metrics = build_run_rounds(program)(run.state, run.federation, run.hyper)
    seen = jax.device_get(metrics[OBSERVED])
    for way in ("bytes_up", "bytes_down"):
        np.testing.assert_allclose(seen[way].sum(1), metrics[way], rtol=1e-6)
    assert len(np.unique(seen["bytes_down"])) > 2 and (seen["bytes_down"] == 0).any()
    times = np.array(state.align.times_held) - before
    shown = np.zeros_like(times)
    for clients, held in zip(seen["client"], seen["held"], strict=True):
        shown[clients] += held
    assert (shown <= times).all() and shown.sum() > 0
    np.testing.assert_array_equal(seen["held"].any((2, 3)), seen["bytes_down"] > 0)
