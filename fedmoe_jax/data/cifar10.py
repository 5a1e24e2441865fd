"""CIFAR-10 through TFDS, without TensorFlow: prepare, decode once, cache.

TFDS reads array_record without TensorFlow but neither extracts archives nor encodes
arrays without it, so `prepare_cifar10` replaces these two steps of TFDS's builder.
"""

import json
import os
import sys
import tarfile
import tempfile
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_jax.base import Data
from fedmoe_jax.data.cache import brief, cache_folders, find_decoded, keep_decoded
from fedmoe_jax.data.images import label_images
from fedmoe_jax.options import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE = "cifar-10-binary.tar.gz"
VERSION = "3.0.2"
MEMBERS = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
ARRAYS = ("train_x", "train_y", "test_x", "test_y", "label_names")
PROBE_SECONDS = 10
DECODE_BATCH = 1000  # images


def load_cifar10(data_dir: Path) -> Data:
    """Loads CIFAR-10 in its original order, preparing and decoding it where needed.

    Decoded arrays are kept beside the records, or in the user's cache folder where
    that folder is not writable, and belong to exactly these records.

    Raises:
      UserError: absent and not to be had, prepared as TFRECORD, or damaged.
    """
    source = prepare_cifar10(data_dir, manual_dir="")
    folders = cache_folders(source)
    if (found := find_decoded(folders, ARRAYS)) is not None:
        return _label(found)
    arrays = _decode(source)
    keep_decoded(folders if _is_writable(source) else folders[1:], arrays)
    return _label(arrays)


def _label(arrays: dict[str, np.ndarray]) -> Data:
    names = tuple(str(name) for name in arrays["label_names"])
    return label_images(*(arrays[name] for name in ARRAYS[:-1]), label_names=names)


def prepare_cifar10(data_dir: Path, manual_dir: str) -> Path:
    """Makes sure that CIFAR-10 is in `data_dir` as array_record.

    Args:
      data_dir: TFDS folder; nothing is changed if CIFAR-10 is there already.
      manual_dir: folder with `cifar-10-binary.tar.gz`, or empty to download it.

    Returns:
      The folder of the records, `data_dir/cifar10/3.0.2`.

    Raises:
      UserError: no network, wrong archive, no permission, or a TFRECORD folder. A
        failed attempt leaves nothing behind.
    """
    source = data_dir / "cifar10" / VERSION
    if not (source / "dataset_info.json").exists():
        _check_reachable(data_dir, manual_dir)
        _build(data_dir, manual_dir)
    _check_format(source)
    return source


def _check_format(source: Path) -> None:
    """Refuses TFRECORD, which cannot be read without TensorFlow."""
    try:
        info = json.loads((source / "dataset_info.json").read_text())
        form = info.get("fileFormat", "tfrecord")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"data.dir: {source / 'dataset_info.json'} cannot be read "
            f"({brief(error)}); delete {source} and start again"
        ) from error
    if form != "array_record":
        beside = source.parent.parent / "array_record"
        raise UserError(
            f"data.dir: {source} holds {form} files, allowed: array_record; run "
            f"'python -m fedmoe_jax.data --data_dir={beside}', then set data.dir or "
            f"TFDS_DATA_DIR to {beside}"
        )


def _check_reachable(data_dir: Path, manual_dir: str) -> None:
    """Fails in seconds, where TFDS would retry for minutes."""
    if manual_dir:
        if not (Path(manual_dir) / ARCHIVE).is_file():
            raise UserError(
                f"manual_dir={manual_dir!r} holds no {ARCHIVE}; allowed: a folder with "
                "that file, or none, to download it"
            )
        return
    import requests

    try:
        with requests.get(URL, stream=True, timeout=PROBE_SECONDS) as response:
            response.raise_for_status()
    except requests.RequestException as error:
        host = urllib.parse.urlsplit(URL).hostname
        reason = f"{host} cannot be reached: {type(error).__name__}"
        raise _absent(data_dir, reason) from error


def _absent(data_dir: Path, reason: str) -> UserError:
    return UserError(
        f"data.name='cifar10' is not in {data_dir} and cannot be prepared "
        f"({reason}); allowed: a data.dir that 'python -m fedmoe_jax.data --data_dir="
        f"{data_dir}' has prepared on a machine with network, or "
        "--config.data.name=digits"
    )


