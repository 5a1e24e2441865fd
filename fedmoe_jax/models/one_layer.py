"""A model with one MoE layer, from its parts: stem, gate, experts and head."""

import jax
import jax.numpy as jnp
from jax import lax

from fedmoe_jax.base import GATE_STEM, SHARED, Links, Parts, Route, Routing
from fedmoe_jax.models import routing
from fedmoe_jax.models.links import receive
from fedmoe_jax.types import Array, PyTree

SHARED_KEY = 2**31  # folded into keys that are also split for E experts


def split_rows(experts: PyTree) -> list[PyTree]:
    """Each expert's params, from those with a leading axis of n experts.

    The gradient of a split joins the rows once; that of an index adds a padded row for
    every expert.
    """
    leaves, structure = jax.tree.flatten(experts)
    rows = [lax.split(leaf, (1,) * leaf.shape[0]) for leaf in leaves]
    take = lambda row: structure.unflatten([leaf[0] for leaf in row])
    return [take(row) for row in zip(*rows, strict=True)]


def apply_experts(
    parts: Parts, experts: PyTree, features: Array, key: Array | None
) -> Array:
    """Runs several experts on the same features.

    Args:
      parts: of the model.
      experts: params with a leading axis of n experts.
      features: [B, ...] float.
      key: of dropout, or None for none.

    Returns:
      outputs [B, n, O].
    """
    count = jax.tree.leaves(experts)[0].shape[0]
    keys = None if key is None else jax.random.split(key, count)
    if parts.platform != "cpu":
        axes = (0, None, None if keys is None else 0)
        return jax.vmap(parts.expert, axes, out_axes=1)(experts, features, keys)
    # On CPU a loop is faster: vmapping batches small products and groups convolutions.
    outputs = []
    for i, row in enumerate(split_rows(experts)):
        outputs.append(parts.expert(row, features, None if keys is None else keys[i]))
    return jnp.stack(outputs, axis=1)


def apply_linked(
    parts: Parts,
    experts: PyTree,
    features: Array,
    key: Array | None,
    expert: Array,
    links: Links,
) -> Array:
    """As `apply_experts`, on features that each expert receives over its link.

    Args:
      parts: of the model.
      experts: params with a leading axis of n experts.
      features: [B, ...] float, as they are sent.
      key: of dropout, or None for none.
      expert: [n] int32, the experts' numbers.
      links: to all E experts.

    Returns:
      outputs [B, n, O].
    """
    keys = None if key is None else jax.random.split(key, len(expert))

    def run(row: PyTree, number: Array, key: Array | None) -> Array:
        return parts.expert(row, receive(features, links, number), key)

    if parts.platform != "cpu":
        axes = (0, 0, None if keys is None else 0)
        return jax.vmap(run, axes, out_axes=1)(experts, expert, keys)
    rows = split_rows(experts)
    own = [None] * len(rows) if keys is None else keys
    outputs = [run(row, expert[i], own[i]) for i, row in enumerate(rows)]
    return jnp.stack(outputs, axis=1)


def run_shared(
    parts: Parts, stem: PyTree, features: Array, key: Array | None
) -> Array | None:
    """Outputs [B, O] of the shared expert, None of a model without one.

    Args:
      parts: of the model.
      stem: params, with those of the shared expert.
      features: [B, ...] float, of the stem.
      key: of the experts' dropout, or None for none.
    """
    if parts.shared is None:
        return None
    own = None if key is None else jax.random.fold_in(key, SHARED_KEY)
    return parts.shared(stem[SHARED], features, own)


def add_shared(outputs: Array, shared: Array | None) -> Array:
    """Every expert's outputs [B, n, O] with those of the shared one, [B, O] or None."""
    return outputs if shared is None else outputs + shared[:, None]


def take_gate_stem(parts: Parts | None, stem: PyTree) -> PyTree:
    """A stem as a gate alone needs it: without the shared expert."""
    if parts is None or parts.shared is None:
        return stem
    return {name: tree for name, tree in stem.items() if name != SHARED}


