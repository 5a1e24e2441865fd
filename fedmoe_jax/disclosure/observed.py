"""Files of the observer: what was seen of each round, in the folder of its run; no JAX.

One .npz file for every compiled chunk of rounds, `observed/LAST.npz`, LAST being the
last of its rounds; each is whole or absent. The end of a run adds `exposed.npz`, see
`exposure`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.options import UserError
from fedmoe_jax.runtime.files import read_arrays, write_arrays

FOLDER, EXPOSED = "observed", "exposed.npz"
MOST_GB = 1.0  # of one run's files, before they are packed
FEEDBACK_NUMBERS = 6  # float32 of each pair of client and expert, the probe among them
PAIR_BYTES = 4 * FEEDBACK_NUMBERS + 2  # held, and assigned
CLIENT_BYTES = 12  # its number, bytes up and down


def count_bytes(config: ConfigDict, num_layers: int, num_experts: int) -> int:
    """Bytes of all that is seen of a run's rounds, at most."""
    pairs = config.cohort_size * num_layers * num_experts
    return config.num_rounds * (pairs * PAIR_BYTES + config.cohort_size * CLIENT_BYTES)


def check_size(config: ConfigDict, num_layers: int, num_experts: int) -> None:
    """Raises UserError where what a run observes would be too much for its folder.

    Args:
      config: of the run, as its strategy configures it.
      num_layers: G.
      num_experts: E.
    """
    needed = count_bytes(config, num_layers, num_experts) / 1e9
    if not config.privacy.observe or needed <= MOST_GB:
        return
    raise UserError(
        f"privacy.observe=True is not allowed with num_rounds={config.num_rounds}, "
        f"cohort_size={config.cohort_size}, {num_layers} MoE layers and "
        f"num_experts={num_experts}, which would be {needed:.3g} GB; allowed: False, "
        f"or at most {MOST_GB:g} GB a run"
    )


def name_chunk(folder: Path, last: int) -> Path:
    """The file of the chunk that ends with round `last`, from 1 on."""
    return folder / FOLDER / f"{last:08}.npz"


def list_chunks(folder: Path) -> dict[int, Path]:
    """The files of a run by the last of their rounds, in the order of rounds."""
    found = (folder / FOLDER).glob("*.npz")
    numbered = ((int(path.stem), path) for path in found if path.stem.isdecimal())
    return dict(sorted(numbered))


def write_chunk(folder: Path, last: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what was seen of a chunk of rounds, leaves [R, ...], whole or not at all.

    Args:
      folder: of the run.
      last: the chunk's last round.
      arrays: see `observer.see_round`.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    write_arrays(name_chunk(folder, last), **arrays)


def resume(folder: Path, done: int, chunk: int) -> None:
    """Removes what was seen after round `done`, which is run again.

    Args:
      folder: of the run.
      done: rounds done at the checkpoint.
      chunk: rounds of a chunk.

    Raises:
      UserError: a file of an earlier round is missing.
    """
    chunks = list_chunks(folder)
    for last in range(chunk, done + 1, chunk):
        if last not in chunks:
            raise UserError(
                f"{name_chunk(folder, last)} is missing, which checkpoints do not "
                "hold; allowed: the file as the run has written it, or another workdir"
            )
    for last, path in chunks.items():
        if last > done:
            path.unlink()


def read_observed(folder: Path) -> dict[str, np.ndarray] | None:
    """All that was seen of a run, leaves [rounds, ...]; None where nothing was.

    Raises:
      UserError: a file is damaged.
    """
    chunks = [read_arrays(path) for path in list_chunks(Path(folder)).values()]
    return join_chunks(chunks)


def join_chunks(
    chunks: list[dict[str, np.ndarray]],
) -> dict[str, np.ndarray] | None:
    """Chunks one after the other; None of none."""
    if not chunks:
        return None
    return {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}


def read_exposed(folder: Path) -> dict[str, np.ndarray] | None:
    """The losses of members and others at a run's end; None where there are none.

    Raises:
      UserError: the file is damaged.
    """
    path = Path(folder) / EXPOSED
    return read_arrays(path) if path.is_file() else None
