"""Groups from directions of updates: the sketch, the direction, who is grouped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import SIZES, assert_same, make_hyper, plan_run, start

from fedmoe_jax.base import Route
from fedmoe_jax.positions import mean_loss
from fedmoe_jax.strategies.prototypes import take_dense
from fedmoe_jax.strategies.update_groups import (
    SKETCH,
    count_sketch,
    describe_update,
    sketch,
)
from fedmoe_jax.tasks.batches import take_batch

pytestmark = pytest.mark.slow


def test_sketch_is_linear_and_keeps_distances():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=5000), jnp.float32) for _ in range(2))
    np.testing.assert_allclose(sketch(a - b), sketch(a) - sketch(b), atol=1e-4)
    for vector in (a, b, a - b):
        ratio = jnp.linalg.norm(sketch(vector)) / jnp.linalg.norm(vector)
        assert 0.9 < ratio < 1.1


def test_a_message_is_the_unit_gradient_over_all_examples_of_the_client():
    plan = plan_run(strategy="update_groups")
    run = start(plan, plan.program)
    program, federation, client = plan.program, run.federation, 1
    own = federation.index[client], federation.size[client]
    parts = program.model, program.task, program.sizes
    describe = jax.jit(lambda *args: describe_update(*args, *parts))
    means = describe(run.state.params, federation, *own)
    ids = federation.index[client][: int(federation.size[client])]
    batch = take_batch(federation.train, ids, federation.statistics, program.task)
    held, slot = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)

    def loss(params):
        outputs, _ = program.model.apply(params, {}, batch, held, slot, Route(1), None)
        return mean_loss(program.task.loss(outputs, batch))

    grads = jax.grad(loss)(take_dense(run.state.params))
    assert_same(grads["gate"], jax.tree.map(jnp.zeros_like, grads.pop("gate")))
    flat, _ = jax.flatten_util.ravel_pytree(grads)
    expected = sketch(flat / jnp.linalg.norm(flat))
    np.testing.assert_allclose(means.feature[0, 0], expected, atol=1e-5)
    np.testing.assert_array_equal(means.count, [[len(ids)]])


def test_a_message_is_a_sketch_where_clients_are_asked():
    hyper = make_hyper(upcycle={"rounds": 2})
    count = functools.partial(count_sketch, hyper=hyper, sizes=SIZES)
    sent = [float(count(jnp.int32(round))[0]) for round in range(4)]
    assert sent == [0, 0, SKETCH + 1, 0] and count(jnp.int32(0))[1] == 3
