"""Images made to a rule, so that the best assignment of experts is known."""

import chex
import numpy as np

from fedmoe_jax.base import Data
from fedmoe_jax.data.images import label_images

NUM_GROUPS = 4
GROUP_LABELS = 4
TRAIN_PER_LABEL = 256
TEST_PER_LABEL = 64
CONTRAST, NOISE = 60.0, 40.0  # pixel levels of 255


def load_synthetic() -> Data:
    """A task whose best assignment is known: one expert for each group of labels.

    The 16 labels form four groups of four. The upper half of an image is two tiles,
    each plain or split in two, with random polarity; which tiles are split is the
    group in binary. The lower half is four bars, and the bright one is the pattern.
    The label is `4 * group + (pattern + group) % 4`, so groups disagree about what
    a pattern means. Polarity makes the group invisible to any linear map of the
    pixels, one hidden layer finds it, and within a group the label is linear. So a
    linear expert of its own is right for each group and one for all is wrong, and
    a client's label mix says which expert is best for it (`best_group`).

    Returns:
      [X, 8, 8, 1] images, 4096 to train and 1024 to test, every label equally often.
    """
    rng = np.random.default_rng(0)
    train_x, train_y = _draw_synthetic(TRAIN_PER_LABEL, rng)
    test_x, test_y = _draw_synthetic(TEST_PER_LABEL, rng)
    names = tuple(
        f"group{group}_label{label}"
        for group in range(NUM_GROUPS)
        for label in range(GROUP_LABELS)
    )
    return label_images(train_x, train_y, test_x, test_y, names)


def _draw_synthetic(
    per_label: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Images [X, 8, 8, 1] uint8 and labels [X] int32, in random order."""
    y = np.repeat(np.arange(NUM_GROUPS * GROUP_LABELS, dtype=np.int32), per_label)
    rng.shuffle(y)
    group = synthetic_group(y)
    pattern = (y - group) % GROUP_LABELS
    bits = np.stack([group // 2, group % 2], 1)  # [X, 2] tiles
    polarity = rng.choice([-1.0, 1.0], size=bits.shape)
    halves = np.stack([polarity, polarity * (1 - 2 * bits)], 2)  # [X, 2, 2]
    cue = np.repeat(halves.reshape(-1, 4), 2, axis=1)  # [X, 8] columns
    bars = np.repeat(np.eye(GROUP_LABELS)[pattern], 2, axis=1)  # [X, 8]
    clean = 128 + CONTRAST * np.repeat(np.stack([cue, bars], 1), 4, axis=1)
    noisy = np.clip(clean + rng.normal(0, NOISE, clean.shape), 0, 255)
    return np.rint(noisy).astype(np.uint8)[..., None], y


def synthetic_group(label: np.ndarray) -> np.ndarray:
    """The group, in [0, 4), of each synthetic label in [0, 16), of any shape."""
    return label // GROUP_LABELS


def best_group(label_counts: np.ndarray) -> np.ndarray:
    """The known right answer of the synthetic task: each client's main group.

    A client is served best by the expert of the group that most of its examples
    belong to.

    Args:
      label_counts: [N, 16] int, examples of each label that each client owns.

    Returns:
      [N] int in [0, 4); the lower group on a tie.
    """
    chex.assert_shape(label_counts, (None, NUM_GROUPS * GROUP_LABELS))
    groups = np.reshape(label_counts, (-1, NUM_GROUPS, GROUP_LABELS))
    return groups.sum(-1).argmax(-1)
