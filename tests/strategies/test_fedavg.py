"""The dense controls: their sizes, what each changes, FedNova's factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import (
    SIZES,
    draw,
    draw_params,
    make_config,
    make_image_model,
    sizes_of,
)

from fedmoe_jax.base import Route
from fedmoe_jax.optimizers import step_weights
from fedmoe_jax.program import configure, make_hyper
from fedmoe_jax.strategies import find_strategy
from fedmoe_jax.strategies.fedavg import normalise_steps


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("fedavg", 8),
        ("fedavg_active", 2),
        ("fedadam_active", 2),
        ("fedavg_dropout", 2),
        ("fedavg_held", 4),
        ("fedavg_smallest", 1),
        ("fedadam_smallest", 1),
        ("local_smallest", 1),
    ],
)
def test_a_control_has_the_width_that_its_name_says(name, factor):
    assert sizes_of(name) == SIZES._replace(num_experts=1, max_held=1, num_active=1)
    mixture = make_config(strategy=name)
    width = mixture.model.expert_width
    assert configure(mixture).model.expert_width == factor * width
    assert (mixture.num_experts, mixture.num_active) == (8, 2)


@pytest.mark.parametrize(
    ("name", "option", "group", "field"),
    [
        ("fedprox", "fedprox.coefficient", "client", "prox"),
        (
            *("fedadam_active", "fedadam.server_learning_rate"),
            *("server", "learning_rate"),
        ),
    ],
)
def test_configure_takes_numbers_from_the_strategys_options(name, option, group, field):
    default = make_hyper(make_config(strategy=name))
    expected = {"fedprox": 0.1, "fedadam_active": 0.01}[name]
    np.testing.assert_allclose(getattr(getattr(default, group), field), expected)
    tuned = make_hyper(make_config(strategy=name, **{option: 0.07}))
    np.testing.assert_allclose(getattr(getattr(tuned, group), field), 0.07)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_normalise_steps_counts_how_often_a_gradient_is_used(momentum):
    """Against local SGD itself: constant gradients of 1 and a rate of 1."""

    def walk(steps):
        velocity = place = 0.0
        for _ in range(steps):
            velocity = momentum * velocity + 1.0
            place += velocity
        return place

    steps, size = np.array([1, 4, 7]), np.array([10.0, 10.0, 20.0])
    used = np.array([walk(count) for count in steps])
    np.testing.assert_allclose(
        step_weights(jnp.asarray(steps, jnp.float32), momentum), used, rtol=1e-5
    )
    mean = (used * size).sum() / size.sum()
    scale = normalise_steps(jnp.asarray(steps), jnp.asarray(size), momentum)
    np.testing.assert_allclose(scale, mean / used, rtol=1e-5)
    # With the same gradient everywhere nothing changes: every client goes as far.
    np.testing.assert_allclose(scale * used, mean, rtol=1e-5)


@pytest.mark.slow
def test_a_control_with_a_shared_expert_is_one_network_of_the_total_width():
    """Two trained layers side by side are one, as wide as both together."""
    config = make_config(strategy="fedavg_active", **{"model.shared_width": 3})
    used = configure(config).model
    assert (used.shared_width, used.expert_width) == (3, 2 * config.model.expert_width)
    both = make_image_model(num_experts=1, shared_width=3, expert_width=8)
    one = make_image_model(num_experts=1, expert_width=11)
    params = jax.tree.map(np.asarray, draw_params(both))
    stem = {name: tree for name, tree in params["stem"].items() if name != "shared"}
    shared, routed = params["stem"]["shared"], params["experts"]["moe"]
    join = lambda a, b, axis: np.concatenate([a[0], b], axis)[None]
    hidden = {
        "kernel": join(routed["Dense_1"]["kernel"], shared["Dense_1"]["kernel"], 1),
        "bias": join(routed["Dense_1"]["bias"], shared["Dense_1"]["bias"], 0),
    }
    outputs = {
        "kernel": join(routed["Dense_0"]["kernel"], shared["Dense_0"]["kernel"], 0),
        "bias": routed["Dense_0"]["bias"] + shared["Dense_0"]["bias"][None],
    }
    wide = params | {"stem": stem}
    wide["experts"] = {"moe": {"Dense_0": outputs, "Dense_1": hidden}}
    slots = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    inputs = {"x": draw(5, 8, 8, 1)}, *slots, Route(1), None
    found, expected = (
        both.apply(params, {}, *inputs)[0],
        one.apply(wide, {}, *inputs)[0],
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_only_the_smallest_control_needs_no_room():
    needs = lambda name: find_strategy(name).needs
    assert needs("fedavg_smallest") == needs("local_smallest") == ""
    assert "room" in needs("fedavg") and needs("fedavg") == needs("fedavg_active")
    assert needs("scaffold_smallest") in needs("scaffold")
    assert needs("centralised") == needs("centralised_smallest") != ""


def test_dropout_is_the_strategys_own_rate():
    config = make_config(strategy="fedavg_dropout", **{"fedavg_dropout.rate": 0.25})
    assert configure(config).model.expert_dropout == 0.25
    assert configure(make_config(strategy="fedavg_active")).model.expert_dropout == 0
