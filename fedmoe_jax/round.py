"""One federated round as six pure steps, and a chunk of rounds as one program.

1 world    who is reachable
2 profile  capacity in experts
3 align    strategy: evidence -> held experts
4 train    client_update over the cohort
5 merge    masked per-expert mean, server optimiser
6 learn    fitness, usage
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedmoe_jax.align.fitness import init_fitness, score, update_fitness
from fedmoe_jax.align.solve import to_mask
from fedmoe_jax.align.usage import load_cv, load_entropy, starved, update_usage
from fedmoe_jax.client import ClientTask, build_client_update
from fedmoe_jax.cohort import Report, build_train_cohort
from fedmoe_jax.costs import Costs, client_bytes, client_seconds
from fedmoe_jax.merge import merge, server_optimizer
from fedmoe_jax.models import Model
from fedmoe_jax.profile import profile
from fedmoe_jax.types import (
    AlignState,
    Array,
    Assignment,
    Evidence,
    Federation,
    Hyper,
    PyTree,
    SimState,
    Sizes,
    Strategy,
)
from fedmoe_jax.world.availability import sample_cohort


class Rules(NamedTuple):
    """The static choices of a run beside its sizes; each names a pure function.

    Attributes:
      gate_mode: `global`, `holder_rows` or `personal`.
      merge_weight: `examples` or `routed`.
      feedback: `accuracy`, `loss` or `mixed`.
      client_optimizer: `sgd` or `adam`.
      momentum: of the local sgd, in [0, 1).
      server_optimizer: `sgd`, `momentum`, `adam`, `yogi` or `adagrad`.
      prior: fitness before any feedback.
      noise: spread of the initial fitness about the prior.
      deadline: seconds a round may take on a device.
      communication_share: share of the deadline for the network.
      client_chunk: clients vmapped at once on each device.
      chunk_rounds: R.
    """

    gate_mode: str
    merge_weight: str
    feedback: str
    client_optimizer: str
    momentum: float
    server_optimizer: str
    prior: float
    noise: float
    deadline: float
    communication_share: float
    client_chunk: int
    chunk_rounds: int


class Setup(NamedTuple):
    """Everything static that one compiled program is built from.

    Attributes:
      model: the model's pure functions.
      sizes: static sizes, after the strategy's resize.
      strategy: the strategy's record.
      rules: the static choices.
      costs: of the simulated model; these bytes are reported.
      device_costs: of the model that it stands for; these are what devices feel.
      mesh: the devices that run the simulation.
    """

    model: Model
    sizes: Sizes
    strategy: Strategy
    rules: Rules
    costs: Costs
    device_costs: Costs
    mesh: Mesh


def init_state(key: Array, hyper: Hyper, setup: Setup) -> SimState:
    """The state before the first round.

    Args:
      key: the seed's key; kept in the state.
      hyper: hyperparameters (the server optimiser's state may depend on them).
      setup: the static parts.
    """
    sizes, rules = setup.sizes, setup.rules
    shape = (sizes.num_clients, sizes.num_experts)
    params_key, fitness_key = jax.random.split(key)
    params = setup.model.init(params_key)
    tx = server_optimizer(rules.server_optimizer, hyper.server_learning_rate)
    personal_gate = {}
    if rules.gate_mode == "personal":
        personal_gate = jax.tree.map(
            lambda leaf: jnp.tile(leaf[None], (sizes.num_clients,) + (1,) * leaf.ndim),
            params["gate"],
        )
    align = AlignState(
        fitness=init_fitness(fitness_key, *shape, prior=rules.prior, noise=rules.noise),
        usage=jnp.zeros(sizes.num_experts),
        held=jnp.zeros(shape, bool),
        times_held=jnp.zeros(shape, jnp.int32),
    )
    return SimState(
        round=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        server_opt=tx.init(params),
        align=align,
        personal_gate=personal_gate,
    )


def believe_capacity(federation: Federation, hyper: Hyper, setup: Setup) -> Array:
    """Experts every client can hold, as the server believes: [N] int32 in [1, K]."""
    sizes = setup.sizes
    return profile(
        federation.devices,
        setup.device_costs,
        hyper,
        examples=jnp.float32(sizes.local_steps * sizes.batch_size),
        deadline=setup.rules.deadline,
        communication_share=setup.rules.communication_share,
        max_held=sizes.max_held,
    )


def gather_evidence(
    state: SimState, cohort: Array, capacity: Array, sizes: Sizes
) -> Evidence:
    """What a strategy sees of the cohort [C]; `capacity` is [N]."""
    examples = float(sizes.local_steps * sizes.batch_size)
    return Evidence(
        round=state.round,
        client=cohort,
        fitness=state.align.fitness[cohort],
        usage=state.align.usage,
        capacity=capacity[cohort],
        load=jnp.full(cohort.shape, examples),
    )


def make_tasks(
    state: SimState, cohort: Array, assignment: Assignment, gate_mode: str
) -> ClientTask:
    """What every cohort client is sent, with a leading C axis."""
    if gate_mode == "personal":
        gate = jax.tree.map(lambda leaf: leaf[cohort], state.personal_gate)
    else:
        gate = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[None], cohort.shape + leaf.shape),
            state.params["gate"],
        )
    return ClientTask(
        client=cohort,
        valid=jnp.ones(cohort.shape, bool),
        held=assignment.held,
        slot=assignment.slot,
        gate=gate,
    )


def count_load(report: Report, assignment: Assignment, num_experts: int) -> Array:
    """[E] float32 examples trained through each expert by updates that count."""
    counted = assignment.slot & report.finite[:, None]
    load = jnp.where(counted, report.feedback.load, 0.0)
    return jnp.zeros(num_experts).at[assignment.held].add(load)


def learn(
    align: AlignState,
    cohort: Array,
    assignment: Assignment,
    report: Report,
    load: Array,
    hyper: Hyper,
    feedback: str,
) -> AlignState:
    """Step 6: scores and usage learn from the round.

    Args:
      align: alignment state before the round.
      cohort: [C] int32 client ids.
      assignment: what they held.
      report: what they reported.
      load: [E] examples trained.
      hyper: rates.
      feedback: which feedback feeds the fitness.
    """
    mask = to_mask(assignment, align.usage.shape[0])
    counted = assignment.slot & report.finite[:, None] & (report.feedback.load > 0)
    return AlignState(
        fitness=update_fitness(
            align.fitness,
            cohort,
            assignment,
            score(feedback, report.feedback, hyper),
            counted,
            hyper,
        ),
        usage=update_usage(align.usage, load, hyper.usage_decay),
        held=align.held.at[cohort].set(mask),
        times_held=align.times_held.at[cohort].add(mask.astype(jnp.int32)),
    )


def measure(
    before: AlignState,
    after: AlignState,
    cohort: Array,
    assignment: Assignment,
    report: Report,
    load: Array,
    devices: PyTree,
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
    finite = jnp.maximum(report.finite.sum(), 1)
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


def build_round(
    setup: Setup,
) -> Callable[[SimState, Federation, Hyper], tuple[SimState, dict[str, Array]]]:
    """Builds `round_step(state, federation, hyper) -> (state, metrics)`."""
    sizes, rules = setup.sizes, setup.rules
    client_update = build_client_update(
        model=setup.model,
        sizes=sizes,
        optimizer=rules.client_optimizer,
        momentum=rules.momentum,
    )
    train_cohort = build_train_cohort(
        client_update,
        setup.mesh,
        client_chunk=rules.client_chunk,
        gate_mode=rules.gate_mode,
        weight=rules.merge_weight,
    )

    def round_step(
        state: SimState, federation: Federation, hyper: Hyper
    ) -> tuple[SimState, dict[str, Array]]:
        round_key = jax.random.fold_in(state.key, state.round)
        world_key, align_key, train_key = jax.random.split(round_key, 3)

        # 1 world
        cohort = sample_cohort(world_key, sizes.num_clients, sizes.cohort_size)
        # 2 profile
        capacity = believe_capacity(federation, hyper, setup)
        # 3 align
        evidence = gather_evidence(state, cohort, capacity, sizes)
        assignment = setup.strategy.assign(evidence, hyper, sizes, align_key)
        chex.assert_shape(
            [assignment.held, assignment.slot], (sizes.cohort_size, sizes.max_held)
        )
        # 4 train
        tasks = make_tasks(state, cohort, assignment, rules.gate_mode)
        sums, report = train_cohort(state.params, tasks, federation, hyper, train_key)
        # 5 merge
        tx = server_optimizer(rules.server_optimizer, hyper.server_learning_rate)
        params, server_opt = merge(state.params, state.server_opt, sums, tx)
        # 6 learn
        load = count_load(report, assignment, sizes.num_experts)
        align = learn(
            state.align, cohort, assignment, report, load, hyper, rules.feedback
        )

        personal_gate = jax.tree.map(
            lambda gates, new: gates.at[cohort].set(new),
            state.personal_gate,
            report.gate,
        )
        metrics = measure(
            state.align,
            align,
            cohort,
            assignment,
            report,
            load,
            federation.devices,
            setup,
        )
        new_state = SimState(
            round=state.round + 1,
            key=state.key,
            params=params,
            server_opt=server_opt,
            align=align,
            personal_gate=personal_gate,
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        return new_state, metrics

    return round_step


@functools.cache
def build_run_rounds(
    setup: Setup,
) -> Callable[[SimState, Federation, Hyper], tuple[SimState, dict[str, Array]]]:
    """Builds `run_rounds(state, federation, hyper) -> (state, metrics)`, R rounds.

    One jitted program; every metric gains a leading R axis. The state is donated, so
    the caller must rebind it. Equal setups share one program.
    """
    round_step = build_round(setup)

    @functools.partial(jax.jit, donate_argnums=0)
    def run_rounds(
        state: SimState, federation: Federation, hyper: Hyper
    ) -> tuple[SimState, dict[str, Array]]:
        return jax.lax.scan(
            lambda carry, _: round_step(carry, federation, hyper),
            state,
            length=setup.rules.chunk_rounds,
        )

    return run_rounds
