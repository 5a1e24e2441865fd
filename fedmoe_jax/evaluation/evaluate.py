"""Global, personal and per-expert scores from passes over examples.

Devices share out the test examples and take them in batches; scores are summed by
stratum, so that each client is scored on its own mix of strata:

* global: top-A of all E experts; also softly over all E.
* personal: each client's held experts, the test set weighted to its own mix; also
  with the client's own label prior.
* expert: one expert alone.

A model with parts computes each expert's own outputs once, and each score is that of
one mixture of them (see `scoring`). The soft and expert scores need every expert of
every example. Without them only the pairs of example and expert that some gate
chooses are computed (see `dispatch`). A model without parts is run once for each
distinct held set, and has no soft and no expert scores (see `held_sets`). Of a large
population that shares no models a sample is scored (see `panel`).

Where the partition sets examples aside, validation examples are scored in a pass of the
same kind, those of unseen clients with the global model alone, or what a strategy
serves newcomers with, and clients' own test sets in `own_tests`.

Every client counts. Where the gate or more is personal the server has none, and those
count that have taken part; global then means the average over them of the score with
the client's own gate over all E experts.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from fedmoe_jax.base import Links
from fedmoe_jax.evaluation.equity import measure_equity
from fedmoe_jax.evaluation.gate_bias import bias_clients
from fedmoe_jax.evaluation.held_sets import score_model
from fedmoe_jax.evaluation.newcomers import (
    divide_pool,
    gather_newcomers,
    take_own,
    welcome_all,
)
from fedmoe_jax.evaluation.own_tests import score_own_tests
from fedmoe_jax.evaluation.panel import Panel, gather_panel, keep_server
from fedmoe_jax.evaluation.scoring import (
    Examples,
    divide_bits,
    join_frozen,
    score_parts,
    sum_strata,
)
from fedmoe_jax.evaluation.sources import (
    Source,
    choose_batch,
    read_examples,
    schedule_examples,
    take_pool,
    take_test,
)
from fedmoe_jax.groups import measure_information, mix_groups
from fedmoe_jax.links import draw_testing
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.sharding import CLIENTS, spread
from fedmoe_jax.types import Array, Federation, Hyper, Pool, SimState
from fedmoe_jax.world.step import View, observe

OWN = ("personal", "prior")  # counts with a row for each client


def average_clients(counts: dict[str, Array], counted: Array) -> dict[str, Array]:
    """Averages every count [n, ...] but the clients' own over those that count [n]."""
    share = counted / jnp.maximum(counted.sum(), 1.0)
    average = lambda name, count: (
        count if name in OWN else jnp.tensordot(share, count, 1)
    )
    return {name: average(name, count) for name, count in counts.items()}


def count_batch(
    state: SimState,
    view: View,
    panel: Panel,
    source: Source,
    position: Array,
    hyper: Hyper,
    *,
    program: Program,
) -> dict[str, Array]:
    """The scores of `count_examples`; where data drift, of drifted examples, too.

    These are `drifted` [V, L] of the global model, `drifted_personal`, `drifted_prior`.
    Where experts are behind links, those of `count_linked`, of examples as they are.
    """
    federation = view.federation
    num_strata = federation.label_mix.shape[1]

    def count(amount: Array | None, links: Links | None = None) -> dict[str, Array]:
        place = source, federation, position
        examples = read_examples(*place, amount, num_strata, program)
        examples = examples._replace(links=links)
        return count_examples(state, federation, panel, examples, program=program)

    counts = count(None)
    if view.links is not None and program.static.expert_links.kind != "none":
        links = draw_testing(state.key, view.links, position, hyper)
        counts |= count_linked(count(None, links))
    if view.distortion is None:
        return counts
    drifted = count(view.distortion.max())
    own = {f"drifted_{name}": drifted[name] for name in OWN if name in drifted}
    return counts | own | {"drifted": drifted["global"]}


def count_linked(found: dict[str, Array]) -> dict[str, Array]:
    """Scores of examples over links by their names, `linked_` in front.

    Of the `global` model, `personal` and `prior`, and the `delay` [1, L] of an answer.
    """
    names = "global", "delay", *OWN
    return {f"linked_{name}": found[name] for name in names if name in found}


