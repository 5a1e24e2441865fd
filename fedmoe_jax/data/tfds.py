"""Labelled images of any TFDS data set in array_record form, without TensorFlow.

Records are decoded once. The decoded arrays are kept beside them, or in the user's
cache folder where theirs is not writable, and belong to exactly these records.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.data.cache import brief, cache_folders, find_decoded, keep_decoded
from fedmoe_jax.data.images import label_images, name_numbers
from fedmoe_jax.options import UserError

ARRAYS = ("train_x", "train_y", "test_x", "test_y", "label_names")
SPLITS = ("train", "test")
DECODE_BATCH = 1000  # images
COMMAND = "python -m fedmoe_jax.data"  # which prepares data sets
ID = "id"  # a text feature by which examples are sorted, where a data set has it
INFO = "dataset_info.json"
NAME = re.compile(r"\w+(/[\w.+-]+)?")  # of a data set and its config

Features = Mapping[str, Mapping[str, Any]]  # as features.json has them, by key


def find_source(data_dir: Path, name: str) -> Path | None:
    """The folder of the newest version of a data set, `data_dir/NAME/VERSION`.

    Args:
      data_dir: TFDS folder.
      name: as `mnist` or `emnist/byclass`.

    Returns:
      None where it is not there.
    """
    if not NAME.fullmatch(name):
        return None
    found = [path.parent for path in (data_dir / name).glob(f"*/{INFO}")]
    number = lambda part: int(part) if part.isdigit() else -1
    version = lambda path: [number(part) for part in path.name.split(".")]
    return max(found, key=version, default=None)


def list_prepared(data_dir: Path, name: str) -> list[str]:
    """The names under which a data set is there, with whatever config.

    Args:
      data_dir: TFDS folder.
      name: as `emnist`, or `emnist/byclass` for any config of the same.
    """
    if not NAME.fullmatch(name):
        return []
    title = name.partition("/")[0]
    found = (data_dir / title).glob(f"*/*/{INFO}")
    configs = sorted({path.parents[1].name for path in found})
    names = [title, *(f"{title}/{config}" for config in configs)]
    return [each for each in names if find_source(data_dir, each) is not None]


def check_format(source: Path, name: str) -> None:
    """Refuses TFRECORD, which cannot be read without TensorFlow.

    Args:
      source: folder of the records.
      name: of the data set.

    Raises:
      UserError: the records have another form than array_record, or their form cannot
        be told.
    """
    try:
        info = json.loads((source / INFO).read_text())
        form = info.get("fileFormat", "tfrecord")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"data.dir: {source / INFO} cannot be read ({brief(error)}); delete "
            f"{source} and prepare it again"
        ) from error
    if form != "array_record":
        beside = source.parents[1 + name.count("/")] / "array_record"
        raise UserError(
            f"data.dir: {source} holds {form} files, allowed: array_record; run "
            f"'{COMMAND} {name} --data_dir={beside}', then set data.dir or "
            f"TFDS_DATA_DIR to {beside}"
        )


def read_features(source: Path) -> Features:
    """The features of a data set by key, as `features.json` describes them.

    Raises:
      UserError: it cannot be read, or features are not a flat dict.
    """
    path = source / "features.json"
    try:
        features = json.loads(path.read_text())["featuresDict"]["features"]
        return {key: dict(feature) for key, feature in features.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data.dir: {path} cannot be read ({brief(error)}); allowed: the file of a "
            "prepared data set whose features are a dict"
        ) from error


def is_label(feature: Mapping[str, Any]) -> bool:
    """Whether a feature is a class, or one whole number."""
    tensor = feature.get("tensor", {})
    whole = "int" in str(tensor.get("dtype", ""))
    return "classLabel" in feature or (whole and not tensor.get("shape", {}))


def choose_key(features: Features, field: str, wanted: str, kind: str) -> str:
    """The key of the one feature of a kind, or the one that the config names.

    Args:
      features: of the data set.
      field: of the config, for messages.
      wanted: its value; empty for the only feature, or the one that is called as its
        kind among several.
      kind: `image` or `label`.

    Raises:
      UserError: no such feature, or several.
    """
    fits = is_label if kind == "label" else lambda feature: kind in feature
    known = [key for key, feature in features.items() if fits(feature)]
    if wanted in known:
        return wanted
    if not wanted and kind in known:
        return kind
    if not wanted and len(known) == 1:
        return known[0]
    listed = ", ".join(known) or f"none, as the data set has no {kind}"
    raise UserError(f"{field}={wanted!r} is not allowed; allowed: {listed}")


def load_images(source: Path, options: ConfigDict) -> Data:
    """The labelled images of a prepared data set, decoded where that is not done yet.

    Examples are sorted by their `id`, where they have one, else in the order of the
    records.

    Args:
      source: folder of the records.
      options: the group `data`, with `image_key` and `label_key`, empty for the only
        feature of the kind.

    Raises:
      UserError: in another file format, damaged, without a split `train` or `test`, or
        without one image of fixed size and one label.
    """
    check_format(source, options.name)
    features = read_features(source)
    keys = [
        choose_key(features, f"data.{kind}_key", options[f"{kind}_key"], kind)
        for kind in ("image", "label")
    ]
    named = [options.image_key, options.label_key]
    folders = cache_folders(source, named if any(named) else [])
    arrays = find_decoded(folders, ARRAYS)
    if arrays is None:
        arrays = decode(source, keys[0], keys[1], ID in features)
        keep_decoded(folders if is_writable(source) else folders[1:], arrays)
    names = tuple(str(name) for name in arrays["label_names"])
    return label_images(*(arrays[name] for name in ARRAYS[:-1]), label_names=names)


def is_writable(folder: Path) -> bool:
    """Whether we may write; a folder without write bits is left alone even by root."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


