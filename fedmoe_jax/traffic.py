"""The parts of a run's model that travel between server and clients in a round."""

import jax.numpy as jnp

from fedmoe_jax.base import PARTS, Strategy
from fedmoe_jax.models.submodel import is_local
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper
from fedmoe_jax.world.costs import FEEDBACK_NUMBERS, Traffic, Ways


def find_ways(strategy: Strategy) -> Ways:
    """How the parts of a run's model travel."""
    return Ways(
        personal=PARTS if strategy.silent else strategy.personal,
        copies=2 if strategy.variates else 1,
    )


def plan_traffic(
    evidence: Evidence,
    assignment: Assignment,
    equipped: Array,
    hyper: Hyper,
    program: Program,
) -> Traffic:
    """The cohort's traffic, but for what it sends, which is not known yet.

    `equipped` [C] bool are the clients that have the frozen parts.
    """
    strategy, num_experts = program.strategy, program.sizes.num_experts
    per_layer = lambda slots: slots.sum((1, 2)) / program.sizes.num_layers
    held = per_layer(assignment.slot)
    local = is_local(assignment.held, num_experts, strategy.local_experts)
    local = per_layer(assignment.slot & local)
    some = strategy.expert_priority is not None
    trained = jnp.minimum(held, evidence.capacity) if some else held
    shown = jnp.zeros(held.shape)
    if strategy.gate_period:
        shown += evidence.round % strategy.gate_period(hyper) == 0
    talks = 0.0 if strategy.silent else 1.0
    feedback = FEEDBACK_NUMBERS * assignment.slot.sum((1, 2))
    return Traffic(
        held=held,
        trained=trained,
        sent=jnp.zeros(held.shape),
        received=talks * (held - local),
        reported=talks * (feedback + program.report_numbers),
        shown=shown,
        new=(~equipped).astype(jnp.float32),
    )
