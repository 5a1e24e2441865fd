"""Data sets of TFDS, prepared without TensorFlow.

    python -m fedmoe_jax.data NAME --data_dir=DIR [--manual_dir=DIR]

prepares the data set NAME, as `mnist` or `emnist/byclass`, in array_record form by
TFDS's own builder. `--manual_dir` is a folder that holds its files fetched by hand.
"""

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags, logging

from fedmoe_jax.data.folders import resolve_data_dir
from fedmoe_jax.data.stand_in import (
    NeedsTensorFlow,
    has_tensorflow,
    replace,
    stand_in,
)
from fedmoe_jax.data.tfds import COMMAND, INFO, NAME, check_format, find_source
from fedmoe_jax.options import UserError, show
from fedmoe_jax.runtime.files import brief
from fedmoe_jax.runtime.folders import resolve_folder

# Labelled images whose builders compute with TensorFlow: refused before the download.
NEED_TENSORFLOW = ("cats_vs_dogs", "cifar10_h", "dmlab", "imagenet2012_corrupted")
NEED_TENSORFLOW += ("oxford_iiit_pet", "sun397")
CONNECT, READ = 10, 60  # seconds until a server counts as silent


def prepare(name: str, data_dir: Path, manual_dir: str = "") -> Path:
    """Makes sure that a data set is in `data_dir` as array_record.

    Args:
      name: of a data set of TFDS, perhaps with its config: `emnist/byclass`.
      data_dir: TFDS folder; nothing is changed if the data set is there already.
      manual_dir: folder with the files that TFDS would download, under their own
        names; empty to download them.

    Returns:
      The folder of the records, `data_dir/NAME/VERSION`.

    Raises:
      UserError: no such data set, no network, other files than those expected, a
        builder that needs TensorFlow or a package that is not installed, no permission,
        or a TFRECORD folder. A failed attempt leaves nothing behind.
    """
    source = find_source(data_dir, name)
    if source is None:
        with stand_in(), quieten():
            builder = make_builder(name, data_dir)
            source = Path(builder.data_path)  # its config may be one by default
            if not (source / INFO).exists():
                build(builder, name, data_dir, manual_dir)
    check_format(source, str(source.parent.relative_to(data_dir)))
    return source


