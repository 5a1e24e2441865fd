"""What one client keeps of its round, and what it sends back."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    assert_same,
    make_feedback,
    make_hyper,
    make_inputs,
    make_program,
    make_update,
)

from fedmoe_jax.reply import (
    count_sent,
    keep_if,
    renew_variate,
    train_client,
    train_personal,
)
from fedmoe_jax.world.outcome import MERGED, Outcome

E, K = 4, 2
LOAD = np.arange(2.0 * 6, dtype=np.float32).reshape(6, 1, K)


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_train_personal_moves_held_local_experts_of_each_layer_alone():
    """Of four experts the last two are local; slots that do not count move nothing."""
    held, slot = np.array([[0, 3], [2, 3]]), np.array([[1, 1], [1, 0]], bool)
    names = "moe_0", "moe_1"
    old = {name: {"kernel": draw(E, 2, seed=i)} for i, name in enumerate(names)}
    delta = {name: {"kernel": draw(K, 2, seed=9 + i)} for i, name in enumerate(names)}
    head, step = {"bias": draw(2, seed=5)}, {"bias": draw(2, seed=6)}
    inputs = make_inputs(
        *(held[None], slot[None]),
        personal=jax.tree.map(lambda leaf: leaf[None], {"experts": old, "head": head}),
    )
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    update = make_update({"experts": delta, "head": step}, make_feedback(LOAD[0]))
    found = train_personal(inputs, update, local_experts=2)
    expected = jax.tree.map(np.copy, old)
    expected["moe_0"]["kernel"][3] += delta["moe_0"]["kernel"][1]
    expected["moe_1"]["kernel"][2] += delta["moe_1"]["kernel"][0]
    assert_same(found["experts"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["head"]["bias"], head["bias"] + step["bias"])


def walk(gradients, correction, rate, momentum):
    """The delta of local SGD that corrects its gradients."""
    velocity = place = 0.0
    for gradient in gradients:
        velocity = momentum * velocity + gradient + correction
        place -= rate * velocity
    return place


@pytest.mark.parametrize(
    ("gradients", "momentum", "expected"),
    [
        ([1.0, 2.0, 3.0, 6.0], 0.0, 3.0),  # their mean
        ([3.0, 3.0, 3.0, 3.0], 0.9, 3.0),  # equal ones, however often each is used
        ([-2.0], 0.0, -2.0),
    ],
)
def test_renew_variate_is_the_mean_gradient(gradients, momentum, expected):
    """SCAFFOLD's option II by hand, `c_i - c + (x - y) / (K lr)`, for c - c_i = 0.5."""
    rate, correction, shape = 0.1, 0.5, (1, 1, 1)
    delta = walk(gradients, correction, rate, momentum)
    inputs = make_inputs(
        *(np.zeros(shape, np.int32), np.ones(shape, bool)),
        steps=np.array([len(gradients)], np.int32),
        correction={"head": {"bias": jnp.full((1, 2), correction)}},
    )
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    update = make_update({"head": {"bias": jnp.full(2, delta)}}, make_feedback(LOAD[0]))
    hyper = make_hyper(client={"learning_rate": rate})
    renew = jax.jit(functools.partial(renew_variate, momentum=momentum))
    found = renew(inputs, update, hyper)
    np.testing.assert_allclose(found["head"]["bias"], [expected] * 2, rtol=1e-5)
    assert renew_variate(inputs.replace(correction={}), update, hyper, momentum) == {}
    pruned = update.replace(keep={"head": {"bias": jnp.array([1.0, 0.0])}})
    kept = renew(inputs, pruned, hyper)["head"]["bias"]
    np.testing.assert_allclose(kept, [expected, 0.0], rtol=1e-5)


def count(weights, kept=None, **changes):
    program = make_program(**changes)
    traffic = SimpleNamespace(received=jnp.float32(2.0))
    conditions = SimpleNamespace(traffic=traffic)
    return float(count_sent({"experts": weights}, kept, conditions, program))


def test_count_sent_counts_experts_of_some_weight_by_what_is_kept_of_them():
    weights = jnp.array([[3.0, 0.0]])
    assert count(weights) == 1.0
    assert count(weights, kept=jnp.array([[0.25, 0.75]])) == 0.25
    assert count(weights, **{"privacy.flip": 1.0}) == 2.0  # all that it asked for


def test_updates_count_by_the_loss_before_training_where_losses_weigh():
    """Twelve examples times 0.5 ** 2; the mean over the steps, 3, does not matter."""
    program = make_program(**{"fairness.power": 2.0})
    inputs = make_inputs(np.array([[[2, 0]]]), np.ones((1, 1, K), bool))
    inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
    feedback = make_feedback(np.ones((1, K), np.float32))
    delta = {part: jnp.zeros(()) for part in ("stem", "head")}
    delta |= {"gate": {"moe": jnp.zeros(E)}, "experts": {"moe": jnp.zeros(K)}}
    update = make_update(delta, feedback, loss=3.0, first_loss=0.5, finite=True)
    phases = jnp.ones(3)
    _, weights, _ = train_client(
        {},
        inputs,
        SimpleNamespace(traffic=None),
        SimpleNamespace(size=jnp.array([12])),
        make_hyper(fairness={"power": jnp.float32(2.0)}),
        jax.random.key(0),
        client_update=lambda *_: update,
        judge=lambda *_: Outcome(jnp.int32(MERGED), phases, phases),
        program=program,
    )
    np.testing.assert_allclose(weights["stem"], 12 * 0.5**2, rtol=1e-5)


def test_keep_if_is_all_or_nothing():
    weights = {"stem": jnp.array(3.0), "experts": jnp.ones((1, K))}
    assert_same(keep_if(jnp.array(True), weights), weights)
    nothing = {"stem": np.zeros(()), "experts": np.zeros((1, K))}
    assert_same(keep_if(jnp.array(False), weights), nothing)
