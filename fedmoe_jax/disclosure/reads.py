"""The learnt evidence that a strategy decides from, found in its traced decision."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from ml_collections import ConfigDict

from fedmoe_jax.program import Program, make_hyper
from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Times

LEARNT = ("fitness", "usage")


def shape_evidence(program: Program) -> Evidence:
    """The shapes of the evidence on one MoE layer, as `Strategy.assign` gets it."""
    sizes, strategy = program.sizes, program.strategy
    count, experts = sizes.cohort_size, sizes.num_experts

    def shape(dtype: Any, *axes: int) -> Any:
        return jax.ShapeDtypeStruct(axes, dtype)

    each, row = (count, experts), shape(jnp.float32, count)
    return Evidence(
        round=shape(jnp.int32),
        client=shape(jnp.int32, count),
        fitness=shape(jnp.float32, *each),
        usage=shape(jnp.float32, experts),
        capacity=shape(jnp.int32, count),
        size=shape(jnp.int32, count),
        load=row,
        held=shape(jnp.bool_, *each),
        times_held=shape(jnp.int32, *each),
        state=jax.eval_shape(lambda: strategy.init(sizes)),
        room=row if program.units else None,
        times=Times(shape(jnp.float32, *each), row) if strategy.timed else None,
    )


def find_reads(config: ConfigDict, program: Program) -> tuple[str, ...]:
    """Of `fitness` and `usage` those that an assignment depends on.

    Nothing runs: the decision is traced, and what it does not depend on falls out of
    the traced program. What only values could rule out, such as a weight of 0, stays.

    Args:
      config: of the run, gives the traced numbers.
      program: its static parts.
    """

    def decide(evidence: Evidence, hyper: Hyper, key: Array) -> Assignment:
        return program.strategy.assign(evidence, hyper, program.sizes, key)

    key = jax.eval_shape(jax.random.key, 0)
    inputs = shape_evidence(program), make_hyper(config), key
    traced = jax.make_jaxpr(decide)(*inputs).jaxpr
    _, used = dce_jaxpr(traced, [True] * len(traced.outvars))
    evidence, _, _ = jax.tree.unflatten(jax.tree.structure(inputs), used)
    return tuple(name for name in LEARNT if getattr(evidence, name))
