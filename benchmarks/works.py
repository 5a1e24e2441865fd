"""The works that every federated-learning simulator is timed on.

Standard library and NumPy only: every peer's runner imports this file from its own
environment. Sizes are letters as in `fedmoe_jax.types`: N clients, M examples a client,
C clients a round, B examples a batch. Every client trains one epoch of SGD in the order
of its examples, and the server adds the unweighted mean of the clients' changes.
"""

from typing import NamedTuple

import numpy as np

IMAGE = (32, 32, 3)
CLASSES = 10
LEARNING_RATE = 0.1
SERVER_LEARNING_RATE = 1.0
CHECKED = 500  # images, the first of the pool, on which runners report the loss
# Mean and standard deviation of a uniform byte.
MEAN, DEVIATION = 127.5, 73.9
HIDDEN = 64  # of the MLP
CHANNELS = (32, 64)  # of the CNN's two convolutions, 3 x 3, no padding
DENSE = 128  # of the CNN
DROPOUT = (0.25, 0.5)  # of the CNN: after pooling, before the last layer


class Work(NamedTuple):
    """One federated task; `pool` = None gives every client examples of its own."""

    title: str
    model: str  # "cnn" or "mlp"
    clients: int  # N
    examples: int  # M
    cohort: int  # C
    batch: int  # B
    pool: int | None
    timed_rounds: int  # in one launch


WORKS = {
    "A": Work("CNN, 20 of 50 clients x 250", "cnn", 50, 250, 20, 10, None, 5),
    "B": Work("MLP, 20 of 50 clients x 250", "mlp", 50, 250, 20, 10, None, 20),
    "C": Work(
        "MLP, 200 of 10,000 clients x 250", "mlp", 10_000, 250, 200, 10, 50_000, 5
    ),
    "P": Work("CNN, 50 of 200 clients x 50", "cnn", 200, 50, 50, 10, None, 5),
}


def num_images(work: Work) -> int:
    """Images in memory: the pool's, or N x M."""
    return work.pool or work.clients * work.examples


def load_images(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Uniform noise with random labels: uint8 [pool, 32, 32, 3], int32 [pool]."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images(work), *IMAGE), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, num_images(work), dtype=np.int32)
    return images, labels


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 to float32 of mean 0 and variance 1, same shape."""
    values = images.astype(np.float32)
    values -= np.float32(MEAN)
    values /= np.float32(DEVIATION)
    return values


def load_ids(work: Work) -> np.ndarray:
    """Images of each client: int32 [N, M]; they overlap if there is a pool."""
    shape = (work.clients, work.examples)
    if work.pool is None:
        return np.arange(num_images(work), dtype=np.int32).reshape(shape)
    return np.random.default_rng(1).integers(0, work.pool, shape, dtype=np.int32)


def sample_cohort(work: Work, round_number: int) -> np.ndarray:
    """Clients of one round: int [C], without replacement."""
    rng = np.random.default_rng((2, round_number))
    return rng.choice(work.clients, work.cohort, replace=False)


def examples_per_round(work: Work) -> int:
    """C x M."""
    return work.cohort * work.examples


def flattened_size() -> int:
    """Features after the CNN's convolutions and 2 x 2 pooling."""
    side = (IMAGE[0] - 4) // 2
    return side * side * CHANNELS[1]


def layer_macs(model: str) -> list[int]:
    """Multiply-adds of each layer's forward pass on one example, first layer first."""
    pixels = int(np.prod(IMAGE))
    if model == "mlp":
        return [pixels * HIDDEN, HIDDEN * CLASSES]
    first, second = CHANNELS
    after_first, after_second = (IMAGE[0] - 2) ** 2, (IMAGE[0] - 4) ** 2
    return [
        after_first * 9 * IMAGE[2] * first,
        after_second * 9 * first * second,
        flattened_size() * DENSE,
        DENSE * CLASSES,
    ]


def flops_per_example(model: str) -> int:
    """Floating-point operations of one example, forward and backward.

    Two for each multiply-add, and three passes over each layer (output, gradient of the
    weights, gradient of the input); the first layer needs no gradient of its input.
    Biases, activations, dropout, pooling and the update are left out.
    """
    macs = layer_macs(model)
    return 2 * (3 * sum(macs) - macs[0])
