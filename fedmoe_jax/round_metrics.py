"""The metrics of one round, measured inside the compiled program."""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.usage import load_cv, load_entropy, starved
from fedmoe_jax.cohort import Report
from fedmoe_jax.costs import client_bytes, client_seconds
from fedmoe_jax.setup import Setup
from fedmoe_jax.types import AlignState, Array, Assignment, Devices


def measure(
    before: AlignState,
    after: AlignState,
    cohort: Array,
    assignment: Assignment,
    report: Report,
    load: Array,
    devices: Devices,
    setup: Setup,
) -> dict[str, Array]:
    """The metrics of one round; means over clients are taken here, once."""
    sizes, personal = setup.sizes, setup.rules.gate_mode == "personal"
    slots = assignment.slot.sum(1)
    bytes_up, bytes_down = client_bytes(setup.costs, slots, personal_gate=personal)
    seconds = client_seconds(
        jax.tree.map(lambda leaf: leaf[cohort], devices),
        setup.device_costs,
        slots,
        jnp.float32(sizes.local_steps * sizes.batch_size),
        personal_gate=personal,
    )
    held = after.held[cohort]
    finite = report.finite.sum()  # 0 gives NaN: a loss of 0 would look like success
    changed = jnp.where(held, jnp.abs(after.fitness - before.fitness)[cohort], 0.0)
    return {
        "train_loss": jnp.where(report.finite, report.loss, 0.0).sum() / finite,
        "train_accuracy": jnp.where(report.finite, report.accuracy, 0.0).sum() / finite,
        "expert_load": load,
        "load_cv": load_cv(load),
        "load_entropy": load_entropy(load),
        "starved_experts": starved(load),
        "bytes_up": bytes_up.sum(),
        "bytes_down": bytes_down.sum(),
        "nonfinite_clients": (~report.finite).sum(),
        "fitness_change": changed.sum() / held.sum(),
        "assignment_change": (held & ~before.held[cohort]).sum() / held.sum(),
        "simulated_seconds": seconds.max(),
        "simulated_median_seconds": jnp.median(seconds),
        "late_clients": (seconds > setup.rules.deadline).sum(),
    }
