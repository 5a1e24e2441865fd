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

from fedmoe_jax.models.layers import (
    Conv,
    Dense,
    dropout,
    group_norm,
    max_pool,
    space_to_depth,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Array, PyTree


class Model(NamedTuple):
    """Pure functions of one run's model.

    Attributes:
      init: key -> params; every leaf under `gate` and `experts` has a leading E axis.
      stem: (stem params, images [B, H, W, F] float, key) -> features [B, ...].
      expert: (ONE expert's params, features [B, ...], key) -> outputs [B, O].
      head: (head params, outputs [..., O]) -> logits [..., L].

    Stem and expert drop outputs at random with the key, and none where it is None.
    """

    init: Callable[[Array], PyTree]
    stem: Callable[[PyTree, Array, Array | None], Array]
    expert: Callable[[PyTree, Array, Array | None], Array]
    head: Callable[[PyTree, Array], Array]


class FlatStem(nn.Module):
    """No stem: [B, H, W, F] -> [B, H * W * F]. It has no width."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], -1)


class MlpStem(nn.Module):
    """Flattens and embeds small images: [B, H, W, F] -> [B, width]."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        return nn.LayerNorm()(nn.relu(Dense(self.width)(x)))


class CnnStem(nn.Module):
    """Two convolutions at half resolution: [B, 32, 32, 3] -> [B, 4, 4, 2 * width].

    At width 32 this is 2.1 million multiply-adds per image.
    """

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = space_to_depth(x)
        x = nn.relu(max_pool(group_norm(Conv(self.width)(x), "norm1")))
        return nn.relu(max_pool(group_norm(Conv(2 * self.width)(x), "norm2")))


class SimpleCnnStem(nn.Module):
    """Two valid convolutions and a pooling: [B, 32, 32, 3] -> [B, 14, 14, 2 * width].

    At width 32, with a `dense` expert of width 128, dropout 0.25 after the stem and 0.5
    after the expert, it is the network of pfl-research's CIFAR-10 benchmark (arXiv
    2404.06430) and, with other classes, of the LEAF and FedJAX EMNIST baselines.
    """

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(Conv(self.width, padding="VALID", use_bias=True)(x))
        x = Conv(2 * self.width, padding="VALID", use_bias=True)(x)
        return nn.relu(max_pool(x))


class ResNet8Stem(nn.Module):
    """ResNet-8 with GroupNorm: [B, H, W, F] -> [B, H/4, W/4, 4 * width]."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(group_norm(Conv(self.width)(x), "norm"))
        for block, width in enumerate((self.width, 2 * self.width, 4 * self.width)):
            stride = 1 if block == 0 else 2
            y = nn.relu(group_norm(Conv(width, stride=stride)(x), f"norm{block}a"))
            y = group_norm(Conv(width)(y), f"norm{block}b")
            if block > 0:
                x = nn.Dense(width, use_bias=False, name=f"shortcut{block}")(
                    x[:, ::2, ::2]
                )
            x = nn.relu(x + y)
        return x


class MlpExpert(nn.Module):
    """One hidden layer on flattened features: [B, ...] -> [B, features]."""

    width: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        return Dense(self.features)(nn.relu(Dense(self.width)(x)))


class DenseExpert(nn.Module):
    """One layer on flattened features: [B, ...] -> [B, width]; `features` is unused."""

    width: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.relu(Dense(self.width)(x.reshape(x.shape[0], -1)))


class ConvExpert(nn.Module):
    """A convolution, pooling and a linear map: [B, h, w, c] -> [B, features]."""

    width: int
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(max_pool(group_norm(Conv(self.width)(x), "norm")))
        return Dense(self.features)(x.reshape(x.shape[0], -1))


STEMS = {
    "flat": FlatStem,
    "mlp": MlpStem,
    "cnn": CnnStem,
    "simple_cnn": SimpleCnnStem,
    "resnet8": ResNet8Stem,
}
EXPERTS = {"dense": DenseExpert, "mlp": MlpExpert, "conv": ConvExpert}


def pool(features: Array) -> Array:
    """What the gate sees: features [B, ..., D] averaged over positions -> [B, D]."""
    return features.mean(axis=tuple(range(1, features.ndim - 1)))


def apply_experts(
    model: Model, experts: PyTree, features: Array, key: Array | None
) -> Array:
    """Runs several experts on the same features.

    Args:
      model: the model.
      experts: params with a leading axis of n experts.
      features: [B, ...] float.
      key: of dropout, or None for none.

    Returns:
      outputs [B, n, O].
    """
    count = jax.tree.leaves(experts)[0].shape[0]
    keys = None if key is None else jax.random.split(key, count)
    if jax.default_backend() != "cpu":
        axes = (0, None, None if key is None else 0)
        return jax.vmap(model.expert, axes, out_axes=1)(experts, features, keys)
    # On CPU a loop is faster: vmapping batches small products and groups convolutions.
    outputs = []
    for i in range(count):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], experts)
        outputs.append(model.expert(row, features, None if key is None else keys[i]))
    return jnp.stack(outputs, axis=1)


def check_fit(stem: str, expert: str, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError unless images, stem and expert fit each other."""
    height, width, _ = image_shape
    flat = ("flat", "mlp")
    if stem not in flat and (height % 8 or width % 8):
        raise UserError(
            f"model.stem={stem!r} needs images whose sides are multiples of 8, "
            f"this data has {height}x{width}; allowed: {', '.join(flat)}"
        )
    if stem in flat and expert == "conv":
        raise UserError(
            "model.expert='conv' needs a stem that keeps positions; "
            f"allowed with model.stem={stem!r}: dense, mlp"
        )
    if stem == "cnn" and expert == "conv" and (height % 16 or width % 16):
        raise UserError(
            "model.expert='conv' with model.stem='cnn' needs images whose sides are "
            f"multiples of 16, this data has {height}x{width}; allowed: dense, mlp"
        )


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
    """Builds the four functions of a model; equal arguments give the same functions.

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

    def init(key: Array) -> PyTree:
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
        return {
            "stem": stem_params,
            "gate": {"moe": gate},
            "experts": {"moe": experts},
            "head": head,
        }

    def run_stem(params: PyTree, x: Array, key: Array | None) -> Array:
        return dropout(stem_module.apply({"params": params}, x), stem_dropout, key)

    def run_expert(params: PyTree, x: Array, key: Array | None) -> Array:
        return dropout(expert_module.apply({"params": params}, x), expert_dropout, key)

    return Model(
        init=init,
        stem=run_stem,
        expert=run_expert,
        head=lambda params, x: head_module.apply({"params": params}, x),
    )
