"""Labelled images of the user's own, in one .npz file.

    np.savez("mine.npz", train_x=..., train_y=..., test_x=..., test_y=...)

`train_x` and `test_x` are images [X, H, W, F], or [X, H, W] of one channel, uint8 or
floats; `train_y` and `test_y` are labels [X], whole numbers from 0. `train_client` and
`test_client` [X] name each example's client, by whole numbers or by texts, and
`label_names` [L] the labels.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.data.images import label_images, name_numbers
from fedmoe_jax.options import INT32, UserError, show
from fedmoe_jax.runtime.files import brief
from fedmoe_jax.runtime.folders import resolve_folder

PARTS = ("train", "test")
NEEDED = ("train_x", "train_y", "test_x", "test_y")
ALLOWED = (*NEEDED, "train_client", "test_client", "label_names")


def load_arrays(options: ConfigDict) -> Data:
    """Loads the arrays of `options.file`; pickled objects are never read.

    Raises:
      UserError: the file cannot be read, lacks an array, has one of another name, or
        they do not fit each other.
    """
    if not options.file:
        raise UserError(
            "data.file='' is not allowed with data.name='arrays'; allowed: a .npz file"
        )
    path = resolve_folder("data.file", options.file)
    return label_arrays(read_file(path), path)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, by name.

    Raises:
      UserError: it is none, or holds objects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    # A damaged file raises a dozen unrelated kinds of exception, a .npy file another.
    except Exception as error:
        raise UserError(
            f"data.file={str(path)!r} cannot be read ({brief(error)}); allowed: a .npz "
            "file of arrays of numbers"
        ) from error


def misfit(path: Path, fault: str, allowed: str) -> NoReturn:
    """Raises UserError: the file does not fit, as it has this fault."""
    raise UserError(f"data.file={str(path)!r} {fault}; allowed: {allowed}")


def label_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> Data:
    """`Data` of the arrays of a file, see `load_arrays`."""
    for name in NEEDED:
        if name not in arrays:
            misfit(path, f"has no {name}", ", ".join(ALLOWED))
    for name in arrays:
        if name not in ALLOWED:
            misfit(path, f"has {name}", ", ".join(ALLOWED))
    images = {}
    for part in PARTS:
        x = as_images(arrays[f"{part}_x"])
        if x is None or not len(x) or not np.isfinite(x).all():
            form = describe(arrays, f"{part}_x")
            misfit(
                path, form, "images [X, H, W, F] or [X, H, W], uint8 or finite floats"
            )
        name, allowed = f"{part}_y", f"{len(x)} whole numbers >= 0"
        if not is_counting(arrays[name], len(x)):
            misfit(path, describe(arrays, name), f"{allowed}, one for each image")
        name, allowed = f"{part}_client", f"{allowed} or texts"
        if name in arrays and not is_naming(arrays[name], len(x)):
            misfit(path, describe(arrays, name), f"{allowed}, one for each image")
        images[part] = x
    names = name_labels(arrays, path)
    train_y, test_y = (arrays[f"{part}_y"].astype(np.int32) for part in PARTS)
    found = images["train"], train_y, images["test"], test_y
    owner, test_owner = number_clients(arrays, path)
    return label_images(*found, names)._replace(owner=owner, test_owner=test_owner)


def name_labels(arrays: Mapping[str, np.ndarray], path: Path) -> tuple[str, ...]:
    """The names of all labels from 0: the file's, else their numbers."""
    labels = [arrays[f"{part}_y"] for part in PARTS]
    if "label_names" not in arrays:
        where = f"data.file={str(path)!r}"
        return name_numbers(labels, where, ", or label_names of all")
    given, high = arrays["label_names"], max(int(y.max()) for y in labels)
    if given.ndim != 1:
        misfit(path, describe(arrays, "label_names"), "names [L], one for each label")
    names = tuple(map(str, given))
    if len(names) <= high:
        allowed = f"at least {high + 1}, one for each label from 0 to {high}"
        misfit(path, f"has {len(names)} label_names", allowed)
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        misfit(path, f"has {show(name)} {times} times in label_names", "each once")
    return names


def describe(arrays: Mapping[str, np.ndarray], name: str) -> str:
    """That a file has an array of that form."""
    return f"has {name} {arrays[name].dtype}{list(arrays[name].shape)}"


def is_counting(y: np.ndarray, count: int) -> bool:
    """Whether these are so many whole numbers that are not negative."""
    whole = y.ndim == 1 and np.issubdtype(y.dtype, np.integer)
    return bool(whole and len(y) == count and y.min() >= 0 and y.max() <= INT32)


def is_naming(ids: np.ndarray, count: int) -> bool:
    """Whether these are so many texts, or whole numbers that are not negative."""
    texts = ids.ndim == 1 and is_text(ids) and len(ids) == count
    return texts or is_counting(ids, count)


def is_text(ids: np.ndarray) -> bool:
    """Whether these are texts, instead of numbers."""
    return ids.dtype.kind == "U"


def number_clients(
    arrays: Mapping[str, np.ndarray], path: Path
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The clients of training and test examples, numbered from 0 without a gap."""
    owner, tested = (arrays.get(f"{part}_client") for part in PARTS)
    if owner is None:
        if tested is not None:
            misfit(path, "has test_client", "train_client beside it")
        return None, None
    clients, owner = np.unique(owner, return_inverse=True)
    if tested is None:
        return owner, None
    if is_text(tested) != is_text(clients):
        kind = "texts" if is_text(clients) else "whole numbers"
        misfit(path, describe(arrays, "test_client"), f"{kind}, as in train_client")
    for strange in np.setdiff1d(tested, clients):
        fault = f"has no training example of the test_client {show(strange.item())}"
        misfit(path, fault, "clients of train_client")
    return owner, np.searchsorted(clients, tested)


def as_images(x: np.ndarray) -> np.ndarray | None:
    """Images [X, H, W, F] as uint8 or float32; None where these are none."""
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
        return None
    return x if x.dtype == np.uint8 else x.astype(np.float32)