@contextlib.contextmanager
def quieten() -> Iterator[None]:
    """Keeps what TFDS logs to itself, and its progress where nobody looks on."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    kept = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(kept)


def make_builder(name: str, data_dir: Path) -> Any:
    """TFDS's builder of a data set.

    Raises:
      UserError: there is none, or it cannot be made.
    """
    import tensorflow_datasets as tfds

    fault = f"data.name={show(name)} is unknown to TFDS"
    if not NAME.fullmatch(name):
        raise UserError(f"{fault}; allowed: a name such as mnist or emnist/byclass")
    title, _, config = name.partition("/")
    if title in NEED_TENSORFLOW and not has_tensorflow():
        raise explain(name, data_dir, NeedsTensorFlow("operations"))
    try:
        kind = tfds.builder_cls(title)
        known = [f"{title}/{each}" for each in kind.builder_configs]
        if config and name not in known:
            raise UserError(f"{fault}; allowed: {', '.join(known) or title}")
        return kind(config=config or None, data_dir=os.fspath(data_dir))
    except tfds.core.registered.DatasetNotFoundError:
        raise UserError(
            f"{fault}; allowed: a name of its catalogue, such as mnist or "
            "emnist/byclass"
        ) from None
    except UserError:
        raise
    # Builders are the work of many.
    except Exception as error:
        raise explain(name, data_dir, error) from error


def build(builder: Any, name: str, data_dir: Path, manual_dir: str) -> None:
    """Downloads and writes the records; leaves nothing behind if that fails.

    Raises:
      UserError: see `prepare`.
    """
    import tensorflow_datasets as tfds

    existed = data_dir.exists()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        config = tfds.download.DownloadConfig(
            try_download_gcs=False,
            manual_dir=Path(manual_dir) if manual_dir else None,
        )
        with (
            tempfile.TemporaryDirectory(dir=data_dir, prefix="download-") as folder,
            limit_downloads(builder, manual_dir),
            raise_file_limit(),
        ):
            builder.download_and_prepare(
                download_dir=folder,
                download_config=config,
                file_format="array_record",
            )
    except Exception as error:
        clear(builder, data_dir)
        if not existed:
            remove_empty(data_dir)
        raise explain(name, data_dir, error) from error


@contextlib.contextmanager
def limit_downloads(builder: Any, manual_dir: str) -> Iterator[None]:
    """Makes downloads fail in seconds, where TFDS would retry for minutes."""
    from tensorflow_datasets.core.download import downloader

    open_url = functools.partial(downloader._open_url, timeout=(CONNECT, READ))
    if manual_dir:
        open_url = lambda url, **options: refuse_download(builder, manual_dir, url)
    with replace(downloader, MAX_RETRIES=1, _open_url=open_url):
        yield


def refuse_download(builder: Any, manual_dir: str, url: str) -> Any:
    """Raises UserError: a file was to be in this folder and is not."""
    expected = (builder.url_infos or {}).get(url)
    name = expected and expected.filename or Path(urllib.parse.urlsplit(url).path).name
    raise UserError(
        f"manual_dir={manual_dir!r} holds no {name}; allowed: a folder with that file "
        f"of {url}, or none, to download it"
    )


@contextlib.contextmanager
def raise_file_limit() -> Iterator[None]:
    """Lets TFDS open the 1,000 files through which it shuffles large data sets."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def explain(name: str, data_dir: Path, error: Exception) -> UserError:
    """Why a data set cannot be prepared, and what to do."""
    import requests

    if isinstance(error, UserError):
        return error
    command = f"'{COMMAND} {name} --data_dir={data_dir}'"
    fault = f"data.name={name!r} cannot be prepared in {data_dir}"
    if isinstance(error, NeedsTensorFlow):
        return UserError(
            f"{fault}, as its builder needs {error} of TensorFlow; allowed: {command} "
            "after 'pip install tensorflow', or another data set"
        )
    if isinstance(error, ModuleNotFoundError):
        return UserError(
            f"{fault}, as its builder needs the package {error.name}; allowed: "
            f"{command} with it installed, or another data set"
        )
    reason = brief(error)
    if isinstance(error, requests.RequestException) and error.request is not None:
        host = urllib.parse.urlsplit(error.request.url).hostname
        reason = f"{host} cannot be reached: {type(error).__name__}"
    return UserError(
        f"{fault} ({reason}); allowed: {command} on a machine with network, or with "
        "--manual_dir=FOLDER of its files, or another data set, as of a study's digits "
        "(--config=FILE:digits,smoke)"
    )


def clear(builder: Any, data_dir: Path) -> None:
    """Removes the folders that a failed attempt has made, with nothing of others."""
    shared = data_dir / builder.name
    remove_empty(Path(builder.data_path).parent)
    if shared.is_dir() and [path.name for path in shared.iterdir()] == [".config"]:
        shutil.rmtree(shared)
    remove_empty(shared)


def remove_empty(folder: Path) -> None:
    """Removes a folder without content."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def main(argv: list[str]) -> None:
    """Prepares a data set from the flags; exit code 2 on a mistake."""
    try:
        if len(argv) != 2:
            raise UserError(
                f"{COMMAND} has the arguments {argv[1:]}; allowed: the name of one "
                "data set, such as mnist or emnist/byclass"
            )
        data_dir, manual = resolve_data_dir(flags.FLAGS.data_dir), ""
        if flags.FLAGS.manual_dir:
            manual = os.fspath(resolve_folder("manual_dir", flags.FLAGS.manual_dir))
        folder = prepare(argv[1], data_dir, manual)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    name = folder.parent.relative_to(data_dir)
    print(
        f"{name} is ready in {folder}; use it with data.name={name} and "
        f"TFDS_DATA_DIR={data_dir}"
    )


def define_flags() -> None:
    """Defines the flags of `main`; importing this module must add none to a program."""
    flags.DEFINE_string(
        "data_dir", "", "TFDS folder; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets"
    )
    flags.DEFINE_string(
        "manual_dir", "", "folder with the data set's files; empty: download them"
    )
