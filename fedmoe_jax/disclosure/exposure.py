"""What a client's update says about its examples: losses that membership attacks read.

At the end of an observed run each client does one more local round from the final
state, as in `finetune`, and its update is looked at: the loss of every example that it
trains on (members) and of its own test examples (`partition.test_share`), which it
never does. Nothing is merged, and no state changes.

The one who looks knows the model that was sent, and of parts that stay with clients
what the server has. With `privacy.clip` the update is the
clipped one, with the noise of the whole sum: what is left where all other updates of
the round are known, which is the worst case that the guarantee is of. Members are all
examples that a client owns, those too that it only probes with.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedmoe_jax.aggregate import weigh
from fedmoe_jax.client import build_client_update
from fedmoe_jax.evaluation.finetune import gather_input
from fedmoe_jax.evaluation.gate_bias import bias_clients
from fedmoe_jax.evaluation.own_tests import read_batch
from fedmoe_jax.evaluation.panel import draw_sample
from fedmoe_jax.evaluation.scoring import evaluation_route, find_participants
from fedmoe_jax.evaluation.sources import choose_batch
from fedmoe_jax.models.submodel import take_submodel
from fedmoe_jax.positions import mean_loss
from fedmoe_jax.privacy.sums import SUMS, draw_noise
from fedmoe_jax.privacy.updates import clip_update, leave_out, weigh_alike
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.sharding import CLIENTS
from fedmoe_jax.types import (
    Array,
    ClientInput,
    ClientUpdate,
    Federation,
    Hyper,
    Lists,
    PyTree,
    SimState,
    make_keys,
)
from fedmoe_jax.world.step import View, observe


def show_update(
    update: ClientUpdate,
    inputs: ClientInput,
    size: Array,
    hyper: Hyper,
    key: Array,
    program: Program,
) -> PyTree:
    """ONE client's delta as whoever looks has it; zeros for what is not sent.

    Args:
      update: the client's result.
      inputs: of the client.
      size: [] int32, examples that it owns.
      hyper: gives the numbers of the defences.
      key: the client's key of the round, not consumed.
      program: the static parts.
    """
    private, strategy = program.static.privacy, program.strategy
    weights = weigh(inputs, update, size, hyper, strategy)
    weights = weigh_alike(weights, inputs, hyper, strategy)
    if private.clip:
        update = clip_update(update, inputs, weights, hyper)
    delta = leave_out(update.delta, weights)
    if private.noise:
        deviation = hyper.privacy.noise * hyper.privacy.clip
        noise = draw_noise(delta, deviation, jax.random.fold_in(key, SUMS))
        delta = optax.tree.add(delta, leave_out(noise, weights))
    return delta


def measure_losses(
    submodel: PyTree,
    inputs: ClientInput,
    federation: Federation,
    example: Array,
    program: Program,
) -> tuple[Array, Array]:
    """Losses of ONE client's sub-model on examples, and the experts that they go to.

    Args:
      submodel: with the parts that are frozen.
      inputs: of the client.
      federation: the data.
      example: [Q] int32, see `own_tests.read_batch`.
      program: the static parts.

    Returns:
      [Q] float32 nats, the mean over the positions of each example, and [Q] int32, the
      held expert of the largest gate mass in the first MoE layer.
    """
    block = min(choose_batch(program), len(example))
    rows = jnp.pad(example, (0, -len(example) % block)).reshape(-1, block)
    route = evaluation_route(program)._replace(bias=inputs.bias)
    slots = inputs.held, inputs.slot, route

    def measure(ids: Array) -> tuple[Array, Array]:
        batch = read_batch(federation, ids, inputs.distortion, program)
        outputs, routing = program.model.apply(
            submodel, federation.fixed, batch, *slots, None
        )
        loss = jax.vmap(mean_loss)(program.task.loss(outputs, batch))
        gates = routing.gates[0].reshape(block, -1, routing.gates.shape[-1])
        best = gates.sum(axis=1).argmax(axis=1)
        return loss, inputs.held[0][best]

    losses, experts = jax.lax.map(measure, rows)
    count = len(example)
    return losses.reshape(-1)[:count], experts.reshape(-1)[:count]


def expose_client(
    state: SimState,
    view: View,
    hyper: Hyper,
    bias: Array | None,
    client: Array,
    *,
    client_update: Callable[..., ClientUpdate],
    program: Program,
) -> dict[str, Array]:
    """The losses of ONE client's examples under its update of one more round.

    Returns:
      of members, [M] each: `member_example` int32, the number of each example, -1 of
      padding, `member_loss` float32 nats and `member_expert` int32, see
      `measure_losses`; and likewise, [M'] each, of the `other` ones.
    """
    federation, strategy = view.federation, program.strategy
    assert federation.own_test is not None
    inputs = gather_input(state, view, hyper, bias, client, program)
    key = jax.random.fold_in(make_keys(state.key, state.round).train, client)
    update = client_update(state.params, inputs, federation, hyper, key)
    # What stays with a client is as the server has it.
    sent = take_submodel(state.params, {}, inputs.held, strategy.local_experts)
    delta = show_update(update, inputs, federation.size[client], hyper, key, program)
    frozen = {part: federation.frozen[part] for part in strategy.frozen}
    shown, found = optax.tree.add(sent, delta) | frozen, {}
    owned = Lists(federation.index, federation.size)
    for name, lists in ("member", owned), ("other", federation.own_test):
        ids = lists.index[client]
        losses, experts = measure_losses(shown, inputs, federation, ids, program)
        counted = jnp.arange(len(ids)) < lists.size[client]
        found[f"{name}_example"] = jnp.where(counted, ids, -1)
        found |= {f"{name}_loss": losses, f"{name}_expert": experts}
    return found


def build_expose_share(
    program: Program,
) -> Callable[[SimState, Federation, Hyper], dict[str, Array]]:
    """Builds `expose_share(state, federation, hyper)`.

    It is written for one device and joins the devices of the mesh axis `clients`, which
    share out the clients: at most `evaluation.clients`, those that have taken part
    before others.

    Returns:
      A function whose result has the leaves of `expose_client` with a leading axis, and
      `exposed_client` and `served`: whose they are, and whether it has taken part.
    """
    strategy = program.strategy._replace(choose=None)
    client_update = build_client_update(program._replace(strategy=strategy))

    def expose_share(
        state: SimState, federation: Federation, hyper: Hyper
    ) -> dict[str, Array]:
        view = observe(state.world, federation, hyper, program.processes)
        bias = bias_clients(state, view, hyper, program)
        served = find_participants(state)
        count, most = len(served), program.static.evaluation.clients
        count = min(most, count) if most else count
        client = draw_sample(federation.sample_order, served, count)

        def expose(place: Array) -> dict[str, Array]:
            numbers = state, view, hyper, bias, client[place]
            static = {"client_update": client_update, "program": program}
            return expose_client(*numbers, **static)

        device, num_devices = jax.lax.axis_index(CLIENTS), jax.lax.axis_size(CLIENTS)
        each = -(-count // num_devices)
        place = device * each + jnp.arange(each)
        found = jax.lax.map(expose, jnp.minimum(place, count - 1))

        def join(share: Array) -> Array:
            empty = jnp.zeros((count, *share.shape[1:]), share.dtype)
            return jax.lax.psum(empty.at[place].set(share, mode="drop"), CLIENTS)

        own = {"exposed_client": client, "served": served[client]}
        return jax.tree.map(join, found) | own

    return expose_share
