"""The world's processes reach what they are meant to change."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import E, K, N, all_finite, choose, make_linear_model, plan_run
from fedmoe_jax.rules import CALM

from fedmoe_jax.align.capacity import Needs, init_belief, update_belief, update_history
from fedmoe_jax.broadcast import broadcast
from fedmoe_jax.evaluate import build_evaluate
from fedmoe_jax.program import Program, init_state
from fedmoe_jax.round import build_round, gather_evidence
from fedmoe_jax.runtime.sharding import replicate, spread
from fedmoe_jax.types import Assignment, Devices, Federation, Hyper, Keys, Sizes
from fedmoe_jax.world.availability import Reach, init_reach, share_now
from fedmoe_jax.world.channel import init_cell, open_links
from fedmoe_jax.world.costs import TRAINING_COPIES, Costs, count_costs
from fedmoe_jax.world.outcome import MERGED, Outcome
from fedmoe_jax.world.step import observe, step_world

KEYS = Keys(jax.random.key(1), jax.random.key(2))
RATES = ("memory", "flops", "upload", "download")
AWAY = 20.0  # a latent so far out that its share is 0 or 1


def make_devices(count, **rates):
    """Devices that can do anything, but for what is given."""
    fields = dict.fromkeys(RATES, 1e12) | dict(latency=0.0, power=1.0, radio=1.0)
    row = lambda value: jnp.broadcast_to(jnp.asarray(value, jnp.float32), (count,))
    fields = {name: row(value) for name, value in (fields | rates).items()}
    return Devices(**fields, tier=jnp.zeros(count, jnp.int32))


def make_hyper(**world):
    """Hyperparameters of which only the world's numbers count."""
    fields = dict.fromkeys(Hyper.__dataclass_fields__, jnp.float32(0))
    numbers = jax.tree.map(jnp.float32, world)
    return Hyper(**fields | {"own": {}, "world": numbers})


# ---- what the devices have left


@pytest.mark.parametrize(
    ("process", "latent", "numbers", "factors"),
    [
        ("pressure", [True, False, True], {"left": 0.25}, {"memory": [0.25, 1, 0.25]}),
        # at its median other work takes half of the most
        ("background", [-AWAY, 0.0, AWAY], {"most": 0.8}, {"flops": [1, 0.6, 0.2]}),
        # exp(2 z - 2), of the links both ways
        (
            "bandwidth",
            [1.0, 0.0, 1.5],
            {"spread": 2.0},
            dict.fromkeys(("upload", "download"), np.exp([0, -2, 1])),
        ),
    ],
)
def test_a_process_changes_its_own_resource_by_hand(process, latent, numbers, factors):
    before = dict(memory=8.0, flops=4.0, upload=2.0, download=16.0)
    after = look(
        make_devices(3, **before),
        {process: jnp.array(latent)},
        make_hyper(**{process: numbers}),
    ).devices
    for name, value in before.items():
        expected = value * np.array(factors.get(name, [1.0, 1.0, 1.0]))
        np.testing.assert_allclose(getattr(after, name), expected, rtol=1e-6)


# ---- links

CELL = dict(radius=0.5, shadowing=0.0, bandwidth=1e6, csi=1.0, backoff=1.0)


def make_cell(count, hyper):
    """A cell of clients whose channels are known and as good as on average."""
    sizes = Sizes(count, *[1] * (len(Sizes._fields) - 1))
    fading = jnp.ones((count, 2))
    return init_cell(KEYS, hyper, sizes).replace(fading=fading, known=fading)


def test_each_direction_has_the_power_of_its_sender():
    hyper = make_hyper(channel=CELL | dict(min_snr=-100, power_up=0, power_down=10))
    cell, devices = make_cell(5, hyper), make_devices(5)
    (up, _), (down, _) = open_links(cell, devices, hyper)
    # Shannon's rate solved for the SNR: 10 dB more power is 10 times as much.
    snr = [np.exp2(8e-6 * np.float64(rate)) - 1 for rate in (up, down)]
    np.testing.assert_allclose(snr[1] / snr[0], np.full(5, 10.0), rtol=1e-3)
    # These rates, far below what the devices could do, are the ones that count.
    view = look(devices, {"wireless": cell}, hyper)
    np.testing.assert_array_equal(view.devices.upload, up)
    np.testing.assert_array_equal(view.devices.download, down)