def count_examples(
    state: SimState,
    federation: Federation,
    panel: Panel,
    examples: Examples,
    *,
    program: Program,
) -> dict[str, Array]:
    """All scores of one batch, by stratum.

    Args:
      state: the simulation.
      federation: has what is frozen.
      panel: the clients and models that are scored.
      examples: the batch.
      program: the model; its strategy says which parts are personal, whether all
        experts are computed, for `soft` and `expert` too, and how they are mixed.

    Returns:
      `total` [L] weights; `global`, `soft` [V, L], `expert` [E, V, L], `personal`
      [rows, V, L], `prior` [m, V, L] values times weights; `routed` [G, E, L] gates.
      `Panel.model` says which row of `personal` is whose, `Panel.priors` of `prior`;
      without `every_expert` they hold only for strata that the client has. Models
      without parts have no `soft` and no `expert`.
    """
    params = join_frozen(state, federation, program)
    models = panel.models
    if program.model.parts is None:
        own = params, federation.fixed
        counts = score_model(
            *own, models.view, panel.sets, panel.priors, examples, program
        )
    else:
        counts = score_parts(params, models, panel.priors, examples, program)
    if program.strategy.personal:
        counts = average_clients(counts, panel.counted)
    return counts | {"total": count_weights(examples, program)}


def count_unseen(
    state: SimState,
    federation: Federation,
    hyper: Hyper,
    pool: Pool,
    panel: Panel,
    program: Program,
) -> dict[str, Array]:
    """Weights `total` [U], scores `global` [V, U] of clients that never take part.

    These are of the model that would serve them: the server's, but where the strategy
    welcomes newcomers, see `newcomers`. Where parts are personal none would fit them.
    """
    num_clients, take = program.static.partition.unseen, lambda counts, _: counts
    if program.strategy.welcome is None or program.strategy.personal:
        panel = keep_server(panel, num_clients, program)
    else:
        asked, pool = divide_pool(pool, num_clients)
        held = welcome_all(state, federation, asked, hyper, program)
        panel, take = gather_newcomers(panel, held, program), take_own
    source = take_pool(federation, pool)

    def count(position: Array) -> dict[str, Array]:
        place = source, federation, position
        examples = read_examples(*place, None, num_clients, program)
        found = count_examples(state, federation, panel, examples, program=program)
        counts = take(found, panel)
        return {name: counts[name] for name in ("total", "global")}

    return sum_batches(count, len(source.group), choose_batch(program))


def count_weights(examples: Examples, program: Program) -> Array:
    """Weights of all positions in each stratum, summed: [L]. Outputs play no part."""
    shape = lambda leaf: (len(examples.real), *leaf.shape[1:])
    blank = jax.tree.map(lambda x: jnp.zeros(shape(x), x.dtype), program.outputs)
    scores = program.task.loss(blank, examples.batch)
    return sum_strata(jnp.ones_like(scores.score), scores, examples.stratum)


def mean_counted(accuracy: Array, counted: Array) -> Array:
    """Mean of the counted clients' accuracies; arguments as of `worst_decile`."""
    return jnp.where(counted, accuracy, 0.0).sum() / jnp.maximum(counted.sum(), 1)


def worst_decile(accuracy: Array, counted: Array) -> Array:
    """Mean of the worst tenth (rounded up) of the counted clients' accuracies.

    Args:
      accuracy: [N] float32.
      counted: [N] bool.

    Returns:
      [] float32, 0 when no client counts.
    """
    number = jnp.ceil(0.1 * counted.sum())
    ordered = jnp.sort(jnp.where(counted, accuracy, jnp.inf))
    worst = jnp.where(jnp.arange(accuracy.shape[0]) < number, ordered, 0.0)
    return worst.sum() / jnp.maximum(number, 1)


def mean_values(name: str, values: Array, counted: Array) -> dict[str, Array]:
    """The means of clients' values, and of the worst tenth of those that count.

    Args:
      name: `{name}_accuracy` and `{name}_bits` are the means, if there are bits; the
        others are `worst_decile` and the name without `personal`.
      values: [n, 1 or 2].
      counted: [n] bool.
    """
    worst = f"worst_decile_{name}".replace("_personal", "")
    accuracy, *bits = values.T
    found = {
        f"{name}_accuracy": mean_counted(accuracy, counted),
        f"{worst}_accuracy": worst_decile(accuracy, counted),
    }
    for each in bits:
        found[f"{name}_bits"] = mean_counted(each, counted)
        found[f"{worst}_bits"] = -worst_decile(-each, counted)
    return found


