"""The times that a server expects: as devices feel them, on what is known alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import TINY, Run, assert_same, make_devices, plan_run, start

from fedmoe_jax import round as round_file
from fedmoe_jax.broadcast import gather_evidence, plan_traffic
from fedmoe_jax.capacity import Belief, Speeds, measure_capacity
from fedmoe_jax.round import build_round
from fedmoe_jax.runtime.sharding import spread
from fedmoe_jax.times import (
    add_times,
    count_experts,
    expect_devices,
    hold_nothing,
)
from fedmoe_jax.types import Assignment, Evidence, make_keys
from fedmoe_jax.world.costs import client_seconds
from fedmoe_jax.world.step import observe

pytestmark = pytest.mark.slow

WIRELESS = {"channel.kind": "wireless", "channel.csi": 0.5}
COHORT = jnp.arange(TINY["cohort_size"])


def prepare(strategy="channel_aware", **changes) -> Run:
    plan = plan_run(strategy=strategy, **changes)
    return start(plan, plan.program)


def expect(run: Run, world, **known) -> Evidence:
    """The evidence of the first round in some state of the world, and what is known."""
    state, federation, hyper, program = run.state, run.federation, run.hyper, run[0]
    view = observe(world, federation, hyper, program.processes)
    keys = make_keys(state.key, 0)
    place = view, hyper, program, jnp.int32(0), keys
    belief = measure_capacity(state.belief, *place).belief
    evidence = gather_evidence(state, view, COHORT, belief, hyper, program)
    evidence = evidence.replace(**known)
    return add_times(evidence, state, view, belief, hyper, program)


def change_cell(run, field):
    """The states of the world with another fading, true or known."""
    cell = run.state.world["wireless"]
    other = 0.7 - 0.5 * getattr(cell, field)
    return run.state.world | {"wireless": cell.replace(**{field: other})}


@pytest.mark.parametrize("links", ["round", "device"])
def test_add_times_depends_on_the_known_channel_alone(links):
    run = prepare(**WIRELESS, **{"profile.links": links})
    plain = expect(run, run.state.world)
    assert_same(expect(run, change_cell(run, "fading")), plain)
    other = expect(run, change_cell(run, "known"))
    apart = np.abs(np.asarray(other.times.expert - plain.times.expert))
    assert apart.min(axis=0).max() > 1e-4 and (apart > 0).all()
    # What the strategy decides from is what it is given: nothing else has moved.
    same = dict(times=None, capacity=plain.capacity)
    assert_same(other.replace(**same), plain.replace(**same))
    assert links == "round" or (other.capacity == plain.capacity).all()


@pytest.mark.parametrize(
    "fields", [{}, {"fitness.feedback": "probe", "gate.bias": 1.0}]
)
def test_add_times_is_what_the_clients_then_take(fields):
    """Stem, gate and head, and one, two or no experts: all within the device's time."""
    run = prepare(**{"devices.buffer": 0.0}, **fields)
    state, program, hyper = run.state, run.program, run.hyper
    evidence = expect(run, state.world)
    view = observe(state.world, run.federation, hyper, program.processes)
    slot = jnp.array([[1, 0], [1, 1], [1, 1], [0, 0]], bool)[:, None]
    held = hold_nothing(len(COHORT), program).held.at[..., 1].set(1)
    bias = jnp.zeros(slot.shape) if fields else None
    assignment, equipped = Assignment(held, slot, bias=bias), COHORT < 0
    traffic = plan_traffic(evidence, assignment, None, equipped, hyper, program)
    traffic = traffic.replace(sent=traffic.held)
    devices = jax.tree.map(lambda leaf: leaf[COHORT], view.devices)
    taken = client_seconds(devices, program.device_costs, traffic, evidence.load)
    times, deadline = evidence.times, program.static.devices.deadline
    expected = jnp.where(slot[:, 0], times.expert[:, :2], 0.0).sum(1) + 1 - times.room
    np.testing.assert_allclose(taken.sum(1) / deadline, expected, rtol=1e-4)


def test_expect_devices_takes_radio_links_from_the_round_and_others_from_the_belief():
    devices, speeds = make_devices(3, rate=8.0, flops=2.0), jnp.array([4.0, 5.0, 6.0])
    belief = Belief(jnp.ones(3, jnp.int32), {}, speeds=Speeds(*[speeds] * 3))
    run = prepare()
    view = observe({}, run.federation, run.hyper, ()).replace(devices=devices)
    cohort = jnp.array([2, 0])
    by_wire = expect_devices(view, cohort, belief, run.program)
    assert by_wire.upload.tolist() == by_wire.download.tolist() == [6, 4]
    by_radio = expect_devices(view, cohort, belief, prepare(**WIRELESS).program)
    assert by_radio.upload.tolist() == by_radio.download.tolist() == [8, 8]
    assert by_wire.flops.tolist() == by_radio.flops.tolist() == [6, 4]


def trace_round(run):
    args = run.state, run.federation, run.hyper
    one = spread(build_round(run.program), run.program.mesh)
    return str(jax.make_jaxpr(one)(*args))


def test_add_times_costs_a_strategy_without_them_nothing(monkeypatch):
    run, timed = prepare("load_balanced", **WIRELESS), prepare(**WIRELESS)
    assert expect(run, run.state.world).times is None
    assert run.state.belief.speeds is None and timed.state.belief.speeds is not None
    plain = trace_round(run)
    assert len(trace_round(timed)) > len(plain)
    monkeypatch.setattr(round_file, "add_times", lambda evidence, *_: evidence)
    assert trace_round(run) == plain


def test_pruned_experts_take_the_time_of_what_is_kept_of_each():
    """Of the expert that one unit makes most of, less is kept than of the others."""
    run = prepare(**{"data.name": "digits", "pruning.kind": "lamp"})
    tilt = lambda row: (
        jnp.ones(row.shape).at[:, 1].set(4.0 ** -jnp.arange(row.shape[2]))
    )
    state = run.state.replace(pruning=jax.tree.map(tilt, run.state.pruning))
    known = {"room": jnp.array([0.8, 1.0, 1.2, 2.0]), "capacity": jnp.full(4, 2)}
    world, tilted = run.state.world, run._replace(state=state)
    times = expect(tilted, world, **known).times.expert
    whole = expect(tilted, world, **known | {"room": jnp.full(4, 2.0)}).times.expert
    others = jnp.delete(times[:3], 1, axis=1)
    assert (times[:3, 1] < 0.9 * others.mean(axis=1)).all()
    assert (times[:3] < whole[:3] * (1 + 1e-5)).all()
    np.testing.assert_allclose(times[3], whole[3], rtol=1e-5)


def test_count_experts_of_pruned_ones_counts_what_is_kept():
    run = prepare(**{"data.name": "digits", "pruning.kind": "magnitude"})
    evidence, experts = expect(run, run.state.world), run.program.sizes.num_experts
    share = np.broadcast_to([[0.25], [0.5], [0.75], [1.0]], (4, experts)).copy()
    share[0, 1] = 0.5
    up, down, flops = count_experts(evidence, jnp.asarray(share), run.program)
    whole = count_experts(evidence, jnp.ones((4, experts)), run.program)
    saving = run.program.savings.of_expert  # all but sums and activations
    assert 0.8 < saving < 1
    left = 1 - saving * (1 - share)
    np.testing.assert_allclose(flops, whole[2] * left, rtol=1e-5)
    costs = run.program.device_costs
    lost = costs.copies * costs.expert_bytes * (1 - share)
    for found, known in ((up, whole[0]), (down, whole[1])):
        np.testing.assert_allclose(known - found, lost + 0 * known, rtol=1e-4)