@pytest.mark.parametrize("weak", ["up", "down"])
def test_only_the_direction_without_signal_fails(weak):
    powers = {"power_up": 100.0, "power_down": 100.0} | {f"power_{weak}": -200.0}
    hyper = make_hyper(channel=CELL | dict(min_snr=-6) | powers)
    # Where there is signal enough, the device itself is the limit.
    devices = make_devices(4, upload=[1, 2, 3, 4], download=[5, 6, 7, 8])
    view = look(devices, {"wireless": make_cell(4, hyper)}, hyper)
    assert view.events.no_upload.tolist() == [weak == "up"] * 4
    assert view.events.no_download.tolist() == [weak == "down"] * 4
    np.testing.assert_array_equal(view.devices.upload, [1, 2, 3, 4])
    np.testing.assert_array_equal(view.devices.download, [5, 6, 7, 8])


def test_a_link_that_others_share_is_slow_in_the_cell_too():
    channel = CELL | dict(min_snr=-6, power_up=100, power_down=100)
    hyper = make_hyper(channel=channel, bandwidth={"spread": 2.0})
    state = {"wireless": make_cell(2, hyper), "bandwidth": jnp.array([1.0, 0.0])}
    view = look(make_devices(2, upload=3.0, download=5.0), state, hyper)
    factor = np.exp([0, -2])
    np.testing.assert_allclose(view.devices.upload, 3 * factor, rtol=1e-6)
    np.testing.assert_allclose(view.devices.download, 5 * factor, rtol=1e-6)


def look(devices, state, hyper):
    """The view of clients without data; the processes that have a state are on."""
    nothing = dict.fromkeys(Federation.__dataclass_fields__)
    federation = Federation(**nothing | {"devices": devices})
    return observe(state, federation, hyper, choose(*state))


# ---- who is there


def test_the_share_of_each_client_swings_through_the_day():
    hyper = make_hyper(availability=dict(share=0.5, swing=0.3, day=4.0))
    sizes = Sizes(2000, *[1] * (len(Sizes._fields) - 1))
    at = lambda round, keys=KEYS: np.array(
        share_now(jnp.int32(round), init_reach(keys, hyper, sizes).phase, hyper)
    )
    morning, evening = at(0), at(2)
    np.testing.assert_allclose(morning + evening, np.ones(2000), atol=1e-5)
    # all places of the globe: a sine of amplitude 0.3 at uniform phases
    np.testing.assert_allclose([morning.min(), morning.max()], [0.2, 0.8], atol=1e-3)
    np.testing.assert_allclose(morning.std(), 0.3 / np.sqrt(2), atol=0.01)
    tomorrow = KEYS._replace(round=jax.random.key(3))
    np.testing.assert_allclose(at(4, tomorrow), morning, atol=1e-5)


def test_clients_are_reached_as_often_as_their_hour_says():
    numbers = dict(share=0.5, swing=0.5, day=4.0, persistence=0.0)
    hyper, count = make_hyper(availability=numbers), 4000
    phase = jax.random.uniform(jax.random.key(4), (count,))
    state, chain = {"reach": Reach(phase, jnp.zeros(count, bool))}, choose("reach")
    reach = step_world(state, KEYS, jnp.int32(1), hyper, chain)["reach"].now
    share = np.array(share_now(jnp.int32(1), phase, hyper))
    for low in (0.0, 0.25, 0.5, 0.75):
        these = (low <= share) & (share < low + 0.25)
        # 600 clients or more; four standard errors of at most 0.02
        np.testing.assert_allclose(reach[these].mean(), share[these].mean(), atol=0.08)