def name_values(name: str, values: Array) -> dict[str, Array]:
    """`{name}_accuracy` and, if there are bits, `{name}_bits`, of values [1 or 2]."""
    kinds = ("accuracy", "bits")[: len(values)]
    return {f"{name}_{kind}": values[i] for i, kind in enumerate(kinds)}


def measure_linked(counts: dict[str, Array], panel: Panel) -> dict[str, Array]:
    """The accuracies over links, and the time of an answer; {} without links.

    Arguments as in `measure_means`; images are as they are, also where they drift.
    """
    if "linked_global" not in counts:
        return {}
    own = {name: counts[f"linked_{name}"] for name in OWN if f"linked_{name}" in counts}
    linked = counts | own | {"global": counts["linked_global"]}
    found = measure_means(linked, panel._replace(drifts=None))
    names = "global_accuracy", "personal_accuracy", "personal_prior_accuracy"
    names += "global_bits", "personal_bits"
    delay = counts["linked_delay"].sum() / counts["total"].sum()
    return {f"linked_{n}": found[n] for n in names if n in found} | {
        "linked_delay": delay
    }


def find_personal(counts: dict[str, Array], panel: Panel) -> Array:
    """Every scored client's own counts [n, V, L], of the examples as it sees them."""
    personal = counts["personal"][panel.model]
    if panel.drifts is None:
        return personal
    drifted = counts["drifted_personal"][panel.model]
    return jnp.where(panel.drifts[:, None, None], drifted, personal)


def measure_priors(counts: dict[str, Array], panel: Panel) -> dict[str, Array]:
    """Personal accuracies with the clients' own label priors, of those that have one.

    Arguments as in `summarise_counts`.
    """
    if panel.priors is None:
        return {}
    rows, client = counts["prior"], panel.priors.row
    if panel.drifts is not None:
        drifts = panel.drifts[client][:, None, None]
        rows = jnp.where(drifts, counts["drifted_prior"], rows)
    share = panel.label_mix / jnp.maximum(counts["total"], 1.0)[None]
    values = divide_bits((rows * share[client][:, None]).sum(2))
    counted = jnp.broadcast_to(panel.counted, len(panel.label_mix))[client]
    return mean_values("personal_prior", values, counted)


def place_clients(accuracy: Array, panel: Panel, num_clients: int) -> Array:
    """Accuracies [n] of the clients that are scored among all [N], NaN of others."""
    if panel.client is None:
        return accuracy
    return jnp.full(num_clients, jnp.nan).at[panel.client].set(accuracy)


def measure_clients(counts: dict[str, Array], panel: Panel) -> Array:
    """Accuracy and bits [n, 1 or 2] of every client on its own mix.

    Arguments as in `measure_means`.
    """
    share = 1.0 / jnp.maximum(counts["total"], 1.0)
    personal = find_personal(counts, panel) * share[None, None]
    return divide_bits((personal * panel.label_mix[:, None]).sum(2))


def measure_means(counts: dict[str, Array], panel: Panel) -> dict[str, Array]:
    """The global values, and the means over clients that count.

    Args:
      counts: see `count_batch`.
      panel: the clients that are scored; of pooled data it has one, and the label mix
        of every client.
    """
    values = measure_clients(counts, panel)
    counted = jnp.broadcast_to(panel.counted, len(values))
    server = divide_bits(counts["global"].sum(1) / counts["total"].sum())
    return {
        **name_values("global", server),
        **mean_values("personal", values, counted),
        "clients_counted": counted.sum(),
        **measure_priors(counts, panel),
    }


def average_strata(values: Array, label_mix: Array, counted: Array) -> Array:
    """The mean of clients' values in each stratum, weighted by their mixes: [V, L].

    Args:
      values: [n, V, L], or [1, V, L] of one model that serves all.
      label_mix: [n, L].
      counted: [n] bool; others are left out.

    Returns:
      NaN in a stratum that no client has.
    """
    mix = jnp.where(counted[:, None], label_mix, 0.0)
    total = mix.sum(axis=0)[None]
    weight = mix[:, None]
    # A model that has diverged says nothing about strata that its client does not have.
    own = jnp.where(weight > 0, values * weight, 0.0)
    mean = own.sum(axis=0) / jnp.maximum(total, 1e-9)
    return jnp.where(total > 0, mean, jnp.nan)


