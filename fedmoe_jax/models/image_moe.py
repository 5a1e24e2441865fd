"""Images through a stem, one MoE layer and a linear head.

A stem turns images into features, a gate scores E experts from the pooled features,
each expert turns features into outputs, one linear head turns (mixed) outputs into
logits. Because the head is linear and gates sum to one, mixing outputs or mixing each
expert's logits gives the same prediction; training does the first, evaluation the
second.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from fedmoe_jax.base import Model, Parts, Route, Routing
from fedmoe_jax.models import routing
from fedmoe_jax.models.image_parts import EXPERTS, STEMS, check_fit
from fedmoe_jax.models.layers import dropout
from fedmoe_jax.types import Array, PyTree

LAYER = "moe"  # the name of the one MoE layer in `gate` and `experts`


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
    if jax.default_backend() != "cpu":
        axes = (0, None, None if keys is None else 0)
        return jax.vmap(parts.expert, axes, out_axes=1)(experts, features, keys)
    # On CPU a loop is faster: vmapping batches small products and groups convolutions.
    outputs = []
    for i in range(count):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], experts)
        outputs.append(parts.expert(row, features, None if keys is None else keys[i]))
    return jnp.stack(outputs, axis=1)


def freeze_others(outputs: Array, gates: Array, slot: Array, route: Route) -> Array:
    """Experts' outputs [B, K, O]; gradients pass the `budget` of highest priority.

    Args:
      outputs: [B, K, O] float.
      gates: [B, K] float.
      slot: [K] bool.
      route: with `priority` and `budget`.
    """
    assert route.priority is not None and route.budget is not None
    value = jax.lax.stop_gradient(route.priority(gates))
    rank = jnp.argsort(jnp.argsort(jnp.where(slot, -value, jnp.inf)))
    chosen = (rank < route.budget)[None, :, None]
    return jnp.where(chosen, outputs, jax.lax.stop_gradient(outputs))


def mix_outputs(parts: Parts, head: PyTree, outputs: Array, gates: Array) -> Array:
    """Logits [B, L] of the mixture of the experts' outputs [B, K, O]."""
    return parts.head(head, jnp.einsum("bk,bko->bo", gates, outputs))


def mix_probabilities(
    parts: Parts, head: PyTree, outputs: Array, gates: Array
) -> Array:
    """Logits [B, L] of the mixture of the experts' own class probabilities."""
    answers = jax.nn.softmax(parts.head(head, outputs))  # [B, K, L]
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
        logits = routing.gate_logits(gate, features)  # [B, E]
        allowed = logits[:, held[0]], slot[0]
        gates = routing.route(*allowed, route.num_active)  # [B, K]
    outputs = apply_experts(parts, experts, features, expert_key)
    if route.priority:
        outputs = freeze_others(outputs, gates, slot[0], route)
    mix = mix_probabilities if route.mix == "probabilities" else mix_outputs
    predictions = mix(parts, params["head"], outputs, gates)
    return predictions, Routing(None if logits is None else logits[None], gates[None])


@functools.cache
def build_model(
    *,
    stem: str,
    stem_width: int,
    expert: str,
    expert_width: int,
    feature_width: int,
    stem_dropout: float,
    expert_dropout: float,
    num_experts: int,
    num_classes: int,
    image_shape: tuple[int, int, int],
) -> Model:
    """Builds an image model; equal arguments give the same functions.

    Args:
      stem: a name in `STEMS`.
      stem_width: hidden units or channels of the stem.
      expert: a name in `EXPERTS`.
      expert_width: hidden units or channels of one expert.
      feature_width: O, outputs of one expert (`dense` has `expert_width` outputs).
      stem_dropout: rate in [0, 1) at which the stem's outputs are dropped in training.
      expert_dropout: rate in [0, 1) at which each expert's outputs are dropped.
      num_experts: E.
      num_classes: L.
      image_shape: H, W, F.

    Raises:
      UserError: the stem cannot take these images, or the expert not these features.
    """
    check_fit(stem, expert, image_shape)
    stem_module = STEMS[stem](stem_width)
    expert_module = EXPERTS[expert](expert_width, feature_width)
    head_module = nn.Dense(num_classes)

    def init(key: Array) -> tuple[PyTree, PyTree]:
        stem_key, gate_key, expert_key, head_key = jax.random.split(key, 4)
        images = jnp.zeros((1, *image_shape))
        stem_params = stem_module.init(stem_key, images).get("params", {})
        features = stem_module.apply({"params": stem_params}, images)
        expert_keys = jax.random.split(expert_key, num_experts)
        experts = jax.vmap(lambda k: expert_module.init(k, features)["params"])(
            expert_keys
        )
        one_expert = jax.tree.map(lambda leaf: leaf[0], experts)
        output = expert_module.apply({"params": one_expert}, features)
        gate_shape = (num_experts, features.shape[-1])
        gate = {
            "kernel": 0.1 * jax.random.normal(gate_key, gate_shape),
            "bias": jnp.zeros((num_experts,)),
        }
        head = head_module.init(head_key, output)["params"]
        params = {
            "stem": stem_params,
            "gate": {LAYER: gate},
            "experts": {LAYER: experts},
            "head": head,
        }
        return params, {}

    def run_stem(params: PyTree, batch: PyTree, key: Array | None) -> Array:
        features = stem_module.apply({"params": params}, batch["x"])
        return dropout(features, stem_dropout, key)

    def run_expert(params: PyTree, x: Array, key: Array | None) -> Array:
        return dropout(expert_module.apply({"params": params}, x), expert_dropout, key)

    parts = Parts(
        stem=run_stem,
        expert=run_expert,
        # A tuple only of mutable collections.
        head=lambda params, x: head_module.apply({"params": params}, x),  # pyright: ignore[reportArgumentType]
    )
    apply = functools.partial(apply_parts, parts=parts, num_experts=num_experts)
    return Model(init=init, apply=apply, parts=parts)


def build(config: ConfigDict, batch: PyTree, num_outputs: int) -> Model:
    """The model of a config; equal configs give the same functions.

    Args:
      config: gives `num_experts` and the group `model`.
      batch: shapes of a batch with images `x` [B, H, W, F].
      num_outputs: L.

    Raises:
      UserError: see `build_model`.
    """
    options = config.model
    return build_model(
        stem=options.stem,
        stem_width=options.stem_width,
        expert=options.expert,
        expert_width=options.expert_width,
        feature_width=options.feature_width,
        stem_dropout=options.stem_dropout,
        expert_dropout=options.expert_dropout,
        num_experts=config.num_experts,
        num_classes=num_outputs,
        image_shape=batch["x"].shape[1:],
    )
