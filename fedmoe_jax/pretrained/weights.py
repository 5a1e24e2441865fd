"""The weights of a pretrained decoder, from the `*.safetensors` of its folder."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_jax.options import UserError, show
from fedmoe_jax.pretrained.architecture import Architecture
from fedmoe_jax.pretrained.tensors import Tensor, list_tensors, walk
from fedmoe_jax.types import PyTree

BYTES = 4  # of a weight here, which is float32


def import_safetensors() -> Any:
    """The library `safetensors`.

    Raises:
      UserError: it is not installed.
    """
    try:
        import safetensors
    except ImportError:
        raise UserError(
            "model.base needs the package safetensors, which is not installed; "
            "allowed: pip install safetensors"
        ) from None
    return safetensors


def list_files(folder: Path) -> list[Path]:
    """The folder's `*.safetensors`.

    Raises:
      UserError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"model.base={show(str(folder))} has no *.safetensors; allowed: a folder "
            "with config.json and *.safetensors"
        )
    return files


def find_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor, from the files' heads alone.

    Raises:
      UserError: there are no files, or one is damaged.
    """
    library, found = import_safetensors(), {}
    for path in list_files(folder):
        try:
            with library.safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    shape = tuple(file.get_slice(name).get_shape())
                    found[name] = path, shape
        except (OSError, library.SafetensorError) as error:
            raise UserError(
                f"{path} is damaged ({error}); allowed: whole safetensors files"
            ) from None
    return found


def check_tensors(
    arch: Architecture, found: dict[str, tuple[Path, tuple[int, ...]]], folder: Path
) -> None:
    """Raises UserError unless all tensors are there, in the shapes of the config."""
    where = f"model.base={show(str(folder))}"
    for tensor in walk(list_tensors(arch)):
        for name in tensor.names:
            if name not in found:
                raise UserError(
                    f"{where} has no tensor {name}, which its config.json asks for; "
                    "allowed: all tensors of the architecture"
                )
            shape = found[name][1]
            if shape != tensor.file_shape:
                raise UserError(
                    f"{where} has {name} of shape {shape}; allowed by its config.json: "
                    f"{tensor.file_shape}"
                )


def measure_bytes(arch: Architecture) -> int:
    """Bytes of all weights as float32."""
    sizes = (len(t.names) * np.prod(t.file_shape) for t in walk(list_tensors(arch)))
    return BYTES * int(sum(sizes))


def map_tensors(make: Callable[[Tensor], Any], tree: dict) -> PyTree:
    """A tree with what `make` makes of every tensor."""
    return {
        name: make(each) if isinstance(each, Tensor) else map_tensors(make, each)
        for name, each in tree.items()
    }


def read_weights(arch: Architecture, folder: Path) -> PyTree:
    """All weights, float32.

    Raises:
      UserError: see `find_tensors`, `check_tensors`.
    """
    library, found = import_safetensors(), find_tensors(folder)
    check_tensors(arch, found, folder)
    files = {path: library.safe_open(path, "numpy") for path in list_files(folder)}

    def read(name: str) -> np.ndarray:
        return read_float(files[found[name][0]], name)

    def load(tensor: Tensor) -> np.ndarray:
        values = [tensor.convert(read(name)) for name in tensor.names]
        whole = np.stack(values) if len(values) > 1 else values[0]
        return np.ascontiguousarray(whole)

    return map_tensors(load, list_tensors(arch))


def read_float(file: Any, name: str) -> np.ndarray:
    """A tensor of any float type as float32; JAX has taught NumPy bfloat16."""
    return file.get_tensor(name).astype(np.float32)


def digest(folder: Path) -> str:
    """SHA-256 of the config and of all weights, by which a base is known."""
    files = [folder / "config.json", *list_files(folder)]
    return digest_files(tuple((path, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(8)
def digest_files(files: tuple[tuple[Path, int], ...]) -> str:
    """SHA-256 of files with their names, read again where their times change."""
    whole = hashlib.sha256()
    for path, _ in files:
        whole.update(path.name.encode())
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