@pytest.mark.parametrize("early", [0.0, 1.0])
def test_the_lost_are_lost_when_the_numbers_say(early):
    hyper = make_hyper(availability={"dropout": 1.0, "early": early})
    state, chain = {"dropout": jnp.full(20, jnp.inf)}, choose("dropout")
    state = step_world(state, KEYS, jnp.int32(0), hyper, chain)
    events = look(make_devices(20), state, hyper).events
    during = (0 < events.dropout) & (events.dropout < 1)
    assert during.all() if early == 0 else jnp.all(events.dropout == 0)


# ---- reports

SMALL_EXPERTS = Costs(*map(float, (0, 0, 0, 1, 0, 0, 1e-9)))


def read_errors(fixed, rounds=4, clients=1000):
    """Errors [rounds, N] of reports, read from how many tiny experts are believed."""
    needs = Needs(SMALL_EXPERTS, jnp.ones(clients), 100.0, 0.5, 10**6)
    devices = make_devices(clients, memory=TRAINING_COPIES * 1e5)
    hyper = make_hyper(profile=dict(refresh=1, deviation=0.3, fixed=fixed))
    belief, rows = init_belief(clients, 10**6, "self_reported"), []
    for round in range(rounds):
        keys = KEYS._replace(round=jax.random.key(10 + round))
        belief = update_belief(
            belief, devices, hyper, needs, "self_reported", jnp.int32(round), keys
        )
        rows.append(np.array(belief.capacity) / 1e5 - 1)
    return np.array(rows)


@pytest.mark.parametrize("fixed", [0.0, 1.0])
def test_clients_err_up_to_the_deviation(fixed):
    errors = read_errors(fixed)
    np.testing.assert_allclose(errors.min(), -0.3, atol=0.002)
    np.testing.assert_allclose(errors.max(), 0.3, atol=0.002)
    np.testing.assert_allclose(errors.std(), 0.3 / np.sqrt(3), atol=0.01)


def test_a_bias_stays_and_noise_does_not():
    bias, noise = read_errors(1.0), read_errors(0.0)
    np.testing.assert_array_equal(bias, np.broadcast_to(bias[0], bias.shape))
    # 0.03 is a standard error
    correlation = np.corrcoef(noise)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(correlation, np.zeros(6), atol=0.12)


# ---- estimates


def test_a_step_in_the_pace_of_training_is_forgotten_geometrically():
    rounds, step = 14, 6
    # Half of 100 seconds for 1 example: 1 second per FLOP allows 5 experts of 10 FLOPs
    # each, and 2 seconds allow 2.
    needs = Needs(Costs(0, 0, 0, 1, 0, 0, 10), jnp.ones(1), 100.0, 0.5, 6)
    hyper = make_hyper(profile=dict(refresh=1, exploration=0.0))
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
            now, make_devices(1), hyper, needs, "estimated", round, KEYS
        )
        paces.append(np.array(history.pace[0]))
        capacity.append(int(now.capacity[0]))
    old = 0.7 ** np.maximum(np.arange(rounds) - step + 1, 0)  # weight of the old pace
    expected = np.stack([np.full(rounds, 0.1), 2 - old, np.full(rounds, 0.1)], axis=-1)
    np.testing.assert_allclose(paces, expected, rtol=1e-5)
    # 5 / (2 - 0.7) = 3.8, 5 / (2 - 0.49) = 3.3, 5 / (2 - 0.343) = 3.02, ...
    assert capacity == [5] * 6 + [3] * 3 + [2] * 5


# ---- drift


def test_only_drifting_clients_of_the_cohort_see_other_images():
    parts = plan_run(**{"cohort_size": 3})
    source = jnp.array([0, 2, 1, *range(3, N)])
    federation = parts.federation.replace(drift_source=source)
    federation = jax.tree.map(jnp.asarray, federation)
    state = init_state(jax.random.key(0), parts.hyper, parts.program)
    cohort = jnp.array([0, 2, 3])

    def send(world):
        view = observe(world, federation, parts.hyper, choose(*world))
        capacity = jnp.full(N, K)
        evidence = gather_evidence(
            state, view.federation, cohort, capacity, parts.program.sizes
        )
        slots = (3, parts.program.sizes.max_held)
        assignment = Assignment(jnp.zeros(slots, jnp.int32), jnp.ones(slots, bool))
        return broadcast(state, view, evidence, assignment, parts.program)

    assert send({"images": jnp.float32(30)}).distortion.tolist() == [0, 30, 0]
    assert send({"labels": jnp.float32(1)}).distortion is None


