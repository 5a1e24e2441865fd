"""Dense controls: federated averaging of one network without experts to choose."""

import jax.numpy as jnp

from fedmoe_jax.types import Array, Assignment, Evidence, Hyper, Sizes, Strategy


def _dense(sizes: Sizes, width_factor: int) -> Sizes:
    """One expert, `width_factor` times as wide, that everyone holds."""
    return sizes._replace(
        num_experts=1,
        max_held=1,
        num_active=1,
        expert_width=width_factor * sizes.expert_width,
    )


def resize_total(sizes: Sizes) -> Sizes:
    """A dense model of the mixture's total size: E experts' hidden units in one."""
    return _dense(sizes, sizes.num_experts)


def resize_active(sizes: Sizes) -> Sizes:
    """A dense model of the mixture's active size: A experts' hidden units in one."""
    return _dense(sizes, sizes.num_active)


def assign(evidence: Evidence, hyper: Hyper, sizes: Sizes, key: Array) -> Assignment:
    """Every client holds the one expert, whatever its capacity."""
    shape = (evidence.client.shape[0], sizes.max_held)
    return Assignment(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))


FEDAVG = Strategy(
    assign=assign,
    resize=resize_total,
    note=(
        "Dense control as wide as all experts together; every client trains all of "
        "it, so client capacity is ignored."
    ),
)

FEDAVG_ACTIVE = Strategy(
    assign=assign,
    resize=resize_active,
    note=(
        "Dense control as wide as the experts active per example; every client trains "
        "all of it, so client capacity is ignored."
    ),
)