def measure_strata(counts: dict[str, Array], panel: Panel) -> dict[str, Array]:
    """Global and personal values of each stratum, NaN without an example or a client.

    Arguments as in `measure_means`.
    """
    share = jnp.where(counts["total"] > 0, 1.0 / counts["total"], jnp.nan)
    counted = jnp.broadcast_to(panel.counted, len(panel.label_mix))
    own = find_personal(counts, panel) * share[None, None]
    own = average_strata(own, panel.label_mix, counted)
    return {
        **name_values("stratum", divide_bits((counts["global"] * share[None]).T).T),
        **name_values("personal_stratum", divide_bits(own.T).T),
    }


def leave_out_untested(counts: dict[str, Array], panel: Panel) -> Panel:
    """The panel with label mixes of strata that have examples in these counts alone."""
    tested = counts["total"] > 0
    mix = jnp.where(tested[None], panel.label_mix, 0.0)
    mix /= jnp.maximum(mix.sum(axis=1, keepdims=True), 1e-9)
    # As they are where nothing is left out, to the last bit.
    return panel._replace(label_mix=jnp.where(tested.all(), panel.label_mix, mix))


def summarise_counts(
    counts: dict[str, Array], panel: Panel, num_clients: int
) -> dict[str, Array]:
    """Accuracies in [0, 1] from counts over the whole test set.

    Args:
      counts: see `count_batch`.
      panel: as in `measure_means`.
      num_clients: N.
    """
    panel, total = leave_out_untested(counts, panel), counts["total"]  # [L]
    share = 1.0 / jnp.maximum(total, 1.0)
    values = measure_clients(counts, panel)
    accuracies = measure_means(counts, panel) | measure_strata(counts, panel)
    accuracies |= {
        "client_accuracy": place_clients(values[:, 0], panel, num_clients),
        "specialisation": counts["routed"] * share[None, None],
    }
    if values.shape[1] > 1:
        accuracies["client_bits"] = place_clients(values[:, 1], panel, num_clients)
    accuracies |= measure_linked(counts, panel)
    if "drifted" in counts:
        accuracies["drifted_accuracy"] = counts["drifted"][0].sum() / total.sum()
    if "soft" in counts:
        accuracies["global_soft_accuracy"] = counts["soft"][0].sum() / total.sum()
        accuracies["expert_accuracy"] = counts["expert"][:, 0].sum(1) / total.sum()
    return accuracies


def measure_groups(
    state: SimState, federation: Federation, num_groups: int
) -> dict[str, Array]:
    """How far experts are assigned by groups; who owns pooled data holds for all.

    Of several layers the information of each, too, [G].
    """
    held, mix = state.align.held, mix_groups(federation.label_mix, num_groups)
    held = jnp.broadcast_to(held, (len(mix), *held.shape[1:]))
    found = {"expert_group_information": measure_information(held, mix)}
    if held.shape[1] > 1:
        of_layer = lambda held: measure_information(held[:, None], mix)
        found["layer_group_information"] = jax.vmap(of_layer, in_axes=1)(held)
    return found


def summarise_validation(counts: dict[str, Array], panel: Panel) -> dict[str, Array]:
    """The values to tune by, of counts over the validation examples.

    Strata without an example do not count in a client's mix.
    """
    found = measure_means(counts, leave_out_untested(counts, panel))
    names = "global_accuracy", "personal_accuracy", "personal_prior_accuracy"
    names += "global_bits", "personal_bits"
    return {f"validation_{name}": found[name] for name in names if name in found}


def summarise_unseen(counts: dict[str, Array]) -> dict[str, Array]:
    """The accuracies of clients [U] that never take part."""
    values = counts["global"] / jnp.maximum(counts["total"], 1.0)[None]
    return mean_values("unseen", divide_bits(values.T), counts["total"] > 0)


def summarise_own_tests(counts: dict[str, Array], counted: Array) -> dict[str, Array]:
    """The accuracies of clients [n] on their own test sets, of those that have one."""
    values = counts["right"] / jnp.maximum(counts["total"], 1.0)[None]
    counted &= counts["total"] > 0
    found = mean_values("own_test", divide_bits(values.T), counted)
    return found | {"own_test_clients": counted.sum()}


