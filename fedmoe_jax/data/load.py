"""Data sets as uint8 NumPy arrays: digits, a task with a known answer, CIFAR-10.

    python -m fedmoe_jax.data --data_dir=DIR [--manual_dir=DIR]

prepares CIFAR-10 for TFDS in array_record form, without TensorFlow. `--manual_dir`
is a folder that holds `cifar-10-binary.tar.gz` fetched by hand.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import chex
import numpy as np
from absl import flags

from fedmoe_jax.data import cifar10
from fedmoe_jax.options import UserError
from fedmoe_jax.types import Dataset

NUM_GROUPS = 4
GROUP_LABELS = 4
TRAIN_PER_LABEL = 256
TEST_PER_LABEL = 64
CONTRAST, NOISE = 60.0, 40.0  # pixel levels of 255


def load_dataset(name: str, data_dir: str) -> Dataset:
    """Loads a data set by name; the arrays never depend on a run's seed.

    Args:
      name: `digits`, `synthetic` or `cifar10`.
      data_dir: the TFDS folder of `cifar10`; empty for TFDS_DATA_DIR, else
        ~/tensorflow_datasets. The other two ignore it and touch no disk.

    Raises:
      UserError: unknown name, or CIFAR-10 is absent or damaged.
    """
    if name not in DATASETS:
        allowed = ", ".join(DATASETS)
        raise UserError(f"data.name={name!r} is unknown; allowed: {allowed}")
    data = DATASETS[name](data_dir)
    chex.assert_rank([data.train_x, data.test_x], 4)
    chex.assert_shape(data.train_y, data.train_x.shape[:1])
    chex.assert_shape(data.test_y, data.test_x.shape[:1])
    chex.assert_equal_shape([data.train_x, data.test_x], dims=(1, 2, 3))
    chex.assert_type([data.train_x, data.test_x], np.uint8)
    chex.assert_type([data.train_y, data.test_y], np.int32)
    return data


def load_digits() -> Dataset:
    """scikit-learn's handwritten digits, [X, 8, 8, 1], 1437 to train and 360 to test.

    Pixels are rescaled from 0..16 to 0..255. The stratified split is fixed.
    """
    # scikit-learn takes a second to import, and other data sets do not need it.
    from sklearn import datasets, model_selection

    source = datasets.load_digits()
    x = np.rint(source.images * (255 / 16)).astype(np.uint8)[..., None]
    train_x, test_x, train_y, test_y = model_selection.train_test_split(
        x,
        source.target.astype(np.int32),
        test_size=0.2,
        stratify=source.target,
        random_state=0,
    )
    names = tuple(str(label) for label in source.target_names)
    return Dataset(train_x, train_y, test_x, test_y, names)


def load_synthetic() -> Dataset:
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
    return Dataset(train_x, train_y, test_x, test_y, names)


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


def resolve_data_dir(data_dir: str) -> Path:
    """The TFDS folder: `data_dir`, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(chosen).expanduser()


DATASETS: dict[str, Callable[[str], Dataset]] = {
    "digits": lambda data_dir: load_digits(),
    "synthetic": lambda data_dir: load_synthetic(),
    "cifar10": lambda data_dir: cifar10.load_cifar10(resolve_data_dir(data_dir)),
}


def main(argv: list[str]) -> None:
    """Prepares CIFAR-10 from the flags; exit code 2 on a mistake."""
    del argv
    data_dir = resolve_data_dir(flags.FLAGS.data_dir)
    try:
        folder = cifar10.prepare_cifar10(data_dir, flags.FLAGS.manual_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"CIFAR-10 is ready in {folder}; use it with TFDS_DATA_DIR={data_dir}")


def define_flags() -> None:
    """Defines the flags of `main`; importing this module must add none to a program."""
    flags.DEFINE_string(
        "data_dir", "", "TFDS folder; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    flags.DEFINE_string(
        "manual_dir", "", "folder with cifar-10-binary.tar.gz; empty: download it"
    )
