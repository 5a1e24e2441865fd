"""The works that every federated-learning simulator is timed on.

Standard library and NumPy only: every peer's runner imports this file from its own
environment. Sizes are letters as in `fedmoe_jax.types`: N clients, M examples a client,
C clients a round, B examples a batch, E experts, A of them active. In dense works every
client trains one epoch of SGD in the order of its examples, and the server adds the
unweighted mean of the clients' changes. Work M is `configs/cifar10.py`: every client
trains the experts that it holds, on batches drawn without replacement, and an expert is
averaged over the clients that held it. Work L is `configs/languages.py` with held sets
that stay: a decoder transformer of bytes with such a mixture in both of its blocks.
"""

from typing import NamedTuple

import numpy as np

IMAGE = (32, 32, 3)
CLASSES = 10
LEARNING_RATE = 0.1
MIXTURE_LEARNING_RATE, MOMENTUM, CALIBRATION = 0.01, 0.9, 0.2  # of M, unclipped
SERVER_LEARNING_RATE = 1.0
CHECKED = 500  # images, the first of the pool, on which runners report the loss
CHECKED_WINDOWS = 8  # of each client of L, likewise
# Mean and standard deviation of a uniform byte.
MEAN, DEVIATION = 127.5, 73.9
HIDDEN = 64  # of the MLP
CHANNELS = (32, 64)  # of the CNN's two convolutions, 3 x 3, no padding
DENSE = 128  # of the CNN
DROPOUT = (0.25, 0.5)  # of the CNN: after pooling, before the last layer
EXPERTS, ACTIVE = 8, 2  # E and A of the mixture
STEM = (32, 64)  # channels of its two convolutions, 3 x 3, padded, on 2 x 2 blocks
EXPERT = (128, 64)  # its experts' hidden units and outputs
# Experts that each client's device holds in `configs/cifar10.py`.
HELD = (4, 1, 4, 1, 4, 1, 1, 4, 2, 4, 1, 4, 4, 1, 4, 4, 4, 4, 1, 1)
OWN_CLASSES = 4  # of a client of the mixture
SHOWN = 0.5  # share of an image of the mixture that its class decides
# Of L: the transformer and its AdamW as `configs/languages.py` has them.
VOCABULARY, WINDOW = 256, 128  # bytes, and positions of a window
LANGUAGES = 8  # two clients write each
SURE = 0.5  # share of the bytes that the language and the byte before decide
BLOCKS, WIDTH, HEADS, KV_HEADS = 2, 64, 4, 4
HIDDEN_UNITS = 64  # of an expert
LANGUAGE_LEARNING_RATE, CLIP, LANGUAGE_CALIBRATION = 0.003, 1.0, 1.0
# Experts of each block that each client's device holds there.
LANGUAGE_HELD = (4, 1, 4, 4, 1, 1, 4, 4, 3, 4, 1, 4, 4, 4, 1, 1)


class Work(NamedTuple):
    """One federated task; `pool` = None gives every client examples of its own."""

    title: str
    model: str  # "cnn", "mlp", "mixture" or "language"
    clients: int  # N
    examples: int  # M
    cohort: int  # C
    batch: int  # B
    pool: int | None
    timed_rounds: int  # in one launch
    steps: int | None = None  # of a client in a round; None for one epoch


WORKS = {
    "A": Work("CNN, 20 of 50 clients x 250", "cnn", 50, 250, 20, 10, None, 5),
    "B": Work("MLP, 20 of 50 clients x 250", "mlp", 50, 250, 20, 10, None, 20),
    "C": Work(
        "MLP, 200 of 10,000 clients x 250", "mlp", 10_000, 250, 200, 10, 50_000, 5
    ),
    "L": Work(
        "language, 16 of 16 clients x 80 windows",
        *("language", 16, 312, 16, 8, None, 3),
        steps=10,
    ),
    "M": Work(
        "8 experts, 20 of 20 clients x 960",
        *("mixture", 20, 2500, 20, 32, None, 3),
        steps=30,
    ),
    "P": Work("CNN, 50 of 200 clients x 50", "cnn", 200, 50, 50, 10, None, 5),
}


def num_images(work: Work) -> int:
    """Images, or windows, in memory: the pool's, or N x M."""
    return work.pool or work.clients * work.examples


