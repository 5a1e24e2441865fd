"""The chain of processes: its table, its order, its state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import STORM, C, N, assert_same, choose, make_config, plan_run

from fedmoe_jax.base import Process
from fedmoe_jax.options import HOST, STATIC, TRACED, Range, UserError
from fedmoe_jax.program import list_processes
from fedmoe_jax.state import init_state
from fedmoe_jax.types import make_keys
from fedmoe_jax.world import PROCESSES
from fedmoe_jax.world.outcome import Outcome
from fedmoe_jax.world.step import (
    close_round,
    init_world,
    measure_processes,
    observe,
    start_view,
    step_world,
)

pytestmark = pytest.mark.slow

GROUPS = "pressure background bandwidth availability channel drift late".split()
GROUPS += ["expert_links"]
# With every process; links change what is routed where, which no other test needs.
STORMY = plan_run(**STORM, **{"expert_links.kind": "wireless"})


def make_world(chain):
    """The state of these processes before the first round of the storm."""
    hyper = jax.tree.map(jnp.asarray, STORMY.hyper)
    return init_world(jax.random.key(0), hyper, STORMY.program.sizes, chain), hyper


def federation():
    return jax.tree.map(jnp.asarray, STORMY.federation)


# ---- the table


def test_list_processes_leaves_out_what_is_off():
    assert [name for name, _ in STORMY.program.processes] == list(PROCESSES)
    on = plan_run(**{"pressure.share": 0.5, "late.kind": "stale"})
    assert on.program.processes == choose("pressure", "busy")
    state, _ = init_state(jax.random.key(0), on.hyper, on.program)
    assert set(state.world) == {"pressure", "busy"}


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("pressure.share", 0.1, "pressure"),
        ("background.most", 0.1, "background"),
        ("bandwidth.spread", 0.1, "bandwidth"),
        ("availability.share", 0.9, "reach"),
        ("availability.swing", 0.1, "reach"),
        ("availability.capacity_bias", 0.1, "bias"),
        ("late.kind", "stale", "busy"),
        ("availability.dropout", 0.1, "dropout"),
        ("channel.kind", "wireless", "wireless"),
        ("drift.labels", 0.1, "labels"),
        ("drift.images", "blur", "images"),
        ("expert_links.kind", "wireless", "expert_links"),
    ],
)
def test_list_processes_needs_one_field_to_turn_one_on(field, value, name):
    assert list_processes(make_config()) == ()
    assert list_processes(make_config(**{field: value})) == choose(name)


def test_list_processes_is_empty_where_data_are_pooled():
    assert list_processes(make_config(**STORM, strategy="centralised")) == ()


def test_processes_have_one_row_for_every_field_that_allows_its_default():
    rows = [row for process in PROCESSES.values() for row in process.options]
    table = {row.name: row for row in rows}
    assert all(row == table[row.name] for row in rows)
    config = make_config()
    fields = {
        f"{group}.{name}": value
        for group in GROUPS
        for name, value in config[group].items()
    }
    assert set(table) == set(fields)
    for name, value in fields.items():
        row = table[name]
        allowed = row.allowed() if callable(row.allowed) else row.allowed
        assert value in allowed and row.about
        named = isinstance(value, str)
        assert isinstance(allowed, tuple if named else Range)
        assert row.scope in ((STATIC,) if named else (TRACED, HOST))


# ---- the chain


def test_observe_without_processes_shows_the_federation_as_it_was():
    before = federation()
    view = observe({}, before, STORMY.hyper, ())
    assert_same(view.federation, before)
    assert_same(view.devices, before.devices)
    assert view.events.reachable.all() and jnp.isposinf(view.events.dropout).all()
    assert not (view.events.no_download | view.events.no_upload).any()
    assert view.distortion is None


def test_observe_gives_a_process_the_view_that_those_before_it_have_left():
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


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"step": lambda *_: jnp.zeros(3)}, r"a `step` that returns float32\[3\]; "),
        (
            {"apply": lambda *_: None},
            "an `apply` that returns a value of type NoneType",
        ),
        ({"after": lambda *_: jnp.zeros(N)}, r"an `after` that returns float32\[\d+\]"),
    ],
)
def test_a_process_that_returns_another_form_is_named(changes, told):
    still = Process(
        about="Nothing moves.",
        is_on=lambda config: True,
        init=lambda keys, hyper, sizes: jnp.zeros(()),
        step=lambda state, keys, round, hyper: state,
        apply=lambda state, view, hyper: view,
    )
    chain, state = (("still", still._replace(**changes)),), {"still": jnp.zeros(())}
    with pytest.raises(UserError, match=f"the process 'still' has {told}"):
        step_world(state, None, jnp.int32(0), None, chain)
        observe(state, federation(), None, chain)
        close_round(state, None, None, None, None, chain)


def test_observe_makes_no_channel_faster_than_the_links_that_others_have_left():
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
    keys = make_keys(jax.random.key(1), 0)
    step = lambda state: process.step(state, keys, jnp.int32(0), hyper)
    drawn = str(jax.make_jaxpr(step)(world[name]))
    assert ("random_bits" in drawn) == (name not in ("busy", "labels", "images"))


# ---- the ends of a process


BARE = Process(
    about="Counts the rounds.",
    is_on=lambda config: True,
    init=lambda keys, hyper, sizes: jnp.zeros((), jnp.int32),
    step=lambda state, keys, round, hyper: state + 1,
    apply=lambda state, view, hyper: view,
)


def test_processes_need_neither_an_after_nor_metrics():
    chain = ("bare", BARE), *choose("busy", "labels")
    world, hyper = make_world(chain)
    assert BARE.after is None and BARE.metrics is None
    for round in range(2):
        keys = make_keys(jax.random.key(1), round)
        world = step_world(world, keys, jnp.int32(round), hyper, chain)
        found = measure_processes(world, chain)
        outcome = Outcome(jnp.zeros(C, jnp.int32), jnp.ones((C, 3)), jnp.ones((C, 3)))
        ended = jnp.arange(C), outcome, jnp.ones(C, bool)
        world = close_round(world, *ended, hyper, chain)
    assert world["bare"] == 2 and world["busy"].sum() == C
    assert set(found) == {"drift_moved"}


# ---- stationary laws


def test_init_world_draws_from_the_stationary_laws_and_step_world_keeps_them():
    plan = plan_run(**STORM | {"availability.swing": 0.0})
    hyper = jax.tree.map(jnp.asarray, plan.hyper)
    sizes = plan.program.sizes._replace(num_clients=20_000)
    chain = plan.program.processes
    state = init_world(jax.random.key(0), hyper, sizes, chain)

    def step(state, round):
        keys = make_keys(jax.random.key(0), round)
        return step_world(state, keys, round, hyper, chain), state

    last, path = jax.lax.scan(step, state, jnp.arange(4))
    latents = lambda world: {
        "pressure": world["pressure"],
        "reach": world["reach"].now,
        "background": world["background"],
        "bandwidth": world["bandwidth"],
        "bias": world["bias"],
        "fading": world["wireless"].fading,
        "known": world["wireless"].known,
    }
    for now in map(latents, (state, last)):
        assert abs(now["pressure"].mean() - 0.3) < 0.015
        assert abs(now["reach"].mean() - 0.8) < 0.015
        for name in ("background", "bandwidth", "bias", "fading", "known"):
            assert abs(now[name].mean()) < 0.03 and abs(now[name].std() - 1) < 0.03
    path, states = latents(path), path
    by_lag = lambda name, lag: np.corrcoef(
        np.ravel(path[name][0]), np.ravel(path[name][lag])
    )[0, 1]
    for name, r in {
        "pressure": 0.5,
        "reach": 0.5,
        "bandwidth": 0.5,
        "bias": 0.5,
        "fading": 0.9,
    }.items():
        np.testing.assert_allclose(
            [by_lag(name, 1), by_lag(name, 3)], [r, r**3], atol=0.03
        )
    assert states["labels"].tolist() == [0.25, 0.25, 0.5, 0.5]
    # Clients stay where they are.
    for leaf in (states["wireless"].gain_db, states["reach"].phase):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
