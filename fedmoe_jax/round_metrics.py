"""The metrics of one round, measured inside the compiled program."""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.usage import load_cv, load_entropy, starved
from fedmoe_jax.client import is_local
from fedmoe_jax.cohort import Report
from fedmoe_jax.costs import (
    FEEDBACK_NUMBERS,
    Traffic,
    Ways,
    client_bytes,
    client_flops,
    client_parameters,
    client_seconds,
)
from fedmoe_jax.dealing import chunk_size, wasted_share
from fedmoe_jax.rules import PARTS, Rules
from fedmoe_jax.setup import Setup
from fedmoe_jax.sharding import CLIENTS
from fedmoe_jax.types import AlignState, Array, Assignment, Evidence, Federation, Sizes


def find_ways(rules: Rules) -> Ways:
    """How the parts of a run's model travel."""
    return Ways(
        personal=PARTS if rules.silent else rules.personal,
        frozen=rules.frozen,
        copies=2 if rules.variates else 1,
    )


def count_traffic(
    evidence: Evidence,
    assignment: Assignment,
    report: Report,
    exchanged: tuple[Array, Array],
    sizes: Sizes,
    rules: Rules,
) -> Traffic:
    """What the cohort holds, trains, sends and receives.

    `exchanged` are the experts that each client sent to others and received from them.
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
        sent=talks * (report.sent + exchanged[0]),
        received=talks * (held - local + exchanged[1]),
        told=talks * told,
        shown=shown,
        new=(~evidence.held.any(1)).astype(jnp.float32),
    )


def measure(
    before: AlignState,
    after: AlignState,
    evidence: Evidence,
    assignment: Assignment,
    report: Report,
    exchanged: tuple[Array, Array],
    load: Array,
    federation: Federation,
    setup: Setup,
) -> dict[str, Array]:
    """The metrics of one round; means over clients are taken here, once.

    Scalars in the strategy's own memory are metrics too.
    """
    sizes, rules, cohort = setup.sizes, setup.rules, evidence.client
    examples, steps = evidence.load, federation.steps[cohort]
    traffic = count_traffic(evidence, assignment, report, exchanged, sizes, rules)
    ways = find_ways(rules)
    bytes_up, bytes_down = client_bytes(setup.costs, traffic, ways)
    flops = client_flops(setup.costs, traffic, ways, examples)
    num_devices = setup.mesh.shape[CLIENTS]
    chunk = chunk_size(sizes.cohort_size, num_devices, rules.client_chunk)
    devices = jax.tree.map(lambda leaf: leaf[cohort], federation.devices)
    seconds = client_seconds(devices, setup.device_costs, traffic, ways, examples)
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
        "client_flops": flops.sum(),
        "peak_client_parameters": client_parameters(setup.costs, traffic, ways).max(),
        "nonfinite_clients": (~report.finite).sum(),
        "fitness_change": changed.sum() / held.sum(),
        "assignment_change": (held & ~before.held[cohort]).sum() / held.sum(),
        "simulated_seconds": seconds.max(),
        "simulated_median_seconds": jnp.median(seconds),
        "examples": steps.sum() * sizes.batch_size,
        "wasted_share": wasted_share(steps, num_devices, chunk),
        "late_clients": (seconds > rules.deadline).sum(),
    } | {name: leaf for name, leaf in after.memory.items() if leaf.ndim == 0}
