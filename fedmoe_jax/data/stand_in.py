"""TensorFlow's part in most of TFDS's builders, without TensorFlow.

Builders and TFDS itself open files and encode images through TensorFlow. Python opens
files as well, and Pillow encodes images.
"""

import contextlib
import glob
import importlib.util
import io
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

JPEG_QUALITY = 95  # TensorFlow's


class NeedsTensorFlow(ImportError):
    """A builder asks for more of TensorFlow than files and images."""


class StandIn:
    """A module with some members; asking for another one raises `NeedsTensorFlow`."""

    def __init__(self, name: str, **members: Any):
        self.__dict__.update(members)
        self._name = name

    def __getattr__(self, member: str) -> Any:
        raise NeedsTensorFlow(f"{self._name}.{member}")


def open_file(path: str | os.PathLike, mode: str = "r") -> Any:
    """Opens a file as `tf.io.gfile.GFile` does: UTF-8, and lines that end in \\n."""
    if "b" in mode:
        return open(path, mode)
    return open(path, mode, encoding="utf-8", newline="\n")


def list_matches(pattern: str | os.PathLike) -> list[str]:
    """The paths that match a pattern, sorted."""
    return sorted(glob.glob(os.fspath(pattern)))


def to_text(text: str | bytes) -> str:
    """A text, or UTF-8, as text."""
    return text.decode() if isinstance(text, bytes) else text


FILES = StandIn(
    "tf.io.gfile",
    GFile=open_file,
    copy=lambda source, target, overwrite=False: shutil.copyfile(source, target),
    exists=os.path.exists,
    glob=list_matches,
    isdir=os.path.isdir,
    listdir=os.listdir,
    makedirs=lambda path: os.makedirs(path, exist_ok=True),
    remove=os.remove,
    walk=os.walk,
)
TENSORFLOW = StandIn(
    "tf",
    io=StandIn("tf.io", gfile=FILES),
    compat=StandIn("tf.compat", as_text=to_text),
    # What it raises where Python raises an OSError.
    errors=StandIn(
        "tf.errors", UnimplementedError=(), ResourceExhaustedError=(), NotFoundError=()
    ),
)


def encode_image(encoder: Any, image: np.ndarray) -> bytes:
    """An image [H, W, F] as PNG or JPEG, as the feature's encoder says."""
    from PIL import Image
    from tensorflow_datasets.core.features import image_feature

    image_feature._validate_np_array(image, encoder.shape, encoder.np_dtype)
    kind = encoder.encoding_format
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    buffer = io.BytesIO()
    options = {"quality": JPEG_QUALITY} if kind == "jpeg" else {}
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def has_tensorflow() -> bool:
    """Whether TensorFlow is installed."""
    return importlib.util.find_spec("tensorflow") is not None


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Makes TFDS do without TensorFlow; where it is installed nothing changes."""
    if has_tensorflow():
        yield
        return
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.core.utils import lazy_imports_utils

    # TFDS imports TensorFlow when it is first used, and keeps it here.
    lazy, encoder = vars(lazy_imports_utils.tensorflow), image_feature._ImageEncoder
    with replace(encoder, _encode_image=encode_image):
        lazy["_module"] = TENSORFLOW
        try:
            yield
        finally:
            del lazy["_module"]


@contextlib.contextmanager
def replace(owner: Any, **members: Any) -> Iterator[None]:
    """Gives a module or class other members for a while."""
    kept = {name: getattr(owner, name) for name in members}
    for name, member in members.items():
        setattr(owner, name, member)
    try:
        yield
    finally:
        for name, member in kept.items():
            setattr(owner, name, member)
