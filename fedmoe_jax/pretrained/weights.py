"""The weights of a pretrained decoder, from the `*.safetensors` of its folder."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedmoe_jax.options import UserError, show
from fedmoe_jax.pretrained.architecture import Architecture
from fedmoe_jax.pretrained.tensors import Tensor, list_tensors, walk
from fedmoe_jax.runtime.files import read_json
from fedmoe_jax.runtime.sharding import align
from fedmoe_jax.types import PyTree

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights that are read


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
    """The files of the weights: of the index, `model.safetensors`, or all there are.

    Raises:
      UserError: there are none.
    """
    index, whole = (folder / name for name in (INDEX, "model.safetensors"))
    if index.is_file():
        places = read_json(index).get("weight_map")
        names = set(places.values()) if isinstance(places, dict) else set()
        files = sorted(folder / str(name) for name in names)
    else:
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"model.base={show(str(folder))} has no *.safetensors; allowed: a folder "
            "with config.json and *.safetensors"
        )
    return files


class Place(NamedTuple):
    """Where a tensor is: its file, its shape, its type by the name in the file."""

    path: Path
    shape: tuple[int, ...]
    kind: str


def find_tensors(folder: Path) -> dict[str, Place]:
    """The places of all tensors, from the files' heads alone.

    Raises:
      UserError: there are no files, one is damaged, or two have the same tensor.
    """
    library, found = import_safetensors(), {}
    for path in list_files(folder):
        try:
            with library.safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    place = file.get_slice(name)
                    if name in found:
                        raise UserError(
                            f"{name} is in {found[name].path} and {path}; allowed: "
                            f"each once, or an index, {INDEX}"
                        )
                    shape = tuple(place.get_shape())
                    found[name] = Place(path, shape, place.get_dtype())
        except (OSError, library.SafetensorError) as error:
            raise UserError(
                f"{path} is damaged ({error}); allowed: whole safetensors files"
            ) from None
    return found


def check_tensors(arch: Architecture, found: dict[str, Place], folder: Path) -> None:
    """Raises UserError unless all tensors are there, floats of the config's shapes."""
    where = f"model.base={show(str(folder))}"
    for tensor in walk(list_tensors(arch)):
        for name in tensor.names:
            if name not in found:
                raise UserError(
                    f"{where} has no tensor {name}, which its config.json asks for; "
                    "allowed: all tensors of the architecture"
                )
            shape, kind = found[name].shape, found[name].kind
            if kind not in FLOATS:
                raise UserError(
                    f"{where} has {name} of type {kind}; allowed: "
                    f"{', '.join(FLOATS)}, as weights that are not quantised have"
                )
            if shape != tensor.file_shape:
                raise UserError(
                    f"{where} has {name} of shape {shape}; allowed: "
                    f"{tensor.file_shape}, as its config.json says"
                )


def map_tensors(make: Callable[[Tensor], Any], tree: dict) -> PyTree:
    """A tree with what `make` makes of every tensor."""
    return {
        name: make(each) if isinstance(each, Tensor) else map_tensors(make, each)
        for name, each in tree.items()
    }


def read_weights(arch: Architecture, folder: Path, dtype: str) -> PyTree:
    """All weights in one float type, each from float32; JAX teaches NumPy bfloat16.

    Raises:
      UserError: see `find_tensors`, `check_tensors`.
    """
    library, found = import_safetensors(), find_tensors(folder)
    check_tensors(arch, found, folder)
    files = {path: library.safe_open(path, "numpy") for path in list_files(folder)}

    def read(name: str) -> np.ndarray:
        return read_float(files[found[name].path], name)

    def load(tensor: Tensor) -> np.ndarray:
        cast = lambda value: value.astype(jnp.dtype(dtype))
        values = [cast(tensor.convert(read(name))) for name in tensor.names]
        # Else a device on a CPU would have a second copy beside the host's.
        return align(np.stack(values) if len(values) > 1 else values[0])

    return map_tensors(load, list_tensors(arch))


def read_float(file: Any, name: str) -> np.ndarray:
    """A tensor of any float type as float32; JAX has taught NumPy bfloat16."""
    return file.get_tensor(name).astype(np.float32)


def list_states(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Absolute path, time and size of the config and of all files of weights."""
    paths = [folder / "config.json", *list_files(folder)]
    states = [(str(path.resolve()), path.stat()) for path in paths]
    return tuple((path, state.st_mtime_ns, state.st_size) for path, state in states)


def digest(folder: Path) -> str:
    """SHA-256 of the config and of all weights, by which a base is known."""
    return digest_files(list_states(folder))


@functools.lru_cache(8)
def digest_files(files: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 of files with their names, read again where times or sizes change."""
    whole = hashlib.sha256()
    for path in (Path(name) for name, *_ in files):
        whole.update(path.name.encode())
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
