"""Images through a stem, one MoE layer and a linear head.

A stem turns images into features, a gate scores E experts from the pooled features,
each expert turns features into outputs, one linear head turns (mixed) outputs into
logits. Because the head is linear, mixing outputs or mixing each expert's logits, and
the head's own for what the gates leave of one, gives the same prediction; training does
the first, evaluation the second. A shared expert (`base.Parts`) has the form of the
routed ones and a width of its own; its outputs are added to the mixture.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from fedmoe_jax.base import SHARED, Model, Parts
from fedmoe_jax.models.image_parts import EXPERTS, STEMS, check_fit, check_shared
from fedmoe_jax.models.image_units import list_expert_units, list_stem_units
from fedmoe_jax.models.layers import dropout
from fedmoe_jax.models.links import SNR
from fedmoe_jax.models.one_layer import SHARED_KEY, apply_parts
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Array, PyTree

LAYER = "moe"  # the name of the one MoE layer in `gate` and `experts`


@functools.cache
def build_model(
    *,
    stem: str,
    stem_width: int,
    expert: str,
    expert_width: int,
    feature_width: int,
    shared_width: int,
    stem_dropout: float,
    expert_dropout: float,
    linked: bool,
    num_experts: int,
    num_classes: int,
    image_shape: tuple[int, int, int],
    platform: str,
) -> Model:
    """Builds an image model; equal arguments give the same functions.

    Args:
      stem: a name in `STEMS`.
      stem_width: hidden units or channels of the stem.
      expert: a name in `EXPERTS`.
      expert_width: hidden units or channels of one expert.
      feature_width: O, outputs of one expert (`dense` has `expert_width` outputs).
      shared_width: hidden units or channels of the shared expert; 0 for none.
      stem_dropout: rate in [0, 1) at which the stem's outputs are dropped in training.
      expert_dropout: rate in [0, 1) at which each expert's outputs are dropped.
      linked: whether the gate sees links to its experts.
      num_experts: E.
      num_classes: L.
      image_shape: H, W, F.
      platform: that it will run on, `cpu`, `gpu` or `tpu`, or `layers.ANY`.

    Raises:
      UserError: the stem cannot take these images, or the expert not these features,
        or no shared expert's outputs fit its own.
    """
    check_fit(stem, expert, image_shape)
    check_shared(expert, shared_width)
    stem_module = STEMS[stem](stem_width, platform)
    expert_module = EXPERTS[expert](expert_width, feature_width, platform)
    shared_module = EXPERTS[expert](shared_width, feature_width, platform)
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
        if linked:  # it learns what they are worth: at first nothing
            gate[SNR] = jnp.zeros((num_experts,))
        head = head_module.init(head_key, output)["params"]
        if shared_width:  # from a key of its own: the others start as without it
            shared_key = jax.random.fold_in(key, SHARED_KEY)
            shared = shared_module.init(shared_key, features)["params"]
            stem_params = {**stem_params, SHARED: shared}
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

    def run(module: nn.Module, params: PyTree, x: Array, key: Array | None) -> Array:
        # A tuple only of mutable collections.
        outputs: Array = module.apply({"params": params}, x)  # pyright: ignore[reportAssignmentType]
        return dropout(outputs, expert_dropout, key)

    parts = Parts(
        stem=run_stem,
        expert=functools.partial(run, expert_module),
        # A tuple only of mutable collections.
        head=lambda params, x: head_module.apply({"params": params}, x),  # pyright: ignore[reportArgumentType]
        platform=platform,
        shared=functools.partial(run, shared_module) if shared_width else None,
    )
    apply = functools.partial(apply_parts, parts=parts, num_experts=num_experts)
    units = list_stem_units(stem, stem_width) + list_expert_units(expert, expert_width)
    return Model(init=init, apply=apply, parts=parts, units=units)


def build(config: ConfigDict, batch: PyTree, num_outputs: int, platform: str) -> Model:
    """The model of a config; equal configs give the same functions.

    Args:
      config: gives `num_experts` and the group `model`.
      batch: shapes of a batch with images `x` [B, H, W, F].
      num_outputs: L.
      platform: that it will run on, `cpu`, `gpu` or `tpu`, or `layers.ANY`.

    Raises:
      UserError: the batch has no images; see `build_model`.
    """
    options = config.model
    if "x" not in batch:
        raise UserError(
            f"model.kind={options.kind!r} is not allowed with data without images "
            f"(they have {', '.join(batch)}); allowed: transformer"
        )
    return build_model(
        stem=options.stem,
        stem_width=options.stem_width,
        expert=options.expert,
        expert_width=options.expert_width,
        feature_width=options.feature_width,
        shared_width=options.shared_width,
        stem_dropout=options.stem_dropout,
        expert_dropout=options.expert_dropout,
        linked=config.expert_links.kind != "none",
        num_experts=config.num_experts,
        num_classes=num_outputs,
        image_shape=batch["x"].shape[1:],
        platform=platform,
    )
