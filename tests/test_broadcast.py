"""The inputs of a cohort, its conditions and its traffic."""

import jax.numpy as jnp
import numpy as np
import pytest
from factories import K, N, choose, plan_run, send_inputs, start, use_linear_model

from fedmoe_jax.world.step import observe


@pytest.mark.slow
def test_broadcast_distorts_the_images_of_drifting_clients_of_the_cohort():
    plan = plan_run(cohort_size=3)
    source = np.array([0, 2, 1, *range(3, N)], np.int32)
    plan = plan._replace(federation=plan.federation.replace(drift_source=source))
    run = start(plan, use_linear_model(plan.program))
    cohort = jnp.array([0, 2, 3])

    def send(**world):
        world = {name: jnp.float32(value) for name, value in world.items()}
        view = observe(world, run.federation, run.hyper, choose(*world))
        held = jnp.zeros((3, K), jnp.int32), jnp.ones((3, K), bool)
        return send_inputs(run, run.state, cohort, *held, view)

    assert send(images=30).distortion.tolist() == [0, 30, 0]
    assert send(labels=1).distortion is None
