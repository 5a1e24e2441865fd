"""The parts of image models: stems, experts, and which of them fit each other.

Each is built for a platform, `cpu`, `gpu` or `tpu`, see `layers`.
"""

from flax import linen as nn

from fedmoe_jax.models.layers import (
    Conv,
    Dense,
    PooledConv,
    group_norm,
    max_pool,
    space_to_depth,
)
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Array


class FlatStem(nn.Module):
    """No stem: [B, H, W, F] -> [B, H * W * F]; no width, any platform."""

    width: int
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], -1)


class MlpStem(nn.Module):
    """Flattens and embeds small images: [B, H, W, F] -> [B, width]."""

    width: int
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        return nn.LayerNorm()(nn.relu(Dense(self.width, self.platform)(x)))


class CnnStem(nn.Module):
    """Two convolutions at half resolution: [B, 32, 32, 3] -> [B, 4, 4, 2 * width].

    At width 32 this is 2.1 million multiply-adds per image.
    """

    width: int
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.width, self.platform)(space_to_depth(x))
        x = nn.relu(max_pool(group_norm(x, "norm1")))
        x = Conv(2 * self.width, self.platform)(x)
        return nn.relu(max_pool(group_norm(x, "norm2")))


class SimpleCnnStem(nn.Module):
    """Two valid convolutions and a pooling: [B, 32, 32, 3] -> [B, 14, 14, 2 * width].

    At width 32, with a `dense` expert of width 128, dropout 0.25 after the stem and 0.5
    after the expert, it is the network of pfl-research's CIFAR-10 benchmark (arXiv
    2404.06430) and, with other classes, of the LEAF and FedJAX EMNIST baselines.
    """

    width: int
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(Conv(self.width, self.platform, padding="VALID", use_bias=True)(x))
        x = Conv(2 * self.width, self.platform, padding="VALID", use_bias=True)(x)
        return nn.relu(max_pool(x))


class LeNetStem(nn.Module):
    """LeNet-5 but for its last two layers: [B, H, W, F] -> [B, 20 * width].

    At width 6, with a `dense` expert of width 84, it is the `simple-cnn` of NIID-Bench
    (arXiv 2102.02079), whose experts do not see where in an image something is.
    """

    width: int
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate((self.width, 8 * self.width // 3)):
            x = PooledConv(width, self.platform, size=5, name=f"Conv_{i}")(x)
        x = x.reshape(x.shape[0], -1)
        return nn.relu(Dense(20 * self.width, self.platform)(x))


class ResNet8Stem(nn.Module):
    """ResNet-8 with GroupNorm: [B, H, W, F] -> [B, H/4, W/4, 4 * width]."""

    width: int
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(group_norm(Conv(self.width, self.platform)(x), "norm"))
        for block, width in enumerate((self.width, 2 * self.width, 4 * self.width)):
            stride = 1 if block == 0 else 2
            y = Conv(width, self.platform, stride=stride)(x)
            y = Conv(width, self.platform)(nn.relu(group_norm(y, f"norm{block}a")))
            y = group_norm(y, f"norm{block}b")
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
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        output = Dense(self.features, self.platform)  # first, as checkpoints name it
        return output(nn.relu(Dense(self.width, self.platform)(x)))


class DenseExpert(nn.Module):
    """One layer on flattened features: [B, ...] -> [B, width]; `features` is unused."""

    width: int
    features: int
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.relu(Dense(self.width, self.platform)(x.reshape(x.shape[0], -1)))


class ConvExpert(nn.Module):
    """A convolution, pooling and a linear map: [B, h, w, c] -> [B, features]."""

    width: int
    features: int
    platform: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(max_pool(group_norm(Conv(self.width, self.platform)(x), "norm")))
        return Dense(self.features, self.platform)(x.reshape(x.shape[0], -1))


STEMS = {
    "flat": FlatStem,
    "mlp": MlpStem,
    "cnn": CnnStem,
    "simple_cnn": SimpleCnnStem,
    "lenet": LeNetStem,
    "resnet8": ResNet8Stem,
}
EXPERTS = {"dense": DenseExpert, "mlp": MlpExpert, "conv": ConvExpert}


def check_fit(stem: str, expert: str, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError unless images, stem and expert fit each other."""
    height, width, _ = image_shape
    flat = ("flat", "mlp")
    if stem == "lenet" and (height % 4 or width % 4 or min(height, width) < 16):
        raise UserError(
            "model.stem='lenet' needs images whose sides are multiples of 4, of 16 at "
            f"least, this data has {height}x{width}; allowed: "
            + ", ".join(flat if height % 8 or width % 8 else STEMS.keys() - {stem})
        )
    if stem not in (*flat, "lenet") and (height % 8 or width % 8):
        raise UserError(
            f"model.stem={stem!r} needs images whose sides are multiples of 8, "
            f"this data has {height}x{width}; allowed: {', '.join(flat)}"
        )
    if stem in (*flat, "lenet") and expert == "conv":
        raise UserError(
            f"model.expert='conv' is not allowed with model.stem={stem!r}, which keeps "
            "no positions; allowed: dense, mlp"
        )
    if stem == "cnn" and expert == "conv" and (height % 16 or width % 16):
        raise UserError(
            "model.expert='conv' with model.stem='cnn' needs images whose sides are "
            f"multiples of 16, this data has {height}x{width}; allowed: dense, mlp"
        )


def check_shared(expert: str, shared_width: int) -> None:
    """Raises UserError unless the outputs of a shared expert can be added."""
    if shared_width and expert == "dense":
        raise UserError(
            f"model.shared_width={shared_width} is not allowed with model.expert="
            "'dense', whose outputs are its hidden units, so that other widths cannot "
            "be added; allowed: 0"
        )
