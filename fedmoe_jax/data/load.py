"""Data sets as NumPy arrays, by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.data.arrays import load_arrays
from fedmoe_jax.data.digits import load_digits
from fedmoe_jax.data.folders import resolve_data_dir
from fedmoe_jax.data.markov import load_markov
from fedmoe_jax.data.prepare import prepare
from fedmoe_jax.data.synthetic import load_synthetic
from fedmoe_jax.data.text import load_text
from fedmoe_jax.data.tfds import COMMAND, find_source, load_images, read_features
from fedmoe_jax.data.tfds_text import load_records
from fedmoe_jax.forms import check_type
from fedmoe_jax.options import NON_NEGATIVE, UserError, show


def load_dataset(options: ConfigDict) -> Data:
    """Loads a data set by name; the arrays never depend on a run's seed.

    Args:
      options: the config's group `data`. A `name` outside of `DATASETS` is a data set
        that TFDS has prepared, such as `mnist` or `emnist/byclass`.

    Raises:
      UserError: it is absent or damaged, or arrays do not fit each other.
    """
    name = options.name
    refuse_unread(options)
    data = DATASETS.get(name, load_prepared)(options)
    check_type(f"data.name={name!r} has a loader that", data, Data)
    check_data(name, data)
    if "bytes" not in data.train:
        refuse_tokenizer(options)
    return data


def refuse_unread(options: ConfigDict) -> None:
    """Raises UserError where a path is given that this data set does not read."""
    own = options.name in DATASETS and options.name not in READS  # of a plug-in
    for field in () if own else ("dir", "file"):
        if options[field] and field not in READS.get(options.name, ("dir",)):
            raise UserError(
                f"data.{field}={show(options[field])} is not allowed with data.name="
                f"{show(options.name)}, which does not read it; allowed: ''"
            )


def refuse_tokenizer(options: ConfigDict) -> None:
    """Raises UserError where data without text of their own have a tokenizer."""
    if options.tokenizer:
        raise UserError(
            f"data.tokenizer={options.tokenizer!r} is not allowed with data.name="
            f"{options.name!r}, which has no text to encode; allowed: ''"
        )


def load_cifar10(options: ConfigDict) -> Data:
    """Loads CIFAR-10 in its original order, preparing it where it is absent.

    Raises:
      UserError: absent and not to be had, prepared as TFRECORD, or damaged.
    """
    refuse_tokenizer(options)  # before anything is downloaded
    source = prepare("cifar10", resolve_data_dir(options.dir))
    return load_images(source, options)


def load_prepared(options: ConfigDict) -> Data:
    """Loads what TFDS has prepared under a name.

    Raises:
      UserError: nothing is there, or it cannot be read.
    """
    data_dir = resolve_data_dir(options.dir)
    source = find_source(data_dir, options.name)
    if source is None:
        raise UserError(
            f"data.name={show(options.name)} is not in {data_dir}; allowed: "
            f"{', '.join(DATASETS)}, or a data set of TFDS that '{COMMAND} NAME "
            f"--data_dir={data_dir}' has prepared"
        )
    features = read_features(source).values()
    shows = any("image" in feature for feature in features)
    if not shows or options.text_key:
        return load_records(source, options)
    refuse_tokenizer(options)  # before anything is decoded
    return load_images(source, options)


def check_data(name: str, data: Data) -> None:
    """Raises UserError unless the arrays of the data set fit each other."""

    def require(holds: bool, fault: str, allowed: str) -> None:
        if not holds:
            raise UserError(f"data.name={name!r} has {fault}; allowed: {allowed}")

    form = lambda leaf: f"{leaf.dtype}{list(leaf.shape[1:])}"
    most = len(data.stratum_names) - 1
    parts = {"train": (data.train, data.stratum)}
    parts["test"] = (data.test, data.test_stratum)
    for part, (rows, stratum) in parts.items():
        flat = is_ids(stratum) and stratum.dtype == np.int32
        require(flat, f"no strata of {part}", "int32[X], X >= 1")
        low, high = stratum.min(), stratum.max()
        found = f"strata of {part} from {low} to {high}"
        require(low >= 0 and high <= most, found, f"0 to {most}")
        for leaf, values in rows.items():
            found = f"{len(values)} rows of {part}[{leaf!r}] and {len(stratum)} strata"
            require(len(values) == len(stratum), found, "equally many")
    found = f"the leaves {sorted(data.train)} in train and {sorted(data.test)} in test"
    require(data.train.keys() == data.test.keys(), found, "the same in both")
    for leaf, values in data.train.items():
        pair = form(values), form(data.test[leaf])
        found = f"rows of {leaf!r} {pair[0]} in train and {pair[1]} in test"
        require(pair[0] == pair[1], found, "the same in both")
    known = data.limit is None or data.limit in NON_NEGATIVE
    require(known, f"limit={show(data.limit)}", "None, or bits >= 0")
    owners = {"train": data.owner, "test": data.test_owner}
    for part, owner in owners.items():
        if owner is not None:
            count = len(parts[part][1])
            fits = is_ids(owner) and len(owner) == count and owner.min() >= 0
            require(fits, f"no owner of every {part} example", "integers [X] >= 0")
    if data.test_owner is not None:
        most = -1 if data.owner is None else data.owner.max()
        found = f"test examples of the client {data.test_owner.max()}"
        require(data.test_owner.max() <= most, found, f"clients up to {most}")


def is_ids(ids: Any) -> bool:
    """Whether these are integers [X], X >= 1."""
    array = isinstance(ids, np.ndarray) and ids.ndim == 1 and len(ids) > 0
    return array and np.issubdtype(ids.dtype, np.integer)


# The paths among the fields of `data` that a data set of the package reads.
READS = {
    **dict.fromkeys(("digits", "synthetic", "markov"), ()),
    **dict.fromkeys(("cifar10", "text"), ("dir",)),
    "arrays": ("file",),
}

# A loader gets the config's group `data`.
DATASETS: dict[str, Callable[[ConfigDict], Data]] = {
    "digits": lambda options: load_digits(),
    "synthetic": lambda options: load_synthetic(),
    "cifar10": load_cifar10,
    "arrays": load_arrays,
    "text": load_text,
    "markov": load_markov,
}
