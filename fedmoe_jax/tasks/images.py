"""Images with one label each: normalised pixels, cross-entropy and accuracy."""

import functools

import jax.numpy as jnp
import numpy as np
import optax

from fedmoe_jax.base import Data, Scores, Task
from fedmoe_jax.options import UserError
from fedmoe_jax.tasks.augment import crop_and_flip
from fedmoe_jax.tasks.distortion import DISTORTIONS, distort
from fedmoe_jax.types import Array, PyTree


def measure_channels(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [F] float32 of the training pixels / 255."""
    if data.train["x"].dtype != np.uint8:
        return measure_floats(data.train["x"] / 255.0)
    levels = np.arange(256) / 255.0
    channels = np.moveaxis(data.train["x"], -1, 0)
    counts = np.stack([np.bincount(x.ravel(), minlength=256) for x in channels])
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt((share * (levels[None] - mean[:, None]) ** 2).sum(axis=1))
    return mean.astype(np.float32), np.maximum(std, 1e-3).astype(np.float32)


def measure_floats(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [F] float32 of images [X, H, W, F] of any range.

    A channel that does not vary has the deviation 1.
    """
    mean, std = (f(axis=(0, 1, 2), dtype=np.float64) for f in (x.mean, x.std))
    varies = std > 1e-6 * np.abs(mean)
    return mean.astype(np.float32), np.where(varies, std, 1.0).astype(np.float32)


def measure_pixels(data: Data) -> PyTree:
    """`mean` and `std` [H, W, F] float32 of each channel, repeated at every pixel.

    Raises:
      UserError: the images `x` are no uint8 or float32 [X, H, W, F].
    """
    x = data.train.get("x", np.zeros(0))
    if x.dtype not in (np.uint8, np.float32) or x.ndim != 4:
        raise UserError(
            f"the task images has train['x'] {x.dtype}{list(x.shape)}; allowed: "
            "uint8[X, H, W, F] or float32[X, H, W, F]"
        )
    mean, std = measure_channels(data)
    shape = data.train["x"].shape[1:]
    return {"mean": np.broadcast_to(mean, shape), "std": np.broadcast_to(std, shape)}


def normalise(x: Array, mean: Array, std: Array) -> Array:
    """Images [B, H, W, F] -> float32 with zero mean and unit variance per F.

    `mean` and `std` are those of x / 255, whatever the range of x is.
    `mean` and `std` [H, W, F] are read like the images, so that the loop vectorises.
    """
    return (x.astype(jnp.float32) / 255.0 - mean[None]) / std[None]


def prepare(rows: PyTree, statistics: PyTree) -> PyTree:
    """`x` [B, H, W, F] float32 normalised, `y` [B] int32 as it is."""
    x = normalise(rows["x"], statistics["mean"], statistics["std"])
    return {"x": x, "y": rows["y"]}


def score_labels(logits: Array, batch: PyTree) -> Scores:
    """Cross-entropy in nats and accuracy [B] of class logits [B, L]."""
    labels = batch["y"]
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return Scores(loss, right)


def add_label_prior(logits: Array, log_share: Array) -> Array:
    """Logits [B, L] for a client with labels in such shares, [L] logarithms."""
    return logits + log_share[None]


def augment_rows(rows: PyTree, key: Array) -> PyTree:
    """Rows whose images are shifted and mirrored, see `augment.crop_and_flip`."""
    return rows | {"x": crop_and_flip(rows["x"], key)}


def distort_rows(rows: PyTree, amount: Array, kind: str) -> PyTree:
    """Rows whose images are distorted, see `distortion.distort`."""
    return rows | {"x": distort(rows["x"].astype(jnp.float32), kind, amount)}


IMAGES = Task(
    statistics=measure_pixels,
    prepare=prepare,
    loss=score_labels,
    num_outputs=lambda data: len(data.stratum_names) // max(len(data.group_names), 1),
    drifts=tuple(
        (kind, functools.partial(distort_rows, kind=kind)) for kind in DISTORTIONS
    ),
    augments=(("crop_and_flip", augment_rows),),
    add_prior=add_label_prior,
    labels=lambda batch: batch["y"],
)
