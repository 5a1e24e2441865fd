"""The chain of processes: its order, its state, and a process of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    STORM,
    C,
    E,
    K,
    N,
    assert_same,
    choose,
    make_linear_model,
    plan_run,
)

from configs import default
from fedmoe_jax.base import Process
from fedmoe_jax.evaluate import build_evaluate
from fedmoe_jax.options import HOST, STATIC, TRACED, Option, Range
from fedmoe_jax.program import init_state, list_processes
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.runtime.sharding import replicate
from fedmoe_jax.types import Keys
from fedmoe_jax.world import PROCESSES
from fedmoe_jax.world.costs import count_costs
from fedmoe_jax.world.outcome import Outcome
from fedmoe_jax.world.step import close_round, init_world, observe, start_view

GROUPS = "pressure background bandwidth availability channel drift late".split()
STORMY = plan_run(**STORM)


def make_world(chain):
    """The state of these processes before the first round of the storm."""
    hyper = jax.tree.map(jnp.asarray, STORMY.hyper)
    return init_world(jax.random.key(0), hyper, STORMY.program.sizes, chain), hyper


def federation():
    return jax.tree.map(jnp.asarray, STORMY.federation)


# ---- the table


def test_processes_that_are_off_are_neither_in_the_program_nor_in_the_state():
    assert [name for name, _ in STORMY.program.processes] == list(PROCESSES)
    on = plan_run(**{"pressure.share": 0.5, "late.kind": "stale"})
    assert on.program.processes == choose("pressure", "busy")
    state = init_state(jax.random.key(0), on.hyper, on.program)
    assert set(state.world) == {"pressure", "busy"}


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("pressure.share", 0.1, "pressure"),
        ("background.most", 0.1, "background"),
        ("bandwidth.spread", 0.1, "bandwidth"),
        ("availability.share", 0.9, "reach"),
        ("availability.swing", 0.1, "reach"),
        ("late.kind", "stale", "busy"),
        ("availability.dropout", 0.1, "dropout"),
        ("channel.kind", "wireless", "wireless"),
        ("drift.labels", 0.1, "labels"),
        ("drift.images", "blur", "images"),
    ],
)
def test_one_field_turns_a_process_on(field, value, name):
    config = default.get_config()
    assert list_processes(config) == ()
    config.update_from_flattened_dict({field: value})
    assert list_processes(config) == choose(name)


def test_every_field_of_the_world_has_one_row_that_allows_its_default():
    rows = [row for process in PROCESSES.values() for row in process.options]
    table = {row.name: row for row in rows}
    assert all(row == table[row.name] for row in rows)
    config = default.get_config()
    fields = {
        f"{group}.{name}": value
        for group in GROUPS
        for name, value in config[group].items()
    }
    assert set(table) == set(fields)
    for name, value in fields.items():
        row = table[name]
        assert value in row.allowed and row.about
        named = isinstance(value, str)
        assert isinstance(row.allowed, tuple if named else Range)
        assert row.scope in ((STATIC,) if named else (TRACED, HOST))


# ---- the chain


def test_the_view_without_processes_is_the_federation_as_it_was():
    before = federation()
    view = observe({}, before, STORMY.hyper, ())
    assert_same(view.federation, before)
    assert_same(view.devices, before.devices)
    assert view.events.reachable.all() and jnp.isposinf(view.events.dropout).all()
    assert not (view.events.no_download | view.events.no_upload).any()
    assert view.distortion is None


def test_a_process_sees_the_view_that_those_before_it_have_left():
    double = lambda state, view, hyper: view.replace(
        devices=view.devices.replace(upload=2 * view.devices.upload)
    )
    cap = lambda state, view, hyper: view.replace(
        devices=view.devices.replace(upload=jnp.minimum(view.devices.upload, 3.0))
    )
    make = lambda name, apply: (name, PROCESSES["busy"]._replace(apply=apply))
    chain = make("double", double), make("cap", cap)
    devices = federation().devices.replace(upload=jnp.full(N, 2.0))
    start = federation().replace(devices=devices)
    look = lambda chain: observe(dict(double=0, cap=0), start, None, chain)
    assert look(chain).devices.upload.tolist() == [3.0] * N
    assert look(chain[::-1]).devices.upload.tolist() == [4.0] * N


def test_the_radio_channel_is_no_faster_than_the_links_that_others_have_left():
    world, hyper = make_world(choose("bandwidth", "wireless"))
    fast = jnp.full(N, 1e12)
    unlimited = federation().devices.replace(upload=fast, download=fast)
    unlimited = federation().replace(devices=unlimited)
    look = lambda start, *names: observe(world, start, hyper, choose(*names)).devices
    both = look(federation(), "bandwidth", "wireless").upload
    cell = look(unlimited, "wireless").upload
    left = look(federation(), "bandwidth").upload
    np.testing.assert_array_equal(both, jnp.minimum(cell, left))
    assert 0 < (cell < left).sum() < N


@pytest.mark.parametrize("name", list(PROCESSES))
def test_apply_draws_nothing(name):
    world, hyper = make_world(choose(name))
    process, view = PROCESSES[name], start_view(federation())
    apply = lambda state: process.apply(state, view, hyper)
    steps = str(jax.make_jaxpr(apply)(world[name]))
    assert not any(word in steps for word in ("random_", "threefry", "key<"))
    # The same words are found where a process draws.
    keys = Keys(jax.random.key(1), jax.random.key(2))
    step = lambda state: process.step(state, keys, jnp.int32(0), hyper)
    drawn = str(jax.make_jaxpr(step)(world[name]))
    assert ("random_bits" in drawn) == (name not in ("busy", "labels", "images"))


def test_only_late_clients_of_the_last_cohort_are_busy():
    chain = choose("pressure", "busy")
    world, hyper = make_world(chain)
    world["busy"] = world["busy"].at[0].set(True)
    cohort, late = jnp.array([1, 4, 7, 9]), jnp.array([False, True, False, True])
    outcome = Outcome(jnp.zeros(C, jnp.int32), jnp.ones((C, 3)), jnp.ones((C, 3)))
    after = close_round(world, cohort, outcome, late, hyper, chain)
    assert np.flatnonzero(after["busy"]).tolist() == [4, 9]
    np.testing.assert_array_equal(after["pressure"], world["pressure"])


# ---- a process of one's own


def step_toy(state, keys, round, hyper):
    return (round % 2).astype(jnp.float32)


def apply_toy(state, view, hyper):
    upload = view.devices.upload / (1 + state)
    # Label mixes that only evaluation reads.
    mix = jnp.roll(view.federation.label_mix, 1, axis=0)
    return view.replace(
        devices=view.devices.replace(upload=upload),
        federation=view.federation.replace(label_mix=mix),
    )


TOY = Process(
    about="Every other round the links up are half as fast.",
    is_on=lambda config: config.num_rounds > 1,
    init=lambda keys, hyper, sizes: jnp.zeros(()),
    step=step_toy,
    apply=apply_toy,
    metrics=lambda state: {"toy_odd": state},
    options=(Option("toy.speed", Range(0), "nothing"),),
)


def run():
    """Two rounds in which uploads take all of the time, and the evaluation after."""
    plan = plan_run(**{"devices.deadline": 1e9, "partition.kind": "shards"})
    model = make_linear_model(E)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    costs = count_costs(shapes, 1.0, 1.0, 1.0)
    program = plan.program._replace(model=model, costs=costs, device_costs=costs)
    plenty = np.full(N, 1e12, np.float32)
    devices = plan.federation.devices.replace(
        memory=plenty,
        flops=plenty,
        download=plenty,
        upload=np.full(N, 10.0, np.float32),
        latency=np.zeros(N, np.float32),
    )
    federation = plan.federation.replace(devices=devices)
    state = init_state(jax.random.key(0), plan.hyper, program)
    parts = replicate((state, federation, plan.hyper), program.mesh)
    state, metrics = build_run_rounds(program)(*parts)
    evaluate = build_evaluate(
        model, program.sizes, program.rules, program.processes, program.mesh
    )
    # All clients hold the same, so that they differ by their label mixes only.
    align = state.align.replace(held=jnp.zeros((N, E), bool).at[:, :K].set(True))
    found = evaluate(state.replace(align=align), *parts[1:])
    return jax.device_get((state, metrics, found))


def test_a_process_of_ones_own_is_one_record_and_one_row(monkeypatch):
    _, metrics, found = run()
    monkeypatch.setitem(PROCESSES, "toy", TOY)
    state, toy_metrics, toy_found = run()
    assert toy_metrics["toy_odd"].tolist() == [0, 1] and state.world == {"toy": 1}
    seconds = toy_metrics["simulated_seconds"] / metrics["simulated_seconds"]
    np.testing.assert_allclose(seconds, [1, 2], rtol=1e-5)
    # Evaluation sees the data as the process leaves them.
    accuracy = found["client_accuracy"]
    rolled = np.roll(accuracy, 1)
    assert np.abs(rolled - accuracy).max() > 0.01
    np.testing.assert_allclose(toy_found["client_accuracy"], rolled, atol=1e-6)
