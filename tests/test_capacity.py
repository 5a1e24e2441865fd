"""Capacity: the server's belief about the devices, and the truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import COSTS, make_federation
from factories import make_devices as make_rows
from factories import make_hyper as change_hyper

from fedmoe_jax.capacity import (
    Workload,
    count_capacity,
    fill_up,
    init_belief,
    profile_links,
    report_devices,
    update_belief,
    update_history,
)
from fedmoe_jax.types import make_keys
from fedmoe_jax.world.costs import TRAINING_COPIES, Costs
from fedmoe_jax.world.outcome import DROPOUT, DROPPED, MEMORY, MERGED, Outcome
from fedmoe_jax.world.step import start_view

pytestmark = pytest.mark.slow

N, K = 40, 6
WORKLOAD = Workload(COSTS, jnp.full(N, 5.0), 100.0, 0.5, K, 0)
KEY = jax.random.key(3)


def make_devices(memory, **changes):
    return make_rows(N, memory=memory, latency=0.1, **changes)


def make_hyper(buffer=0.0, **profile):
    return change_hyper(devices={"buffer": buffer}, profile=profile)


def keys_of(round):
    return make_keys(KEY, round)


def memory_of(experts):
    """Bytes that just hold so many experts."""
    return 4.0 * (500 + 1000 * np.asarray(experts, np.float32)) + 1


def believe(kind, devices, hyper, rounds=1, belief=None):
    belief = belief or init_belief(N, K, kind)
    for round in range(rounds):
        belief = update_belief(
            belief, devices, hyper, WORKLOAD, kind, jnp.int32(round), keys_of(round)
        )
    return belief


# ---- oracle


def test_update_belief_of_the_oracle_is_the_truth_less_a_traced_buffer():
    devices = make_devices(memory_of(np.arange(N) % 5 + 1))
    see = lambda buffer: believe("oracle", devices, make_hyper(buffer)).capacity
    got = jax.jit(jax.vmap(see))(jnp.array([0.0, 0.5, 0.9]))
    np.testing.assert_array_equal(got[0], np.arange(N) % 5 + 1)
    for row, buffer in zip(got, (0.0, 0.5, 0.9), strict=True):
        expected = count_capacity(devices, jnp.float32(buffer), WORKLOAD)
        np.testing.assert_array_equal(row, np.maximum(expected, 1))
    assert np.all(np.diff(got, axis=0) <= 0) and got[0].sum() > got[2].sum()


def test_update_belief_holds_between_profiles():
    hyper, belief = make_hyper(refresh=3), init_belief(N, K, "oracle")
    seen = []
    for round in range(7):
        devices = make_devices(memory_of(round % 5 + 1))
        belief = update_belief(
            belief, devices, hyper, WORKLOAD, "oracle", jnp.int32(round), keys_of(round)
        )
        seen.append(int(belief.capacity[0]))
    assert seen == [1, 1, 1, 4, 4, 4, 2]


def renew_speeds(kind, flops, belief):
    """Beliefs of two rounds in which devices of other speeds are profiled."""
    seen = []
    for round, each in enumerate(flops):
        devices = make_devices(memory_of(3), flops=each, rate=each / 2)
        now = jnp.int32(round), keys_of(round)
        hyper = make_hyper(refresh=2, deviation=0.3)
        belief = update_belief(belief, devices, hyper, WORKLOAD, kind, *now)
        seen.append(belief.speeds)
    return seen


@pytest.mark.parametrize("kind", ["oracle", "self_reported"])
def test_update_belief_renews_speeds_where_a_profile_is_due(kind):
    flops = (1e9, 2e9, 4e9)
    found = renew_speeds(kind, flops, init_belief(N, K, kind, timed=True))
    for each, expected in zip(found, (1e9, 1e9, 4e9), strict=True):
        error = np.asarray(each.flops) / expected - 1
        assert np.abs(error).max() <= (0.3 if kind == "self_reported" else 1e-6)
        np.testing.assert_allclose(each.upload, each.flops / 2, rtol=1e-6)
        np.testing.assert_allclose(each.download, each.flops / 2, rtol=1e-6)
        assert len(set(error.tolist())) == (N if kind == "self_reported" else 1)
    assert renew_speeds(kind, flops, init_belief(N, K, kind)) == [None] * 3


def test_update_belief_has_the_speeds_that_an_estimating_server_has_seen():
    start = init_belief(N, K, "estimated", timed=True)
    seen = start.history.replace(pace=start.history.pace.at[0].set([0.5, 0.25, 0.125]))
    (found,) = renew_speeds("estimated", (1e9,), start.replace(history=seen))
    assert [float(leaf[0]) for leaf in (found.download, found.flops, found.upload)] == [
        *(2, 4, 8)
    ]
    assert jnp.isinf(found.flops[1:]).all()  # nothing has been seen of the others


def test_profile_links_by_hand():
    slowed = make_rows(2, upload=[1.0, 2.0], download=[3.0, 4.0], flops=[5.0, 6.0])
    own = make_rows(2, upload=7.0, download=8.0, flops=9.0)
    view = start_view(make_federation(devices=own)).replace(devices=slowed)
    assert profile_links(view, "round") is slowed
    found = profile_links(view, "device")
    assert found.upload.tolist() == [7, 7] and found.download.tolist() == [8, 8]
    assert found.flops.tolist() == [5, 6]


# ---- self-reported


def errors(devices, rounds, deviation, fixed):
    """Relative errors [rounds, N] of the reports on each resource."""
    rows = []
    for round in range(rounds):
        keys = keys_of(round)
        reported = report_devices(
            keys.of(1), keys.always(2), devices, deviation=deviation, fixed=fixed
        )
        names = ("memory", "flops", "upload", "download")
        ratios = [getattr(reported, n) / getattr(devices, n) - 1 for n in names]
        np.testing.assert_allclose(ratios, [ratios[0]] * 4, atol=1e-6)
        assert reported.latency is devices.latency
        rows.append(ratios[0])
    return np.array(rows)


def test_report_devices_deviates_within_its_bound():
    devices = make_devices(1e6)
    noisy = errors(devices, 50, 0.3, 0.0)
    assert np.abs(noisy).max() <= 0.3 + 1e-6 and np.abs(noisy).max() > 0.29
    np.testing.assert_allclose(noisy.mean(), 0, atol=0.02)  # 0.004 standard error
    np.testing.assert_allclose(noisy.std(), 0.3 / np.sqrt(3), atol=0.01)
    fixed = errors(devices, 5, 0.3, 1.0)
    np.testing.assert_array_equal(fixed, np.broadcast_to(fixed[0], fixed.shape))
    assert fixed[0].std() > 0.1
    both = errors(devices, 50, 0.3, 0.5)
    assert np.abs(both).max() <= 0.3 + 1e-6
    # the mean over rounds is half the bias, the spread about it half the noise
    np.testing.assert_allclose(both.mean(0), fixed[0] / 2, atol=0.05)
    np.testing.assert_allclose(both.std(0).mean(), 0.15 / np.sqrt(3), atol=0.01)


def test_report_devices_without_deviation_is_the_truth():
    devices = make_devices(memory_of(np.arange(N) % 5 + 1))
    reported = believe("self_reported", devices, make_hyper(0.25, deviation=0.0))
    oracle = believe("oracle", devices, make_hyper(0.25))
    np.testing.assert_array_equal(reported.capacity, oracle.capacity)


SMALL_EXPERTS = Costs(0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1e-9, *[0.0] * 5, 1, 1)  # a byte


def read_errors(fixed, rounds=4, clients=1000):
    """Errors [rounds, N] of reports, read from how many tiny experts are believed."""
    workload = Workload(SMALL_EXPERTS, jnp.ones(clients), 100.0, 0.5, 10**6, 0)
    devices = make_rows(clients, memory=TRAINING_COPIES * 1e5)
    hyper = make_hyper(refresh=1, deviation=0.3, fixed=fixed)
    belief, rows = init_belief(clients, 10**6, "self_reported"), []
    for round in range(rounds):
        now = jnp.int32(round), keys_of(round)
        belief = update_belief(belief, devices, hyper, workload, "self_reported", *now)
        rows.append(np.array(belief.capacity) / 1e5 - 1)
    return np.array(rows)


@pytest.mark.parametrize("fixed", [0.0, 1.0])
def test_update_belief_of_reports_errs_up_to_the_deviation(fixed):
    errors = read_errors(fixed)
    np.testing.assert_allclose(errors.min(), -0.3, atol=0.002)
    np.testing.assert_allclose(errors.max(), 0.3, atol=0.002)
    np.testing.assert_allclose(errors.std(), 0.3 / np.sqrt(3), atol=0.01)


def test_update_belief_of_reports_keeps_a_bias_and_no_noise():
    bias, noise = read_errors(1.0), read_errors(0.0)
    np.testing.assert_array_equal(bias, np.broadcast_to(bias[0], bias.shape))
    # 0.03 is a standard error
    correlation = np.corrcoef(noise)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(correlation, np.zeros(6), atol=0.12)


# ---- estimated


def live(devices_of, hyper, rounds, belief=None):
    """Rounds in which everyone trains what it is believed to hold: beliefs [R, N]."""
    belief, capacity = belief or init_belief(N, K, "estimated"), []
    clients = jnp.arange(N)

    @jax.jit
    def one_round(belief, round, devices):
        belief = update_belief(
            belief, devices, hyper, WORKLOAD, "estimated", round, keys_of(round)
        )
        held = belief.capacity.astype(jnp.float32)
        parts = 500 + 1000 * held
        work = jnp.stack([parts, 5 * (10 + 20 * held), parts], axis=-1)
        rates = jnp.stack([devices.download, devices.flops, devices.upload], axis=-1)
        phases = work / rates + devices.latency[:, None] * jnp.array([[1, 0, 1]])
        late = phases.sum(1) > 100
        code = jnp.where(4 * parts > devices.memory, MEMORY, MERGED)
        code = jnp.where((code == MERGED) & late, DROPPED, code)
        spent = jnp.where((code == MEMORY)[:, None], jnp.array([[1.0, 0, 0]]), 1.0)
        history = update_history(
            belief.history,
            clients,
            held,
            work,
            Outcome(code, phases, spent),
            devices.latency,
            rate=hyper.profile.rate,
            caution=hyper.profile.caution,
            max_capacity=K,
        )
        return belief.replace(history=history)

    for round in range(rounds):
        belief = one_round(belief, jnp.int32(round), devices_of(round))
        capacity.append(np.array(belief.capacity))
    return belief, np.array(capacity)


TRUTH = np.arange(N) % 5 + 1


@pytest.mark.parametrize(
    "limit",
    [
        dict(memory=memory_of(TRUTH)),
        # 49.8 seconds of network both ways: rate / 2 x 49.8 = 500 + 1000 k bytes
        dict(memory=1e9, rate=(500 + 1000 * (TRUTH + 0.5)) / 24.9),
        # 50 seconds at 5 examples: flops x 10 = 10 + 20 k
        dict(memory=1e9, flops=(10 + 20 * (TRUTH + 0.5)) / 10),
    ],
)
def test_update_history_converges_to_the_truth_in_a_static_world(limit):
    devices = make_devices(**limit)
    exact = count_capacity(devices, jnp.float32(0), WORKLOAD)
    np.testing.assert_array_equal(exact, TRUTH)
    hyper = make_hyper(exploration=0.0)
    _, capacity = live(lambda round: devices, hyper, 40)
    np.testing.assert_array_equal(capacity[-1], TRUTH)
    # now and then one expert more is tried, and the belief comes back
    _, capacity = live(lambda round: devices, make_hyper(), 120)
    late = capacity[60:]
    assert np.mean(late == TRUTH) > 0.75
    assert np.all(np.median(late, axis=0) == TRUTH)


@pytest.mark.parametrize(
    ("buffer", "beliefs"), [(0.0, (2, 5, 2)), (0.25, (2, 4, 2)), (0.5, (1, 3, 1))]
)
def test_update_history_follows_a_step_in_memory_both_ways(buffer, beliefs):
    low, high = make_devices(memory_of(2)), make_devices(memory_of(5))
    step = lambda round: high if 30 <= round < 70 else low
    _, capacity = live(step, make_hyper(buffer, exploration=0.2), 130)
    for end, belief in zip((30, 70, 130), beliefs, strict=True):
        assert np.median(capacity[end - 6 : end]) == belief
    assert np.mean(capacity[78:82] <= 3) > 0.8  # failures teach quickly


def test_update_history_averages_times_at_first_and_then_forgets():
    history = init_belief(2, K, "estimated").history
    work = jnp.full((2, 3), 10.0)
    paces = []
    for seconds in (1.0, 3.0, 5.0, 9.0):
        outcome = Outcome(
            jnp.array([MERGED, DROPOUT]), jnp.full((2, 3), seconds), jnp.ones((2, 3))
        )
        history = update_history(
            history,
            jnp.arange(2),
            jnp.ones(2),
            work,
            outcome,
            jnp.full(2, 0.5),
            rate=jnp.float32(0.3),
            caution=jnp.float32(2.0),
            max_capacity=K,
        )
        paces.append(np.array(history.pace[0]))
    # seconds less a latency of 0.5 both ways; training has none
    np.testing.assert_allclose(paces[0], [0.05, 0.1, 0.05], rtol=1e-6)
    np.testing.assert_allclose(paces[1], [0.15, 0.2, 0.15], rtol=1e-6)
    np.testing.assert_allclose(paces[2], [0.25, 0.3, 0.25], rtol=1e-6)
    np.testing.assert_allclose(paces[3][1], 0.7 * 0.3 + 0.3 * 0.9, rtol=1e-6)
    # who dropped out told no times, and nothing about its memory
    assert not np.any(history.pace[1]) and history.seen.tolist() == [[4] * 3, [0] * 3]
    assert history.room.tolist() == [K, K]


def test_update_history_of_the_room_by_hand():
    history = init_belief(2, 4, "estimated").history
    for code, held, expected in (
        (MEMORY, 4, 4 - 0.3 * 2),  # towards 4 - 2
        (MERGED, 3, 3.4),  # no news
        (MEMORY, 3, 3.4 - 0.3 * 2.4),  # towards 3 - 2
        (DROPOUT, 4, 2.68),  # says nothing
        (MERGED, 4, 4),
        (MEMORY, 8, 4),  # a failure never tells of more room
        (MEMORY, 1, 4 - 0.3 * 5),
        (MEMORY, 1, 2.5 - 0.3 * 3.5),
        (MEMORY, 1, 1),  # never less
    ):
        spent = jnp.array([[1.0, 0, 0]]) if code == MEMORY else jnp.ones((1, 3))
        outcome = Outcome(jnp.array([code]), jnp.ones((1, 3)), spent)
        history = update_history(
            history,
            jnp.array([1]),
            jnp.array([float(held)]),
            jnp.ones((1, 3)),
            outcome,
            jnp.zeros(1),
            rate=jnp.float32(0.3),
            caution=jnp.float32(2.0),
            max_capacity=4,
        )
        np.testing.assert_allclose(history.room, [4.0, expected], rtol=1e-6)


def test_update_history_averages_a_phase_over_the_rounds_that_reached_it():
    history = init_belief(1, K, "estimated").history
    work, phases = jnp.full((1, 3), 10.0), jnp.full((1, 3), 20.0)
    for code in (MEMORY, MEMORY, MERGED):
        spent = jnp.array([[1.0, 0, 0]]) if code == MEMORY else jnp.ones((1, 3))
        history = update_history(
            history,
            jnp.array([0]),
            jnp.array([2.0]),
            work,
            Outcome(jnp.array([code]), phases, spent),
            jnp.zeros(1),
            rate=jnp.float32(0.3),
            caution=jnp.float32(2.0),
            max_capacity=K,
        )
    np.testing.assert_allclose(history.pace, [[2.0, 2.0, 2.0]], rtol=1e-6)
    assert history.seen.tolist() == [[3, 1, 1]]


def test_update_history_finds_a_second_limit_behind_the_first():
    # Memory for 3 experts, and time to compute 2.
    devices = make_devices(memory_of(3), flops=(10 + 20 * 2.5) / 10)
    _, capacity = live(lambda round: devices, make_hyper(exploration=0.0), 8)
    assert np.all(capacity[-1] == 2)
    assert np.all(capacity[:-1] >= 2)


def test_update_history_learns_nothing_from_what_never_began():
    history = init_belief(1, 4, "estimated").history
    outcome = Outcome(
        jnp.array([DROPPED]), jnp.full((1, 3), 8.0), jnp.array([[0.5, 0, 0]])
    )
    history = update_history(
        history.replace(room=jnp.array([2.0])),
        jnp.array([0]),
        jnp.array([3.0]),
        jnp.full((1, 3), 4.0),
        outcome,
        jnp.zeros(1),
        rate=jnp.float32(0.3),
        caution=jnp.float32(2.0),
        max_capacity=4,
    )
    assert history.pace.tolist() == [[2, 0, 0]] and history.room.tolist() == [2]


def test_update_history_forgets_a_step_in_the_pace_of_training_geometrically():
    rounds, step = 14, 6
    # Half of 100 seconds for 1 example: 1 second per FLOP allows 5 experts of 10 FLOPs
    # each, and 2 seconds allow 2.
    costs = Costs(*(0, 0, 0, 1, 0, 0, 10), *[0] * 5, 1, 1)
    workload = Workload(costs, jnp.ones(1), 100.0, 0.5, 6, 0)
    hyper = make_hyper(refresh=1, exploration=0.0)
    belief, paces, capacity = init_belief(1, 6, "estimated"), [], []
    for round in range(rounds):
        seconds = 10.0 if round < step else 20.0
        outcome = Outcome(
            jnp.array([MERGED]), jnp.array([[1.0, seconds, 1.0]]), jnp.ones((1, 3))
        )
        history = update_history(
            belief.history,
            jnp.array([0]),
            jnp.ones(1),
            jnp.full((1, 3), 10.0),
            outcome,
            jnp.zeros(1),
            rate=jnp.float32(0.3),
            caution=jnp.float32(2.0),
            max_capacity=6,
        )
        belief = belief.replace(history=history)
        # A hair below 1 and 2 seconds, so that rounding does not decide.
        now = history.replace(pace=0.999 * history.pace)
        now = belief.replace(history=now)
        now = update_belief(
            now, make_rows(1), hyper, workload, "estimated", round, keys_of(round)
        )
        paces.append(np.array(history.pace[0]))
        capacity.append(int(now.capacity[0]))
    old = 0.7 ** np.maximum(np.arange(rounds) - step + 1, 0)  # weight of the old pace
    expected = np.stack([np.full(rounds, 0.1), 2 - old, np.full(rounds, 0.1)], axis=-1)
    np.testing.assert_allclose(paces, expected, rtol=1e-5)
    # 5 / (2 - 0.7) = 3.8, 5 / (2 - 0.49) = 3.3, 5 / (2 - 0.343) = 3.02, ...
    assert capacity == [5] * 6 + [3] * 3 + [2] * 5


def test_fill_up_counts_what_is_full_but_for_a_part_of_a_unit():
    trained = jnp.array([2.97, 2.9, 3.0, 3.01])
    found = fill_up(trained, jnp.full(4, 3.0), 1 / 32)
    np.testing.assert_allclose(found, [3.0, 2.9, 3.0, 3.01])
