"""Losses of members and others under a client's update, against a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from factories import plan_run, start_run, use_linear_model

from fedmoe_jax.base import Route
from fedmoe_jax.client import build_client_update
from fedmoe_jax.disclosure.exposure import build_expose_share, show_update
from fedmoe_jax.evaluation.finetune import gather_input
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.runtime.sharding import build_mesh, spread
from fedmoe_jax.types import make_keys
from fedmoe_jax.world.step import observe

pytestmark = pytest.mark.slow

CLIP = {"privacy.clip": 0.05}


def start_study(devices=1, **changes):
    """A run of ten clients of which client 3 holds nothing."""
    fields = {"strategy": "greedy", "partition.test_share": 0.4}
    fields |= {"client.learning_rate": 0.3}
    plan = plan_run(**fields | changes)
    program = use_linear_model(plan.program)._replace(mesh=build_mesh(devices))
    run = start_run(plan, program)
    align, sizes = run.state.align, program.sizes
    order = np.random.default_rng(0).random(align.held.shape).argsort(axis=2)
    held = jnp.asarray(order < sizes.max_held).at[3].set(False)
    rounds = jnp.ones(sizes.num_clients, jnp.int32)
    participation = run.state.participation.replace(rounds=rounds)
    align = align.replace(held=held)
    return run._replace(
        state=run.state.replace(align=align, participation=participation)
    )


def expose(run):
    share = spread(build_expose_share(run.program), run.program.mesh)
    return jax.device_get(jax.jit(share)(run.state, run.federation, run.hyper))


def train(run, client):
    """Inputs and update of ONE client, and the key of its round."""
    program, federation, hyper = run.program, run.federation, run.hyper

    @jax.jit
    def train_one(state, client):
        view = observe(state.world, federation, hyper, program.processes)
        inputs = gather_input(state, view, hyper, None, client, program)
        key = jax.random.fold_in(make_keys(state.key, state.round).train, client)
        update = build_client_update(program)
        return inputs, update(state.params, inputs, federation, hyper, key), key

    return train_one(run.state, jnp.int32(client))


def lose_slowly(run, client, personal):
    """The losses of all training examples under ONE client's update."""
    program, state, federation = run.program, run.state, run.federation
    inputs, update, key = train(run, client)
    size = federation.size[client]

    @jax.jit
    def lose(inputs, update, key):
        delta = show_update(update, inputs, size, run.hyper, key, program)
        sent = take_submodel(state.params, personal, inputs.held, 0)
        model = optax.tree.add(sent, delta)
        batch = program.task.prepare(federation.train, federation.statistics)
        route = Route(program.sizes.num_active, program.strategy.mix)
        slots = inputs.held, inputs.slot, route
        outputs, routing = program.model.apply(model, {}, batch, *slots, None)
        best = inputs.held[0][routing.gates[0].argmax(1)]
        return program.task.loss(outputs, batch).loss, best

    return jax.device_get(lose(inputs, update, key))


@pytest.mark.parametrize(
    "changes",
    [{}, CLIP, CLIP | {"privacy.noise": 0.5}, {"gate.mode": "personal"}],
    ids=["plain", "clip", "noise", "personal"],
)
def test_expose_share_equals_the_slow_loop(changes):
    run = start_study(**changes)
    found, federation = expose(run), run.federation
    order = np.argsort(found["exposed_client"])
    assert found["exposed_client"][order].tolist() == list(range(10))
    assert found["served"][order].tolist() == [c != 3 for c in range(10)]
    for client in (0, 7):
        losses, experts = lose_slowly(run, client, {})
        row = order[client]
        for name, ids, size in (
            ("member", federation.index, federation.size),
            ("other", federation.own_test.index, federation.own_test.size),
        ):
            count = int(size[client])
            example = found[f"{name}_example"][row]
            assert example[:count].tolist() == ids[client, :count].tolist()
            assert (example[count:] == -1).all()
            expected = losses[example[:count]]
            loss = found[f"{name}_loss"][row, :count]
            np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
            chosen = found[f"{name}_expert"][row, :count]
            assert (chosen == experts[example[:count]]).mean() > 0.95


def test_expose_share_is_the_same_on_several_devices_and_of_a_sample():
    one, four = expose(start_study()), expose(start_study(devices=4))
    for name in one:
        np.testing.assert_allclose(four[name], one[name], rtol=1e-4, atol=1e-5)
    sample = expose(start_study(**{"evaluation.clients": 3}))
    assert len(sample["exposed_client"]) == 3
    for row, client in enumerate(sample["exposed_client"]):
        (place,) = np.flatnonzero(one["exposed_client"] == client)
        for name in ("member_loss", "other_loss"):
            np.testing.assert_allclose(
                sample[name][row], one[name][place], rtol=1e-4, atol=1e-5
            )


def test_show_update_bounds_the_delta_and_hides_it_in_noise():
    plain, clipped = start_study(), start_study(**CLIP)
    noisy = start_study(**CLIP, **{"privacy.noise": 2.0})

    def show(run):
        inputs, update, key = train(run, 0)
        size = run.federation.size[0]
        return show_update(update, inputs, size, run.hyper, key, run.program)

    assert optax.tree.norm(show(plain)) > 0.2
    np.testing.assert_allclose(optax.tree.norm(show(clipped)), 0.05, rtol=1e-4)
    noise = optax.tree.sub(show(noisy), show(clipped))["stem"]["kernel"]
    np.testing.assert_allclose(np.array(noise).std(), 0.1, rtol=0.2)
    inputs, _, _ = train(noisy, 0)
    unheld = ~np.array(inputs.slot[0])
    experts = np.array(show(noisy)["experts"]["moe"]["kernel"])
    assert not experts[unheld].any()
