"""The folder where prepared data sets are."""

import os
from pathlib import Path

from fedmoe_jax.runtime.folders import resolve_folder


def resolve_data_dir(data_dir: str) -> Path:
    """The TFDS folder: `data_dir`, else TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      UserError: see `resolve_folder`.
    """
    shared = os.environ.get("TFDS_DATA_DIR")
    if shared and not data_dir:
        return resolve_folder("TFDS_DATA_DIR", shared)
    return resolve_folder("data.dir", data_dir or "~/tensorflow_datasets")
