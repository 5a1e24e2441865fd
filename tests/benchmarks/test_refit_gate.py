"""Gates fitted to a case whose right routing is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.refit_gate import Seen, check_run, fit, level, measure
from fedmoe_jax.api import Run
from fedmoe_jax.configs import default
from fedmoe_jax.models.routing import gate_logits
from fedmoe_jax.options import UserError

X = jnp.array([[-2.0], [-1.0], [1.0], [2.0], [3.0]])
RIGHT = jnp.array([[5.0, 0.0], [0.0, 5.0], [0.0, 0.0]])  # [E, L]
SEEN = Seen(X, jnp.tile(RIGHT, (5, 1, 1)), jnp.array([0, 0, 1, 1, 1]))
# Expert 2 knows nothing and gets all; the other two logits differ rightly in sign.
GATE = {"kernel": jnp.array([[-1.0], [1.0], [0.0]]), "bias": jnp.array([0.0, 0, 99])}


def test_measure_counts_right_answers_and_gate_mass():
    accuracy, mass = measure(GATE, SEEN, 1)
    assert accuracy == pytest.approx(2 / 5)  # class 0, the first of equal ones
    assert mass.tolist() == [0, 0, 1]
    accuracy, mass = measure(GATE | {"bias": jnp.zeros(3)}, SEEN, 1)
    assert accuracy == 1 and mass == pytest.approx([0.4, 0.6, 0])


def test_level_makes_mean_logits_equal_and_shuts_out_others():
    gate = level(GATE, SEEN, jnp.array([True, True, False]))
    np.testing.assert_allclose(gate["bias"][:2], [0.6, -0.6], rtol=1e-5)
    logits = gate_logits(gate, X)
    np.testing.assert_allclose(logits.mean(0)[:2], 0, atol=1e-6)
    assert measure(gate, SEEN, 2)[1][2] == 0


@pytest.mark.slow
def test_fit_finds_the_routing_and_leaves_the_other_parts():
    start = GATE | {"bias": jnp.array([0.0, 0.0, 3.0])}
    biases = fit(start, SEEN, ("bias",))
    assert biases["kernel"] is start["kernel"]
    assert measure(biases, SEEN, 1)[0] == 1
    blind = {"kernel": jnp.zeros((3, 1)), "bias": jnp.zeros(3)}
    assert measure(fit(blind, SEEN, ("bias",)), SEEN, 1)[0] < 1  # one for all images
    assert measure(fit(blind, SEEN, ("kernel", "bias")), SEEN, 1)[0] == 1


def test_a_run_without_a_checkpoint_is_refused():
    run = Run(default.get_config(), {}, None, None, None)
    with pytest.raises(UserError, match="run has no checkpoint"):
        check_run(run)