def test_a_round_shows_the_examples_that_clients_own_by_now():
    nothing = dict.fromkeys(Federation.__dataclass_fields__)
    federation = Federation(
        **nothing
        | dict(
            devices=make_devices(3),
            index=jnp.array([[1, 2], [3, 0], [4, 5]]),
            size=jnp.array([2, 1, 2]),
            label_mix=jnp.eye(3),
            drift_source=jnp.array([1, 0, 2]),
        )
    )
    chain, hyper = choose("labels"), make_hyper()
    at = lambda moved: observe({"labels": moved}, federation, hyper, chain)
    before, after = (at(jnp.float32(moved)).federation for moved in (0, 1))
    assert before.index.tolist() == [[1, 2], [3, 0], [4, 5]]
    assert after.index.tolist() == [[3, 0], [1, 2], [4, 5]]
    assert after.size.tolist() == [1, 2, 2]
    np.testing.assert_array_equal(after.label_mix, np.eye(3)[[1, 0, 2]])


SHARDS = {"partition.kind": "shards", "partition.classes_per_client": 2}


def test_personal_accuracy_follows_the_labels_that_moved():
    start = begin(**SHARDS | {"drift.labels": 1.0})
    state, drift_source = start.state, np.asarray(start.federation.drift_source)
    assert sorted(drift_source) == list(range(N)) and not np.any(
        drift_source == np.arange(N)
    )
    # What client 0 owns in the end has the labels of its mix and no others.
    program, hyper, federation = start.program, start.hyper, start.federation
    all_moved = {"labels": jnp.float32(1)}
    moved = observe(all_moved, federation, hyper, program.processes).federation
    label = np.asarray(moved.y)[np.asarray(moved.index[0, : moved.size[0]])]
    assert set(label) == set(np.flatnonzero(moved.label_mix[0]))
    # Clients that hold the same experts differ by their label mixes only.
    align = state.align.replace(held=jnp.ones((N, E), bool))
    evaluate = build_evaluate(
        program.model, program.sizes, program.rules, program.processes, program.mesh
    )

    def judge(moved):
        world = {"labels": jnp.float32(moved)}
        moment = state.replace(align=align, world=world)
        return evaluate(moment, federation, hyper)["client_accuracy"]

    before, after = judge(0), judge(1)
    np.testing.assert_allclose(after, before[drift_source], atol=1e-6)
    assert np.abs(before[drift_source] - before).max() > 0.01


# ---- whole rounds


class Start(NamedTuple):
    """A run of the linear model before its first round."""

    program: Program
    state: object
    federation: Federation
    hyper: Hyper

    def build(self):
        """The compiled round."""
        return jax.jit(spread(build_round(self.program), self.program.mesh))


def begin(devices=None, **changes):
    """A run in which everyone is in every cohort, and the model costs what it is."""
    plan = plan_run(**{"cohort_size": N, "devices.buffer": 0.0} | changes)
    program, federation = plan.program, plan.federation
    model = make_linear_model(program.sizes.num_experts)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    costs = count_costs(shapes, 100.0, 150.0, 200.0)
    program = program._replace(model=model, costs=costs, device_costs=costs)
    if devices is not None:
        federation = federation.replace(devices=devices)
    hyper = jax.tree.map(jnp.asarray, plan.hyper)
    state = init_state(jax.random.key(0), hyper, program)
    parts = replicate((state, federation, hyper), program.mesh)
    return Start(program, *parts)


