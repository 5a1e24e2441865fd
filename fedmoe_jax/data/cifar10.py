"""CIFAR-10 for TFDS, prepared without TensorFlow.

TFDS reads array_record without TensorFlow but neither extracts archives nor encodes
arrays without it, so `prepare_cifar10` replaces these two steps of TFDS's builder.
"""

import tarfile
import tempfile
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.base import Data
from fedmoe_jax.data.cache import brief
from fedmoe_jax.data.folders import resolve_data_dir
from fedmoe_jax.data.tfds import INFO, check_format, load_images
from fedmoe_jax.options import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE = "cifar-10-binary.tar.gz"
VERSION = "3.0.2"
MEMBERS = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
PROBE_SECONDS = 10


def load_cifar10(options: ConfigDict) -> Data:
    """Loads CIFAR-10 in its original order, preparing it where it is absent.

    Args:
      options: the config's group `data`.

    Raises:
      UserError: absent and not to be had, prepared as TFRECORD, or damaged.
    """
    return load_images(prepare_cifar10(resolve_data_dir(options.dir), ""), options)


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
    if not (source / INFO).exists():
        _check_reachable(data_dir, manual_dir)
        _build(data_dir, manual_dir)
    beside = data_dir / "array_record"
    check_format(
        source,
        f"run 'python -m fedmoe_jax.data --data_dir={beside}', then set data.dir or "
        f"TFDS_DATA_DIR to {beside}",
    )
    return source


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
