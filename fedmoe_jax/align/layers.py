"""The MoE layers of a round: strategies and scores are written for ONE of them."""

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.align.learn import RESET, count_load, learn
from fedmoe_jax.cohort import Reply
from fedmoe_jax.program import Program
from fedmoe_jax.types import AlignState, Array, Assignment, Evidence, Hyper, SimState


def assign(
    evidence: Evidence, hyper: Hyper, program: Program, key: Array
) -> Assignment:
    """The strategy's decision for the cohort."""
    sizes = program.sizes
    assignment = program.strategy.assign(evidence, hyper, sizes, key)
    slots = (sizes.cohort_size, sizes.max_held)
    chex.assert_shape([assignment.held, assignment.slot], slots)
    return assignment


def learn_layers(
    state: SimState,
    evidence: Evidence,
    assignment: Assignment,
    replies: Reply,
    hyper: Hyper,
    program: Program,
) -> tuple[AlignState, Array]:
    """Fitness, usage and the strategy's state after the round; load [E] in it."""
    arrived = replies.arrived
    load = count_load(replies.feedback, arrived, assignment, program.sizes.num_experts)
    learnt = learn(
        *(state.align, evidence.client, assignment, replies.feedback, arrived, load),
        jax.random.fold_in(jax.random.fold_in(state.key, state.round), RESET),
        hyper=hyper,
        static=program.static,
    )
    known = lambda leaf: jnp.where(
        arrived.reshape(arrived.shape + (1,) * (leaf.ndim - 1)), leaf, 0.0
    )
    feedback, reports = jax.tree.map(known, (replies.feedback, replies.report))
    own = program.strategy.update(evidence, assignment, feedback, reports, hyper)
    return learnt.replace(strategy=own), load