@contextlib.contextmanager
def open_records(source: Path) -> Iterator[Any]:
    """Yields TFDS's builder of a prepared data set with the `SPLITS`.

    Raises:
      UserError: a split is missing, or, while records are read, they are damaged.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(source)
        missing = [split for split in SPLITS if split not in builder.info.splits]
        if missing:
            raise UserError(
                f"data.dir: {source} has no split {missing[0]!r}; allowed: data with "
                f"the splits train and test, this has {', '.join(builder.info.splits)}"
            )
        yield builder
    except (ImportError, UserError):
        raise
    # array_record reports damage as RuntimeError, TFDS in several other ways.
    except Exception as error:
        raise UserError(
            f"data.dir: the records in {source} are damaged ({brief(error)}); delete "
            "that folder and prepare it again"
        ) from error


def decode(source: Path, image: str, label: str, sort: bool) -> dict[str, np.ndarray]:
    """The `ARRAYS` of both splits; about half a minute for 60,000 PNGs.

    Args:
      source: folder of the records.
      image: key of the images.
      label: key of the labels.
      sort: whether examples are in the order of their `id`.

    Raises:
      UserError: see `load_images`.
    """
    print(f"decoding {source.parent.name} from {source}, once", file=sys.stderr)
    with open_records(source) as builder:
        parts = [
            decode_split(builder.as_data_source(split), image, label, sort)
            for split in SPLITS
        ]
        names = getattr(builder.info.features[label], "names", None)
    if names is None:
        names = name_numbers([y for _, y in parts], f"data.label_key={label!r}")
    (train_x, train_y), (test_x, test_y) = ((x, y.astype(np.int32)) for x, y in parts)
    values = train_x, train_y, test_x, test_y, np.array(names)
    return dict(zip(ARRAYS, values, strict=True))


def decode_split(
    records: Any, image: str, label: str, sort: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Images [X, H, W, F] uint8 and labels [X] int64 of one split.

    Raises:
      UserError: images of several sizes or of no bytes.
    """
    total = len(records)
    first = np.asarray(records[0][image])
    if first.dtype != np.uint8:
        raise UserError(
            f"data.image_key={image!r} has {first.dtype} images; allowed: uint8"
        )
    x, y = np.zeros((total, *first.shape), np.uint8), np.zeros(total, np.int64)
    ids = np.empty(total, object)
    for start in range(0, total, DECODE_BATCH):
        batch = range(start, min(start + DECODE_BATCH, total))
        for i, record in zip(batch, records.__getitems__(list(batch)), strict=True):
            found = np.asarray(record[image])
            if found.shape != first.shape:
                raise UserError(
                    f"data.image_key={image!r} has images of {list(first.shape)} and "
                    f"{list(found.shape)} pixels; allowed: one size for all"
                )
            x[i], y[i] = found, record[label]
            ids[i] = record[ID] if sort else i
    order = np.argsort(ids, kind="stable")
    return x[order], y[order]