def test_what_is_estimated_is_what_the_world_leaves():
    # Latents that never change after the first draw.
    processes = {
        "background.most": 0.8,
        "background.persistence": 1.0,
        "bandwidth.spread": 0.5,
        "bandwidth.persistence": 1.0,
    }
    devices = make_devices(N, flops=2e3, upload=50.0, download=300.0, latency=0.5)
    start = begin(devices, **processes | {"profile.kind": "estimated"})
    one_round, state, federation = start.build(), start.state, start.federation
    load, level = (np.array(state.world[name]) for name in ("background", "bandwidth"))
    idle = 1 - 0.8 * np.array(jax.scipy.stats.norm.cdf(load))
    speed = np.exp(0.5 * level - 0.125)
    truth = np.stack([300 * speed, 2e3 * idle, 50 * speed], axis=-1)
    for _ in range(3):
        state, _ = one_round(state, federation, start.hyper)
    np.testing.assert_allclose(state.belief.history.pace, 1 / truth, rtol=1e-3)
    # From one round to the next, training takes four times as long.
    slow = federation.replace(devices=devices.replace(flops=devices.flops / 4))
    for _ in range(3):
        state, _ = one_round(state, replicate(slow, start.program.mesh), start.hyper)
    factor = np.array([1, 4 - 3 * 0.7**3, 1], np.float32)
    np.testing.assert_allclose(state.belief.history.pace, factor / truth, rtol=1e-3)


def test_the_oracle_knows_who_is_under_pressure():
    costs = begin().program.device_costs
    whole = lambda experts: (
        costs.shared_bytes + costs.gate_bytes + (experts * costs.expert_bytes)
    )
    # Room for three and a half experts, and under pressure for one and a half.
    pressure = {"pressure.share": 0.5, "pressure.left": whole(1.5) / whole(3.5)}
    start = begin(make_devices(N, memory=TRAINING_COPIES * whole(3.5)), **pressure)
    state, metrics = start.build()(start.state, start.federation, start.hyper)
    pressed = np.array(state.world["pressure"])
    assert 0 < pressed.sum() < N and K == 2 and E > 3
    np.testing.assert_array_equal(state.belief.capacity, np.where(pressed, 1, 2))
    # What devices have room for is not cut to what a client may hold.
    np.testing.assert_array_equal(state.participation.capacity, np.where(pressed, 1, 3))
    assert metrics["capacity_error"] == 0
    assert metrics["capacity_violations"] == 0


def test_a_round_of_drift_trains_on_what_has_drifted():
    drift = {
        "drift.labels": 1.0,
        "drift.images": "rotate",
        "drift.strength": 90.0,
        "drift.share": 0.5,
        "drift.start": 0,
        "drift.rounds": 1,
    }
    start = begin(**SHARDS | drift)
    state, _ = start.build()(start.state, start.federation, start.hyper)
    drifted = jax.device_get(state.params)
    federation = jax.device_get(start.federation)
    drift_source = federation.drift_source
    move = dict(
        index=federation.index[drift_source], size=federation.size[drift_source]
    )
    move["label_mix"] = federation.label_mix[drift_source]
    moved = federation.replace(**move)
    # The images of the clients that drift, turned before the run.
    drifts = np.flatnonzero(drift_source != np.arange(N))
    own = np.concatenate([moved.index[c, : moved.size[c]] for c in drifts])
    x = federation.x.copy()
    x[own] = np.rot90(x[own], axes=(1, 2))
    assert len(drifts) == N // 2 and not np.array_equal(x, federation.x)

    program = start.program
    program = program._replace(rules=program.rules._replace(world=CALM), processes=())
    calm = start._replace(program=program, state=start.state.replace(world={}))
    one_round = calm.build()

    def differ(federation):
        federation = replicate(federation, program.mesh)
        params = one_round(calm.state, federation, calm.hyper)[0].params
        assert all_finite(params)
        gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, drifted)
        return max(jax.tree.leaves(gaps))

    assert differ(moved.replace(x=x)) < 1e-4
    # Neither the labels nor the images alone explain it.
    assert differ(moved) > 1e-3 and differ(federation.replace(x=x)) > 1e-3
