"""Labelled images of the user's own, in one .npz file.

    np.savez("mine.npz", train_x=..., train_y=..., test_x=..., test_y=...)

`train_x` and `test_x` are images [X, H, W, F], or [X, H, W] of one channel, uint8 or
floats; `train_y` and `test_y` are labels [X], whole numbers from 0. `train_client` and
`test_client` [X] name each example's client, `label_names` [L] the labels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.data.images import label_images
from fedmoe_jax.options import INT32, UserError
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
        for name in (f"{part}_y", f"{part}_client"):
            if name in arrays and not is_counting(arrays[name], len(x)):
                count = f"{len(x)} whole numbers >= 0, one for each image"
                misfit(path, describe(arrays, name), count)
        images[part] = x
    train_y, test_y = (arrays[f"{part}_y"].astype(np.int32) for part in PARTS)
    most = 1 + int(max(train_y.max(), test_y.max()))
    names = tuple(map(str, np.ravel(arrays.get("label_names", np.arange(most)))))
    if len(names) < most:
        misfit(path, f"has {len(names)} label_names", f"at least {most}")
    found = images["train"], train_y, images["test"], test_y
    owner, test_owner = number_clients(arrays, path)
    return label_images(*found, names)._replace(owner=owner, test_owner=test_owner)


def describe(arrays: Mapping[str, np.ndarray], name: str) -> str:
    """That a file has an array of that form."""
    return f"has {name} {arrays[name].dtype}{list(arrays[name].shape)}"


def is_counting(y: np.ndarray, count: int) -> bool:
    """Whether these are so many whole numbers that are not negative."""
    whole = y.ndim == 1 and np.issubdtype(y.dtype, np.integer)
    return bool(whole and len(y) == count and y.min() >= 0 and y.max() <= INT32)


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
    for strange in np.setdiff1d(tested, clients):
        fault = f"has no training example of the test_client {strange}"
        misfit(path, fault, "clients of train_client")
    return owner, np.searchsorted(clients, tested)


def as_images(x: np.ndarray) -> np.ndarray | None:
    """Images [X, H, W, F] as uint8 or float32; None where these are none."""
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
        return None
    return x if x.dtype == np.uint8 else x.astype(np.float32)