def sum_batches(
    count: Callable[[Array], dict[str, Array]], num_examples: int, most: int
) -> dict[str, Array]:
    """The counts of a whole pass, summed over batches and devices.

    Args:
      count: positions [B] of one batch -> its counts.
      num_examples: Q, of the pass.
      most: the largest batch allowed.
    """
    device, num_devices = jax.lax.axis_index(CLIENTS), jax.lax.axis_size(CLIENTS)
    position = schedule_examples(num_examples, most, device, num_devices)

    def add(total: dict[str, Array], batch: Array) -> tuple[dict[str, Array], None]:
        return jax.tree.map(jnp.add, total, count(batch)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(count, position[0]))
    return jax.lax.psum(jax.lax.scan(add, zero, position)[0], CLIENTS)


def build_evaluate_share(
    program: Program,
) -> Callable[[SimState, Federation, Hyper], dict[str, Array]]:
    """Builds `evaluate_share(state, federation, hyper) -> accuracies`, to be spread.

    It is written for one device: it counts its share of the examples and joins the
    devices of the mesh axis `clients`. The result is the same on all of them.

    Args:
      program: as in `count_examples`; with `every_expert` there are also
        `global_soft_accuracy` and `expert_accuracy`.

    Returns:
      A function whose result holds `global_accuracy`, `personal_accuracy`,
      `worst_decile_accuracy` (all []), `clients_counted` [] int32, those of which these
      are the mean, `client_accuracy` [N], NaN beyond a sample, and
      `specialisation` [G, E, L] (the share of each class's gate mass per expert),
      `stratum_accuracy` and `personal_stratum_accuracy` [L], see `measure_strata`;
      where experts are behind links what `measure_linked` has;
      where images drift `drifted_accuracy` [], the global one on drifted images; where
      the task has a place for priors `personal_prior_accuracy` and
      `worst_decile_prior_accuracy` []; with `every_expert` also `global_soft_accuracy`
      [] and `expert_accuracy` [E]; where the task has bits `global_bits`,
      `personal_bits`, `worst_decile_bits`, `client_bits`, `stratum_bits` and
      `personal_stratum_bits`, likewise; where there are groups
      `expert_group_information` [], see `groups.measure_information`, and of several
      layers `layer_group_information` [G]; how evenly clients are served, see
      `equity.measure_equity`; and, where the federation has such examples, those of
      `summarise_own_tests`, `summarise_validation` and `summarise_unseen`.
    """
    # Jitted, so that its shapes and the loop over batches share one trace.
    one_batch = jax.jit(functools.partial(count_batch, program=program), inline=True)
    sizes = program.sizes

    def evaluate_share(
        state: SimState, federation: Federation, hyper: Hyper
    ) -> dict[str, Array]:
        shape = sizes.num_clients, sizes.num_layers, sizes.num_experts
        chex.assert_shape(state.align.held, shape)
        view = observe(state.world, federation, hyper, program.processes)
        federation = view.federation
        bias = bias_clients(state, view, hyper, program)
        panel = gather_panel(state, view, bias, program)
        count_all = lambda source: sum_batches(
            lambda position: one_batch(state, view, panel, source, position, hyper),
            len(source.group),
            choose_batch(program),
        )
        counts = count_all(take_test(federation))
        accuracies = summarise_counts(counts, panel, sizes.num_clients)
        own = accuracies["client_accuracy"]
        accuracies |= measure_equity(state, federation, own, program)
        if sizes.num_groups > 1:
            accuracies |= measure_groups(state, federation, sizes.num_groups)
        if federation.validation is not None:
            counts = count_all(take_pool(federation, federation.validation))
            accuracies |= summarise_validation(counts, panel)
        if federation.unseen is not None:
            pool = federation.unseen
            counts = count_unseen(state, federation, hyper, pool, panel, program)
            accuracies |= summarise_unseen(counts)
        if federation.own_test is not None:
            own = bias, federation.own_test, panel
            counts, counted = score_own_tests(state, view, *own, program)
            accuracies |= summarise_own_tests(counts, counted)
        return accuracies

    return evaluate_share


@functools.cache
def build_evaluate(
    program: Program,
) -> Callable[[SimState, Federation, Hyper], dict[str, Array]]:
    """Compiles `build_evaluate_share` for one run on all devices of the mesh."""
    return jax.jit(spread(build_evaluate_share(program), program.mesh))
