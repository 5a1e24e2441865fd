"""The mean gate of every client over all experts, as the client last reported it."""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.explore import uniform_scores
from fedmoe_jax.base import Routing
from fedmoe_jax.positions import average
from fedmoe_jax.types import (
    Array,
    Assignment,
    Evidence,
    Feedback,
    Hyper,
    PyTree,
    Sizes,
)


def init_mass(sizes: Sizes) -> PyTree:
    """`{"mass": [N, E]}`: zeros, as no client has reported its gate yet."""
    return {"mass": jnp.zeros((sizes.num_clients, sizes.num_experts))}


def report_mass(routing: Routing, batch: PyTree, hyper: Hyper) -> Array:
    """ONE client's report on a batch: its mean gate over all experts, [E]."""
    assert routing.logits is not None  # with one expert there is no report
    return average(jax.nn.softmax(routing.logits), routing.weight)


def update_mass(
    evidence: Evidence,
    assignment: Assignment,
    feedback: Feedback,
    reports: PyTree,
    hyper: Hyper,
) -> PyTree:
    """The state with the newest reports [C, E]; a client without one keeps its last."""
    mass, client = evidence.state["mass"], evidence.client
    reported = reports.sum(axis=1, keepdims=True) > 0
    new = jnp.where(reported, reports, mass[client])
    return evidence.state | {"mass": mass.at[client].set(new)}


def mass_or_random(
    evidence: Evidence, sizes: Sizes, key: Array
) -> tuple[Array, Array, Array]:
    """Scores of the cohort by reported gates; random for clients without a report.

    Returns:
      scores [C, E], the reported mass [C, E], and `new` [C] bool, clients without one.
    """
    mass = evidence.state["mass"][evidence.client]
    new = mass.sum(axis=1) == 0
    drawn = uniform_scores(key, evidence.client, sizes.num_experts)
    return jnp.where(new[:, None], drawn, mass), mass, new
