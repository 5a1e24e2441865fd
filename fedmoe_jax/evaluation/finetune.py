"""Personal accuracy after one more local round, of a sample of the clients.

Each client trains from its current model as in a round, on what it holds, and keeps the
result: nothing is merged, and no state changes. A client that never got through holds
nothing, and has the accuracy that it has without.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedmoe_jax.client import build_client_update
from fedmoe_jax.evaluation.evaluate import (
    average_strata,
    count_weights,
    mean_values,
    name_values,
)
from fedmoe_jax.evaluation.gate_bias import bias_clients
from fedmoe_jax.evaluation.held_sets import run_model
from fedmoe_jax.evaluation.panel import choose_rows, gather_panel
from fedmoe_jax.evaluation.scoring import (
    divide_bits,
    find_participants,
    keep_wanted,
    sum_scores,
)
from fedmoe_jax.evaluation.sources import (
    choose_batch,
    read_examples,
    schedule_examples,
    take_test,
)
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.options import replace
from fedmoe_jax.probe import find_hold_key
from fedmoe_jax.program import Program
from fedmoe_jax.prune import prune_held, spread_room
from fedmoe_jax.pruning.units import multiply_parts
from fedmoe_jax.runtime.sharding import CLIENTS
from fedmoe_jax.types import (
    Array,
    ClientInput,
    ClientUpdate,
    Federation,
    Hyper,
    PyTree,
    SimState,
    make_keys,
)
from fedmoe_jax.world.step import View, observe


def gather_input(
    state: SimState,
    view: View,
    hyper: Hyper,
    bias: Array | None,
    client: Array,
    program: Program,
) -> ClientInput:
    """The input of ONE client that trains what it holds; at least one expert.

    `bias` [N, G, E] is of all clients' gate logits, None for none. Where pruning is on,
    the client has the units that it would be sent now.
    """
    take = lambda leaf: leaf[client]
    mask = state.align.held[client]
    mask = mask.at[:, 0].max(~mask.any(axis=1))
    held = jnp.argsort(~mask, axis=1, stable=True)[:, : program.sizes.max_held]
    if bias is not None:
        bias = jnp.take_along_axis(bias[client], held, axis=1)
    slot, masks = jnp.take_along_axis(mask, held, axis=1), None
    budget = state.belief.capacity[client]
    if program.units:
        masks = prune_held(state, client, held, slot, hyper, program)
        room = state.belief.room[client]
        budget = spread_room(room, state.round, hyper, program.sizes)
    return ClientInput(
        client=client,
        steps=view.federation.steps[client],
        budget=budget,
        scale=jnp.ones(()),
        held=held.astype(jnp.int32),
        slot=slot,
        calibration=jnp.ones(program.sizes.num_layers),
        correction={},
        personal=jax.tree.map(take, state.personal),
        distortion=jax.tree.map(take, view.distortion),
        hold_key=find_hold_key(state.key, client) if program.static.probes else None,
        bias=bias,
        masks=masks,
        links=view.links if program.static.expert_links.kind != "none" else None,
    )


def score_tuned(
    submodel: PyTree,
    inputs: ClientInput,
    federation: Federation,
    mix: Array,
    program: Program,
) -> tuple[Array, Array]:
    """Values of ONE client's sub-model on the test set.

    Returns:
      Accuracy and bits [1 or 2], weighted to its mix [L], and means [V, L] in each
      stratum, NaN without an example; they hold only for strata that it has.
    """
    source = take_test(federation)
    num_strata = len(mix)
    most = choose_batch(program)
    position = schedule_examples(len(source.group), most, jnp.int32(0), 1)

    def count(batch: Array) -> tuple[Array, Array]:
        place = source, federation, batch
        examples = read_examples(*place, inputs.distortion, num_strata, program)

        def score() -> Array:
            slots = inputs.held, inputs.slot, inputs.bias
            own = submodel, federation.fixed, *slots
            outputs, _ = run_model(*own, examples, program)
            return sum_scores(outputs, examples, program)

        right = keep_wanted(score, examples, (mix > 0).astype(jnp.float32))
        return right, count_weights(examples, program)

    def add(totals: tuple, batch: Array) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, totals, count(batch)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(count, position[0]))
    (right, total), _ = jax.lax.scan(add, zero, position)
    tested = jnp.where(total > 0, mix, 0.0)
    left = tested / jnp.maximum(tested.sum(), 1e-9)
    mix = jnp.where((total > 0).all(), mix, left)
    values = right / jnp.maximum(total, 1.0)[None]
    strata = jnp.where(total[None] > 0, values, jnp.nan)
    return divide_bits((values * mix[None]).sum(axis=1)), strata


def finetune_client(
    state: SimState,
    view: View,
    hyper: Hyper,
    bias: Array | None,
    client: Array,
    mix: Array,
    *,
    client_update: Callable[..., ClientUpdate],
    program: Program,
) -> tuple[Array, Array, Array | None]:
    """Values of ONE client after the local round that it would train now.

    Returns:
      As of `score_tuned`, and the values of its pruned sub-model before that round,
      None where nothing is pruned.
    """
    federation, strategy = view.federation, program.strategy
    inputs = gather_input(state, view, hyper, bias, client, program)
    key = jax.random.fold_in(make_keys(state.key, state.round).train, client)
    update = client_update(state.params, inputs, federation, hyper, key)
    received = take_submodel(
        state.params, inputs.personal, inputs.held, strategy.local_experts
    )
    frozen = {part: federation.frozen[part] for part in strategy.frozen}

    def score(delta: PyTree) -> tuple[Array, Array]:
        own = multiply_parts(optax.tree.add(received, delta), update.keep)
        return score_tuned(own | frozen, inputs, federation, mix, program)

    before = None
    if update.keep:
        before, _ = score(jax.tree.map(jnp.zeros_like, update.delta))
    return *score(update.delta), before


def build_finetune_share(
    program: Program,
) -> Callable[[SimState, Federation, Hyper, Array], dict[str, Array]]:
    """Builds `finetune_share(state, federation, hyper, client_values)`.

    It is written for one device and joins the devices of the mesh axis `clients`, which
    share out the clients. Clients that choose what they train keep what they have.

    Returns:
      A function whose result holds `personal_finetuned_accuracy` and
      `worst_decile_finetuned_accuracy` [] and `finetuned_stratum_accuracy` [L], of at
      most `evaluation.clients` clients, in strata of those that hold experts, and their
      bits where the task has such. `client_values` [1 or 2, N] are those of `evaluate`.
      Where experts are pruned also the means `personal_submodel_accuracy` of what
      clients have before that round.
    """
    strategy = program.strategy._replace(choose=None)
    client_update = build_client_update(program._replace(strategy=strategy))

    def finetune_share(
        state: SimState, federation: Federation, hyper: Hyper, client_values: Array
    ) -> dict[str, Array]:
        view = observe(state.world, federation, hyper, program.processes)
        bias = bias_clients(state, view, hyper, program)
        panel = gather_panel(state, view, bias, program)
        row = choose_rows(view.federation, panel.label_mix, panel.counted, program)
        client = row if panel.client is None else panel.client[row]
        rate, usual = hyper.evaluation.finetune_rate, hyper.client.learning_rate
        own = replace(hyper, client={"learning_rate": jnp.where(rate > 0, rate, usual)})

        def score(place: Array) -> tuple[Array, Array, Array | None]:
            return finetune_client(
                *(state, view, own, bias, client[place]),
                panel.label_mix[row[place]],
                client_update=client_update,
                program=program,
            )

        device, num_devices = jax.lax.axis_index(CLIENTS), jax.lax.axis_size(CLIENTS)
        most = -(-len(client) // num_devices)
        place = device * most + jnp.arange(most)
        found = jax.lax.map(score, jnp.minimum(place, len(client) - 1))

        def join(share: Array) -> Array:
            empty = jnp.zeros((len(client), *share.shape[1:]))
            return jax.lax.psum(empty.at[place].set(share, mode="drop"), CLIENTS)

        values, by_stratum, pruned = jax.tree.map(join, found)
        served, as_before = find_participants(state)[client], client_values[:, client].T
        serve = lambda values: jnp.where(served[:, None], values, as_before)
        values = serve(values)
        mix, counted = panel.label_mix[row], panel.counted[row]
        strata = average_strata(by_stratum, mix, counted & served)
        means = mean_values("personal_finetuned", values, counted)
        if pruned is not None:
            means |= mean_values("personal_submodel", serve(pruned), counted)
        return means | name_values("finetuned_stratum", divide_bits(strata.T).T)

    return finetune_share