def show_gate(parts: Parts, params: PyTree, batch: PyTree, features: Array) -> Array:
    """Features [B, ...] that the gate reads.

    Args:
      parts: of the model.
      params: may have a `gate_stem`, see `Strategy.frozen`, whose features the gate
        reads.
      batch: of the task, leaves [B, ...].
      features: [B, ...] float, of the stem.
    """
    if GATE_STEM not in params:
        return features
    return parts.stem(params[GATE_STEM], batch, None)


def choose_trained(gates: Array, slot: Array, route: Route) -> Array | None:
    """[K] bool, the `budget` slots of highest priority; None where all are trained.

    Args:
      gates: [B, K] float.
      slot: [K] bool.
      route: may have `priority`, and then `budget`.
    """
    if route.priority is None:
        return None
    assert route.budget is not None
    value = jax.lax.stop_gradient(route.priority(gates))
    rank = jnp.argsort(jnp.argsort(jnp.where(slot, -value, jnp.inf)))
    return rank < route.budget


def freeze_others(outputs: Array, trained: Array) -> Array:
    """Experts' outputs [B, K, O]; gradients pass those that are `trained` [K]."""
    chosen = trained[None, :, None]
    return jnp.where(chosen, outputs, jax.lax.stop_gradient(outputs))


def mix_outputs(
    parts: Parts, head: PyTree, outputs: Array, gates: Array, shared: Array | None
) -> Array:
    """Logits [B, L] of the mixture of the experts' outputs [B, K, O].

    Those of the shared one, [B, O] or None, are added to it, see `Parts`.
    """
    mixed = jnp.einsum("bk,bko->bo", gates.astype(outputs.dtype), outputs)
    return parts.head(head, mixed if shared is None else mixed + shared)


def mix_probabilities(
    parts: Parts, head: PyTree, outputs: Array, gates: Array, shared: Array | None
) -> Array:
    """Logits [B, L] of the mixture of the experts' own class probabilities.

    Each answers with the shared one, see `Parts`; arguments as in `mix_outputs`.
    """
    logits = parts.head(head, add_shared(outputs, shared)).astype(jnp.float32)
    answers = jax.nn.softmax(logits)  # [B, K, L]
    return log_probabilities(jnp.einsum("bk,bkl->bl", gates, answers))


def log_probabilities(probabilities: Array) -> Array:
    """Logits of class probabilities, finite where one is 0."""
    return jnp.log(jnp.maximum(probabilities, 1e-12))


def apply_parts(
    params: PyTree,
    frozen: PyTree,
    batch: PyTree,
    held: Array,
    slot: Array,
    route: Route,
    key: Array | None,
    *,
    parts: Parts,
    num_experts: int,
) -> tuple[Array, Routing]:
    """`Model.apply` of a model with one MoE layer from its parts.

    A model with one expert has nothing to route: its gates are 1.
    """
    stem_key, expert_key = (None, None) if key is None else jax.random.split(key)
    features = parts.stem(params["stem"], batch, stem_key)
    (gate,), (experts,) = params["gate"].values(), params["experts"].values()
    logits, gates = None, jnp.ones((features.shape[0], 1))
    if num_experts > 1:
        seen = show_gate(parts, params, batch, features)
        logits = routing.gate_logits(gate, seen, route.links)  # [B, E]
        allowed = logits[:, held[0]], slot[0]
        gates = routing.make_gates(*allowed, route.of_layer(0))  # [B, K]
    run = parts, experts, features, expert_key
    if route.links is None:
        outputs = apply_experts(*run)
    else:
        outputs = apply_linked(*run, held[0], route.links)
    trained = choose_trained(gates, slot[0], route)
    if trained is not None:
        outputs = freeze_others(outputs, trained)
    shared = run_shared(parts, params["stem"], features, expert_key)
    mix = mix_probabilities if route.mix == "probabilities" else mix_outputs
    predictions = mix(parts, params["head"], outputs, gates, shared)
    one_layer = lambda leaf: leaf[None]
    return predictions, jax.tree.map(one_layer, Routing(logits, gates, trained))
