"""What of a run's model travels between the server and the clients in a round."""

import jax.numpy as jnp

from fedmoe_jax.client import is_local
from fedmoe_jax.rules import PARTS, Rules
from fedmoe_jax.types import Array, Assignment, Evidence, Sizes
from fedmoe_jax.world.costs import FEEDBACK_NUMBERS, Traffic, Ways


def find_ways(rules: Rules) -> Ways:
    """How the parts of a run's model travel."""
    return Ways(
        personal=PARTS if rules.silent else rules.personal,
        frozen=rules.frozen,
        copies=2 if rules.variates else 1,
    )


def plan_traffic(
    evidence: Evidence,
    assignment: Assignment,
    equipped: Array,
    sizes: Sizes,
    rules: Rules,
) -> Traffic:
    """What the cohort holds, trains and is sent; what it sends is not known yet.

    `equipped` [C] bool are the clients that have the frozen parts.
    """
    held = assignment.slot.sum(1)
    local = is_local(assignment.held, sizes.num_experts, rules.local_experts)
    local = (assignment.slot & local).sum(1)
    trained = jnp.minimum(held, evidence.capacity) if rules.focus else held
    told = FEEDBACK_NUMBERS * held + sizes.num_experts * rules.report_mass
    shown = jnp.zeros(held.shape)
    if rules.gate_period:
        shown += evidence.round % rules.gate_period == 0
    talks = 0.0 if rules.silent else 1.0
    return Traffic(
        held=held.astype(jnp.float32),
        trained=trained.astype(jnp.float32),
        sent=jnp.zeros(held.shape),
        received=talks * (held - local),
        told=talks * told,
        shown=shown,
        new=(~equipped).astype(jnp.float32),
    )
