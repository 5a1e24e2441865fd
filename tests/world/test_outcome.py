"""The outcome of a client's round, and its cost by then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import make_devices
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_jax.world.costs import Costs, Traffic
from fedmoe_jax.world.outcome import (
    BROKEN,
    DROPOUT,
    DROPPED,
    MEMORY,
    MERGED,
    OUTAGE,
    STALE,
    UNREACHABLE,
    Conditions,
    judge,
    judge_client,
)
from fedmoe_jax.world.step import Events

PHASES = (10.0, 20.0, 5.0)  # seconds of download, training and upload
WELL = dict(reachable=True, dropout=np.inf, no_download=False, no_upload=False)


def decide(
    phases=PHASES, fits=True, finite=True, deadline=100.0, late="wait", **events
):
    events = Events(**jax.tree.map(jnp.asarray, WELL | events))
    return judge(
        jnp.asarray(phases, jnp.float32),
        events,
        jnp.asarray(fits),
        jnp.asarray(finite),
        deadline=deadline,
        late=late,
    )


@pytest.mark.parametrize(
    ("what", "code", "spent"),
    [
        (dict(), MERGED, [1, 1, 1]),
        (dict(reachable=False), UNREACHABLE, [0, 0, 0]),
        (dict(no_download=True), OUTAGE, [1, 0, 0]),
        (dict(fits=False), MEMORY, [1, 0, 0]),
        (dict(dropout=0.0), DROPOUT, [1, 0, 0]),
        (dict(dropout=0.25), DROPOUT, [1, 0.25, 0]),
        (dict(no_upload=True), OUTAGE, [1, 1, 1]),
        (dict(finite=False), BROKEN, [1, 1, 1]),
        # the first of several mishaps decides
        (dict(reachable=False, fits=False), UNREACHABLE, [0, 0, 0]),
        (dict(no_download=True, dropout=0.5), OUTAGE, [1, 0, 0]),
        (dict(fits=False, dropout=0.5), MEMORY, [1, 0, 0]),
        (dict(dropout=0.5, no_upload=True, finite=False), DROPOUT, [1, 0.5, 0]),
        # past the deadline: 35 seconds against 30
        (dict(deadline=30.0), MERGED, [1, 1, 1]),
        (dict(deadline=30.0, late="stale"), STALE, [1, 1, 1]),
        (dict(deadline=30.0, late="drop"), DROPPED, [1, 1, 0]),
        (dict(deadline=15.0, late="drop"), DROPPED, [1, 0.25, 0]),
        (dict(deadline=35.0, late="drop"), MERGED, [1, 1, 1]),
        (dict(deadline=35.0, late="stale"), MERGED, [1, 1, 1]),
        # what happens after the deadline does not matter any more
        (dict(deadline=15.0, late="drop", dropout=0.5), DROPPED, [1, 0.25, 0]),
        (dict(deadline=15.0, late="drop", dropout=0.1), DROPOUT, [1, 0.1, 0]),
        (dict(deadline=30.0, late="stale", no_upload=True), OUTAGE, [1, 1, 1]),
        (dict(deadline=30.0, late="drop", finite=False), DROPPED, [1, 1, 0]),
    ],
)
def test_judge_by_hand(what, code, spent):
    got = decide(**what)
    assert int(got.code) == code and got.code.dtype == jnp.int32
    np.testing.assert_allclose(got.spent, spent, rtol=1e-6)
    assert bool(got.arrived) == (code in (MERGED, STALE))


@pytest.mark.parametrize(
    ("what", "received"),
    [
        (dict(), True),
        (dict(reachable=False), False),
        (dict(no_download=True), False),
        (dict(no_download=True, late="drop", deadline=15.0), False),
        (dict(fits=False), True),  # all came, and had no room
        (dict(dropout=0.25), True),
        (dict(no_upload=True), True),
        (dict(finite=False), True),
        (dict(deadline=15.0, late="drop"), True),
        (dict(deadline=5.0, late="drop"), False),
        (dict(deadline=5.0, late="stale"), True),
    ],
)
def test_received_says_whether_the_experts_have_come(what, received):
    assert bool(decide(**what).received) == received


def test_judge_lets_phases_without_length_take_place_at_once():
    free = dict(phases=(0.0, 20.0, 0.0))
    np.testing.assert_array_equal(decide(**free).spent, [1, 1, 1])
    np.testing.assert_array_equal(decide(reachable=False, **free).spent, [0, 0, 0])
    assert decide(dropout=0.5, **free).spent[1] == 0.5


@settings(max_examples=100, deadline=None)
@given(
    phases=st.tuples(*[st.floats(0, 1e5, width=32)] * 3),
    deadline=st.floats(1.0, 1e5, width=32),
    late=st.sampled_from(["wait", "drop", "stale"]),
)
def test_judge_without_mishap_spends_everything_exactly(phases, deadline, late):
    got = decide(phases=phases, deadline=deadline, late=late)
    if int(got.code) != DROPPED:
        assert np.all(got.spent == 1.0)
    else:
        spent = (np.float32(phases) * got.spent).sum()
        np.testing.assert_allclose(spent, deadline, rtol=1e-3)
    assert np.all((got.spent >= 0) & (got.spent <= 1))
    assert np.all(np.diff(got.spent) <= 0) or min(phases) == 0


def test_judge_client_by_hand():
    # 50 bytes beside experts
    sizes = map(float, (30, 10, 10, 100, 0, 4, 20, 0, 0, 0, 22, 50))
    costs = Costs(*sizes, copies=1, num_layers=1)
    one = lambda value: jnp.float32(value)
    traffic = Traffic(*map(one, (2, 2, 0, 2, 0, 0, 0)))
    device = make_devices(1, flops=44, upload=25, download=50, latency=1)
    device = jax.tree.map(lambda leaf: leaf[0], device)
    events = Events(**jax.tree.map(jnp.asarray, WELL))

    def decide_client(memory, sent, overload=True):
        mine = device.replace(memory=one(memory))
        conditions = Conditions(jnp.int32(0), mine, events, traffic, one(10))
        return judge_client(
            conditions,
            one(sent),
            jnp.asarray(True),
            costs=costs,
            overload=overload,
            deadline=1e3,
            late="wait",
        )

    # down 50 + 2 x 100 bytes at 50, 10 x (4 + 40) FLOPs at 44, up 50 + 100 at 25
    np.testing.assert_allclose(decide_client(1e6, 1).phases, [6, 10, 7])
    np.testing.assert_allclose(decide_client(1e6, 0).phases, [6, 10, 3])
    assert int(decide_client(1000, 1).code) == MERGED  # 4 x 250 bytes just fit
    assert int(decide_client(999, 1).code) == MEMORY
    assert int(decide_client(999, 1, overload=False).code) == MERGED