def _build(data_dir: Path, manual_dir: str) -> None:
    """Downloads and writes the records; leaves nothing behind if that fails."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import (
        NonMatchingChecksumError,
    )

    existed = data_dir.exists()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        config = tfds.download.DownloadConfig(
            try_download_gcs=False,
            manual_dir=Path(manual_dir) if manual_dir else None,
        )
        with tempfile.TemporaryDirectory(dir=data_dir, prefix="download-") as folder:
            _make_builder(data_dir).download_and_prepare(
                download_dir=folder, download_config=config
            )
    except (
        *(OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error),
        *(NonMatchingChecksumError, tfds.download.DownloadError),
    ) as error:
        _remove_empty(data_dir / "cifar10", *(() if existed else (data_dir,)))
        raise _absent(data_dir, brief(error)) from error


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def _make_builder(data_dir: Path) -> Any:
    """TFDS's builder of CIFAR-10 without the two steps that need TensorFlow."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.image_classification import cifar

    with tfds.core.registered.skip_registration():
        # The name of the class is the name of the data set.
        class Cifar10(cifar.Cifar10):
            VERSION = tfds.core.Version(VERSION)
            pkg_dir_path = None

            def _split_generators(self, dl_manager):
                archive = Path(dl_manager.download(URL))
                text = _read_member(archive, "batches.meta.txt").decode()
                self.info.features["label"].names = text.split()
                return {split: _read_examples(archive, split) for split in MEMBERS}

    return Cifar10(data_dir=str(data_dir), file_format="array_record")


def _read_member(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"cifar-10-batches-bin/{name}")
        assert member is not None  # it is a file
        return member.read()


def _read_examples(archive: Path, split: str) -> Iterator[tuple[int, dict]]:
    """Yields the examples of the binary version with TFDS's keys and ids."""
    from PIL import Image

    start = 0
    for name in MEMBERS[split]:
        raw = np.frombuffer(_read_member(archive, name), np.uint8)
        rows = raw.reshape(-1, 1 + 3 * 32 * 32)
        images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        for i, (image, label) in enumerate(zip(images, rows[:, 0], strict=True), start):
            png = Image.fromarray(np.ascontiguousarray(image))
            yield i, {"id": f"{split}_{i:05d}", "image": png, "label": int(label)}
        start += len(rows)


def _is_writable(folder: Path) -> bool:
    """Whether we may write; a folder without write bits is left alone even by root."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _decode(source: Path) -> dict[str, np.ndarray]:
    """The `ARRAYS` of both splits in original order; about half a minute of PNG."""
    import tensorflow_datasets as tfds

    print(f"decoding CIFAR-10 from {source}, once", file=sys.stderr, flush=True)
    try:
        builder = tfds.builder_from_directory(source)
        train = _decode_split(builder.as_data_source("train"))
        test = _decode_split(builder.as_data_source("test"))
        names = np.array(builder.info.features["label"].names)
    except ImportError:
        raise
    # array_record reports damage as RuntimeError, TFDS in several other ways.
    except Exception as error:
        raise UserError(
            f"data.dir: CIFAR-10 in {source} is damaged ({brief(error)}); delete "
            "that folder and prepare it again with python -m fedmoe_jax.data"
        ) from error
    return dict(zip(ARRAYS, (*train, *test, names), strict=True))


def _decode_split(records: Any) -> tuple[np.ndarray, np.ndarray]:
    """Images [X, 32, 32, 3] uint8 and labels [X] int32, placed by TFDS `id`."""
    total = len(records)
    x = np.zeros((total, 32, 32, 3), np.uint8)
    y = np.full(total, -1, np.int32)
    for start in range(0, total, DECODE_BATCH):
        batch = range(start, min(start + DECODE_BATCH, total))
        for record in records.__getitems__(list(batch)):
            place = int(record["id"].decode().rpartition("_")[2])
            x[place], y[place] = record["image"], record["label"]
    if (y < 0).any():
        raise ValueError("ids are not 0, 1, 2, ...")
    return x, y
