"""Data sets as NumPy arrays, by name."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.configs import default
from fedmoe_jax.data.arrays import load_arrays
from fedmoe_jax.data.digit_pairs import load_digit_pairs
from fedmoe_jax.data.digits import load_digits
from fedmoe_jax.data.folders import resolve_data_dir
from fedmoe_jax.data.markov import load_markov
from fedmoe_jax.data.prepare import prepare
from fedmoe_jax.data.synthetic import load_synthetic
from fedmoe_jax.data.text import load_text
from fedmoe_jax.data.tfds import (
    COMMAND,
    find_source,
    list_prepared,
    load_images,
    read_features,
)
from fedmoe_jax.data.tfds_text import load_records
from fedmoe_jax.forms import check_type
from fedmoe_jax.options import NON_NEGATIVE, UserError, show


def load_dataset(options: ConfigDict) -> Data:
    """Loads a data set by name; the arrays never depend on a run's seed.

    Args:
      options: the config's group `data`. A `name` outside of `DATASETS` is a data set
        that TFDS has prepared, such as `mnist` or `emnist/byclass`.

    Raises:
      UserError: it is absent or damaged, its arrays do not fit each other, or a field
        that it does not read is changed.
    """
    name = options.name
    if name in READS or name not in DATASETS:  # a plug-in's own affair otherwise
        refuse_unread(options, READS.get(name, PREPARED))
    data = DATASETS.get(name, load_prepared)(options)
    check_type(f"data.name={name!r} has a loader that", data, Data)
    check_data(name, data)
    return data


def refuse_unread(options: ConfigDict, reads: tuple[str, ...]) -> None:
    """Raises UserError where a field that this data set does not read is changed.

    Args:
      options: the config's group `data`.
      reads: the fields that it reads, among `FIELDS`.
    """
    defaults = default.get_config().data
    for field in FIELDS:
        if field not in reads and options[field] != defaults[field]:
            raise UserError(
                f"data.{field}={show(options[field])} is not allowed with data.name="
                f"{show(options.name)}, which does not read it; allowed: "
                f"{defaults[field]!r}"
            )


def load_cifar10(options: ConfigDict) -> Data:
    """Loads CIFAR-10 in its original order, preparing it where it is absent.

    Raises:
      UserError: absent and not to be had, prepared as TFRECORD, or damaged.
    """
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
            f"{', '.join([*list_prepared(data_dir, options.name), *DATASETS])}, or a "
            f"data set of TFDS that '{COMMAND} NAME --data_dir={data_dir}' has prepared"
        )
    features = read_features(source).values()
    if options.text_key or not any("image" in feature for feature in features):
        refuse_unread(options, RECORDS)
        return load_records(source, options)
    refuse_unread(options, IMAGES)
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


# The fields of `data` that some data sets read and others do not.
TEXT = ("dir", "client", "length", "kilobytes", "test_kilobytes", "tokenizer")
RECORDS = (*TEXT, "text_key")  # text of TFDS
IMAGES = ("dir", "image_key", "label_key")  # images of TFDS
PREPARED = (*RECORDS, *IMAGES)  # until the features are known
FIELDS = ("file", *PREPARED)
READS: dict[str, tuple[str, ...]] = {  # by data set of the package
    "digits": (),
    "digit_pairs": (),
    "synthetic": (),
    "cifar10": IMAGES,
    "arrays": ("file",),
    "text": TEXT,
    # A client is a writer, whatever `client` is: studies of text set it for all data.
    "markov": ("client", "length"),
}

# A loader gets the config's group `data`.
DATASETS: dict[str, Callable[[ConfigDict], Data]] = {
    "digits": lambda options: load_digits(),
    "digit_pairs": lambda options: load_digit_pairs(),
    "synthetic": lambda options: load_synthetic(),
    "cifar10": load_cifar10,
    "arrays": load_arrays,
    "text": load_text,
    "markov": load_markov,
}
