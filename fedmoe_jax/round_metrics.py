"""The metrics of one round, measured inside the compiled program."""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.usage import load_cv, load_entropy, starved
from fedmoe_jax.cohort import Report
from fedmoe_jax.costs import client_bytes, client_seconds
from fedmoe_jax.dealing import chunk_size, wasted_share
from fedmoe_jax.setup import Setup
from fedmoe_jax.sharding import CLIENTS
from fedmoe_jax.types import AlignState, Array, Assignment, Federation


def measure(
    before: AlignState,
    after: AlignState,
    cohort: Array,
    assignment: Assignment,
    report: Report,
    load: Array,
    federation: Federation,
    setup: Setup,
) -> dict[str, Array]:
    """The metrics of one round; means over clients are taken here, once."""
    sizes, personal = setup.sizes, setup.rules.gate_mode == "personal"
    slots = assignment.slot.sum(1)
    bytes_up, bytes_down = client_bytes(setup.costs, slots, personal_gate=personal)
    steps = federation.steps[cohort]
    num_devices = setup.mesh.shape[CLIENTS]
    chunk = chunk_size(sizes.cohort_size, num_devices, setup.rules.client_chunk)
    seconds = client_seconds(
        jax.tree.map(lambda leaf: leaf[cohort], federation.devices),
        setup.device_costs,
        slots,
        (steps * sizes.batch_size).astype(jnp.float32),
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
        "examples": steps.sum() * sizes.batch_size,
        "wasted_share": wasted_share(steps, num_devices, chunk),
        "late_clients": (seconds > setup.rules.deadline).sum(),
    }
