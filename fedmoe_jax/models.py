"""The mixture of experts as four pure functions over `{stem, gate, experts, head}`.

A stem turns images into features, a gate scores E experts from the pooled features,
each expert turns features into outputs, one linear head turns (mixed) outputs into
logits. Because the head is linear and gates sum to one, mixing outputs or mixing each
expert's logits gives the same prediction; training does the first, evaluation the
second.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedmoe_jax.layers import Conv, group_norm, max_pool, space_to_depth
from fedmoe_jax.types import Array, PyTree, UserError


class Model(NamedTuple):
    """Pure functions of one run's model.

    Attributes:
      init: key -> params; every leaf under `gate` and `experts` has a leading E axis.
      stem: (stem params, images [B, H, W, F] float) -> features [B, ...].
      expert: (ONE expert's params, features [B, ...]) -> outputs [B, O].
      head: (head params, outputs [..., O]) -> logits [..., L].
    """

    init: Callable[[Array], PyTree]
    stem: Callable[[PyTree, Array], Array]
    expert: Callable[[PyTree, Array], Array]
    head: Callable[[PyTree, Array], Array]


class MlpStem(nn.Module):
    """Flattens and embeds small images: [B, H, W, F] -> [B, width]."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        return nn.LayerNorm()(nn.relu(nn.Dense(self.width)(x)))


class CnnStem(nn.Module):
    """Two convolutions at half resolution: [B, 32, 32, 3] -> [B, 4, 4, 2 * width].

    At width 32 this is 2.1 million multiply-adds per image.
    """

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = space_to_depth(x)
        x = max_pool(nn.relu(group_norm(Conv(self.width)(x), "norm1")))
        return max_pool(nn.relu(group_norm(Conv(2 * self.width)(x), "norm2")))


class ResNet8Stem(nn.Module):
    """ResNet-8 with GroupNorm: [B, H, W, F] -> [B, H/4, W/4, 4 * width]."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(group_norm(Conv(self.width)(x), "norm"))
        for block, width in enumerate((self.width, 2 * self.width, 4 * self.width)):
            if block > 0:
                x = max_pool(x)
            y = nn.relu(group_norm(Conv(width)(x), f"norm{block}a"))
            y = group_norm(Conv(width)(y), f"norm{block}b")
            if x.shape[-1] != width:
                x = nn.Dense(width, use_bias=False, name=f"shortcut{block}")(x)
            x = nn.relu(x + y)
        return x


class MlpExpert(nn.Module):
    """One hidden layer on flattened features: [B, ...] -> [B, features]."""

    width: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(self.features)(nn.relu(nn.Dense(self.width)(x)))


class ConvExpert(nn.Module):
    """A convolution, pooling and a linear map: [B, h, w, c] -> [B, features]."""

    width: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(group_norm(Conv(self.width)(x), "norm"))
        return nn.Dense(self.features)(max_pool(x).reshape(x.shape[0], -1))


STEMS = {"mlp": MlpStem, "cnn": CnnStem, "resnet8": ResNet8Stem}
EXPERTS = {"mlp": MlpExpert, "conv": ConvExpert}


def pool(features: Array) -> Array:
    """What the gate sees: features [B, ..., D] averaged over positions -> [B, D]."""
    return features.mean(axis=tuple(range(1, features.ndim - 1)))


def apply_experts(model: Model, experts: PyTree, features: Array) -> Array:
    """Runs several experts on the same features.

    Args:
      model: the model.
      experts: params with a leading axis of n experts.
      features: [B, ...] float.

    Returns:
      outputs [B, n, O].
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(model.expert, in_axes=(0, None), out_axes=1)(experts, features)
    # On CPU a loop is faster: vmapping batches small products and groups convolutions.
    count = jax.tree.leaves(experts)[0].shape[0]
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], experts) for i in range(count)]
    return jnp.stack([model.expert(row, features) for row in rows], axis=1)


def check_fit(stem: str, expert: str, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError unless images, stem and expert fit each other."""
    height, width, _ = image_shape
    if stem != "mlp" and (height % 8 or width % 8):
        raise UserError(
            f"model.stem={stem!r} needs images whose sides are multiples of 8, "
            f"this data has {height}x{width}; allowed: 'mlp'"
        )
    if stem == "mlp" and expert == "conv":
        raise UserError(
            "model.expert='conv' needs a stem that keeps positions; "
            "allowed with model.stem='mlp': 'mlp'"
        )
    if stem == "cnn" and expert == "conv" and (height % 16 or width % 16):
        raise UserError(
            "model.expert='conv' with model.stem='cnn' needs images whose sides are "
            f"multiples of 16, this data has {height}x{width}; allowed: 'mlp'"
        )


@functools.cache
def build_model(
    *,
    stem: str,
    stem_width: int,
    expert: str,
    expert_width: int,
    feature_width: int,
    num_experts: int,
    num_classes: int,
    image_shape: tuple[int, int, int],
) -> Model:
    """Builds the four functions of a model; equal arguments give the same functions.

    Args:
      stem: `mlp`, `cnn` or `resnet8`.
      stem_width: hidden units or channels of the stem.
      expert: `mlp` or `conv`.
      expert_width: hidden units or channels of one expert.
      feature_width: O, outputs of one expert.
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

    def init(key: Array) -> PyTree:
        stem_key, gate_key, expert_key, head_key = jax.random.split(key, 4)
        images = jnp.zeros((1, *image_shape))
        stem_params = stem_module.init(stem_key, images)["params"]
        features = stem_module.apply({"params": stem_params}, images)
        expert_keys = jax.random.split(expert_key, num_experts)
        experts = jax.vmap(lambda k: expert_module.init(k, features)["params"])(
            expert_keys
        )
        gate_shape = (num_experts, features.shape[-1])
        gate = {
            "kernel": 0.1 * jax.random.normal(gate_key, gate_shape),
            "bias": jnp.zeros((num_experts,)),
        }
        head = head_module.init(head_key, jnp.zeros((1, feature_width)))["params"]
        return {"stem": stem_params, "gate": gate, "experts": experts, "head": head}

    return Model(
        init=init,
        stem=lambda params, x: stem_module.apply({"params": params}, x),
        expert=lambda params, x: expert_module.apply({"params": params}, x),
        head=lambda params, x: head_module.apply({"params": params}, x),
    )