def load_images(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Uniform noise with random labels: uint8 [pool, 32, 32, 3], int32 [pool].

    The mixture can learn its labels, which are of few classes a client: each image
    shows parts of a picture of its class, uniform noise itself.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images(work), *IMAGE), dtype=np.uint8)
    if work.model != "mixture":
        return images, rng.integers(0, CLASSES, num_images(work), dtype=np.int32)
    owner = np.arange(num_images(work), dtype=np.int32) % work.clients
    own = rng.integers(0, OWN_CLASSES, num_images(work), dtype=np.int32)
    labels = (owner + own) % CLASSES
    pictures = rng.integers(0, 256, (CLASSES, *IMAGE), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        shown = rng.integers(0, 256, IMAGE, dtype=np.uint8) < 256 * SHOWN
        np.copyto(image, pictures[label], where=shown)
    return images, labels


def load_windows(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Windows of bytes and their languages: uint8 [N x M, WINDOW + 1], int32 [N x M].

    They are in the order of their clients, each of which writes one language. There a
    byte is followed by a certain other in half of the cases, and by any otherwise.
    """
    rng = np.random.default_rng(0)
    follower = np.stack([rng.permutation(VOCABULARY) for _ in range(LANGUAGES)])
    client = np.repeat(np.arange(work.clients, dtype=np.int32), work.examples)
    language = client % LANGUAGES
    shape = len(client), WINDOW + 1
    windows = rng.integers(0, VOCABULARY, shape, dtype=np.uint8)
    sure = rng.random(shape, dtype=np.float32) < SURE
    for place in range(1, WINDOW + 1):
        after = follower[language, windows[:, place - 1]].astype(np.uint8)
        np.copyto(windows[:, place], after, where=sure[:, place])
    return windows, language


def checked_windows(work: Work) -> np.ndarray:
    """Windows on which runners report the loss, as many of each client: int [n]."""
    first = np.arange(work.clients)[:, None] * work.examples
    return (first + np.arange(CHECKED_WINDOWS)).ravel()


def normalise(images: np.ndarray) -> np.ndarray:
    """uint8 to float32 of mean 0 and variance 1, same shape."""
    values = images.astype(np.float32)
    values -= np.float32(MEAN)
    values /= np.float32(DEVIATION)
    return values


def load_ids(work: Work) -> np.ndarray:
    """Images of each client: int32 [N, M]; they overlap if there is a pool."""
    shape = (work.clients, work.examples)
    if work.model == "mixture":  # one after the other, so that all are in any part
        return np.arange(num_images(work), dtype=np.int32).reshape(shape[::-1]).T
    if work.pool is None:
        return np.arange(num_images(work), dtype=np.int32).reshape(shape)
    return np.random.default_rng(1).integers(0, work.pool, shape, dtype=np.int32)


def sample_cohort(work: Work, round_number: int) -> np.ndarray:
    """Clients of one round: int [C], without replacement."""
    rng = np.random.default_rng((2, round_number))
    return rng.choice(work.clients, work.cohort, replace=False)


def tokens_per_round(work: Work) -> int:
    """Bytes that are trained on in a round; 0 of images."""
    return examples_per_round(work) * WINDOW if work.model == "language" else 0


def examples_per_round(work: Work) -> int:
    """C x M, or C x B in every step."""
    per_client = work.steps * work.batch if work.steps else work.examples
    return work.cohort * per_client


def flattened_size() -> int:
    """Features after the CNN's convolutions and 2 x 2 pooling."""
    side = (IMAGE[0] - 4) // 2
    return side * side * CHANNELS[1]


def mixture_flattened_size() -> int:
    """Features after the mixture's stem, which halves the sides three times."""
    return (IMAGE[0] // 8) ** 2 * STEM[1]


def expert_macs() -> int:
    """Multiply-adds of one expert's forward pass on one example."""
    hidden, features = EXPERT
    return mixture_flattened_size() * hidden + hidden * features


def mixture_macs() -> list[float]:
    """As `layer_macs`; of the experts those that an example's gate chooses.

    Taps of a convolution on the zeros around an image are no work.
    """
    first, second = STEM
    active = float(np.minimum(HELD, ACTIVE).mean())
    taps = [(3 * IMAGE[0] // shrink - 2) ** 2 for shrink in (2, 4)]
    return [
        taps[0] * 4 * IMAGE[2] * first,
        taps[1] * first * second,
        second * EXPERTS,
        active * expert_macs(),
        EXPERT[1] * CLASSES,
    ]


def mixture_parameters() -> dict[str, int]:
    """Numbers in each part of the mixture, all E experts."""
    (first, second), (hidden, features) = STEM, EXPERT
    expert = expert_macs() + hidden + features
    return {
        "stem": 9 * 4 * IMAGE[2] * first + 9 * first * second + 2 * (first + second),
        "gate": EXPERTS * (second + 1),
        "experts": EXPERTS * expert,
        "head": (features + 1) * CLASSES,
    }


def language_macs() -> list[float]:
    """As `layer_macs`, of a window; of the experts those that a byte's gate chooses.

    A position attends to those up to itself. Looking up an embedding is no work.
    """
    active = float(np.minimum(LANGUAGE_HELD, ACTIVE).mean())
    size = WIDTH // HEADS
    attention = [
        WIDTH * size * (HEADS + 2 * KV_HEADS),
        2 * WIDTH * (WINDOW + 1) / 2,
        WIDTH * WIDTH,
    ]
    block = [*attention, WIDTH * EXPERTS, active * 3 * WIDTH * HIDDEN_UNITS]
    return [0.0, *(WINDOW * macs for macs in BLOCKS * block + [WIDTH * VOCABULARY])]


def language_parameters() -> dict[str, int]:
    """Numbers in each part of the language model, all E experts of all blocks."""
    attention = WIDTH * (WIDTH // HEADS) * 2 * (HEADS + KV_HEADS)
    return {
        "stem": VOCABULARY * WIDTH + BLOCKS * (attention + 2 * WIDTH),
        "gate": BLOCKS * EXPERTS * (WIDTH + 1),
        "experts": BLOCKS * EXPERTS * 3 * WIDTH * HIDDEN_UNITS,
        "head": WIDTH + WIDTH * VOCABULARY,
    }


def layer_macs(model: str) -> list[float]:
    """Multiply-adds of each layer's forward pass on one example, first layer first."""
    if model == "mixture":
        return mixture_macs()
    if model == "language":
        return language_macs()
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


def flops_per_example(model: str) -> float:
    """Floating-point operations of one example, forward and backward.

    Two for each multiply-add, and three passes over each layer (output, gradient of the
    weights, gradient of the input); the first layer needs no gradient of its input.
    Biases, activations, dropout, pooling and the update are left out.
    """
    macs = layer_macs(model)
    return 2 * (3 * sum(macs) - macs[0])
