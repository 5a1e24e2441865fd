"""Data sets as NumPy arrays: digits, a task with a known answer, CIFAR-10.

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

from fedmoe_jax.base import Data
from fedmoe_jax.data import cifar10
from fedmoe_jax.data.digits import load_digits
from fedmoe_jax.data.synthetic import load_synthetic
from fedmoe_jax.options import UserError


def load_dataset(name: str, data_dir: str) -> Data:
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
    check_data(data)
    return data


def check_data(data: Data) -> None:
    """Checks that the arrays of a data set fit each other."""
    chex.assert_trees_all_equal_structs(data.train, data.test)
    for part, stratum in ((data.train, data.stratum), (data.test, data.test_stratum)):
        chex.assert_shape(stratum, (None,))
        chex.assert_type(stratum, np.int32)
        chex.assert_tree_shape_prefix(part, stratum.shape)
        if stratum.min() < 0 or stratum.max() >= len(data.stratum_names):
            raise ValueError(f"strata are not in [0, {len(data.stratum_names)})")
    first = lambda leaf: leaf[:1]
    rows = [{name: first(x) for name, x in d.items()} for d in (data.train, data.test)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*rows)
    if data.owner is not None:
        chex.assert_equal_shape([data.owner, data.stratum])


def resolve_data_dir(data_dir: str) -> Path:
    """The TFDS folder: `data_dir`, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(chosen).expanduser()


DATASETS: dict[str, Callable[[str], Data]] = {
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
