"""Drift of the clients' data on a schedule: labels change hands, images distort."""

import chex
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fedmoe_jax.base import Process
from fedmoe_jax.options import (
    COUNT,
    HOST,
    NON_NEGATIVE,
    SHARE,
    STATIC,
    TRACED,
    Option,
)
from fedmoe_jax.tasks import TASKS
from fedmoe_jax.types import Array, Hyper, Keys, Lists, Sizes
from fedmoe_jax.world.step import View


def draw_drift_sources(
    rng: np.random.Generator, num_clients: int, share: float
) -> np.ndarray:
    """Draws which clients drift, and towards whose data.

    Args:
      rng: NumPy generator, advanced.
      num_clients: N.
      share: in [0, 1]; `round(share * N)` clients drift, none if that is below 2.

    Returns:
      drift_source [N] int32, a permutation: the clients that drift form one random
      cycle, each towards the data of another; `drift_source[c] = c` for all others.
    """
    drift_source = np.arange(num_clients, dtype=np.int32)
    cycle = rng.permutation(drift_source)[: round(share * num_clients)]
    drift_source[cycle] = np.roll(cycle, 1)
    return drift_source


def progress(round: Array, start: Array, rounds: Array) -> Array:
    """The share of the drift that is complete in a round.

    Args:
      round: [] int32, counted from 0.
      start: first round that differs from the past.
      rounds: >= 1, rounds that the drift takes; 1 is abrupt.

    Returns:
      [] float32 in [0, 1]: 0 before `start`, `1 / rounds` in it, then linear, and 1
      from round `start + rounds - 1` on.
    """
    return jnp.clip((round - start + 1.0) / rounds, 0.0, 1.0)


def move_examples(
    index: Array, size: Array, label_mix: Array, drift_source: Array, moved: Array
) -> tuple[Array, Array, Array]:
    """Label drift: the owner of each example once a share of them has moved.

    With `k(n) = ceil((1 - moved) n)`, client c keeps the first `k(size_c)` examples of
    its row and takes those after the first `k(size_s)` of the row of
    `s = drift_source[c]`. As the sources are a permutation, every example has one owner
    at any time. The rows fit: k and `n - k(n)` never fall as n grows, in float32 too,
    so with S the largest size,
    `k(size_c) + size_s - k(size_s) <= k(S) + S - k(S) = S`.

    Args:
      index: [N, M] int32, examples at the start, zeros beyond `size`.
      size: [N] int32 in [1, 2**24).
      label_mix: [N, L] float32, label histograms at the start, rows sum to 1.
      drift_source: [N] int32, a permutation, see `draw_drift_sources`.
      moved: [] float32 in [0, 1]; 0 gives back the arguments, 1 every client the row
        of its drift_source.

    Returns:
      index, size and label_mix of this moment; same shapes and dtypes. label_mix is
      the mean of the two old ones, weighted by the examples of each. That is right in
      expectation where the order of a row is random with respect to labels.
    """
    chex.assert_rank([index, label_mix], 2)
    chex.assert_equal_shape_prefix([index, size, label_mix, drift_source], 1)
    keep = jnp.ceil((1 - moved) * size).astype(jnp.int32)
    taken = (size - keep)[drift_source]
    place = jnp.arange(index.shape[1], dtype=jnp.int32)[None]
    kept = place < keep[:, None]
    client = jnp.arange(index.shape[0], dtype=jnp.int32)
    row = jnp.where(kept, client[:, None], drift_source[:, None])
    column = jnp.where(kept, place, place + (keep[drift_source] - keep)[:, None])
    examples = index.at[row, column].get(mode="clip")
    owned = place < (keep + taken)[:, None]
    # Written so that weights of 0 and 1 give one of the two mixes to the last bit.
    weight = jnp.where(drift_source == client, 0.0, taken / (keep + taken))[:, None]
    mix = (1 - weight) * label_mix + weight * label_mix[drift_source]
    return jnp.where(owned, examples, 0), keep + taken, mix


# ---- the processes

SCHEDULE = (
    Option("drift.share", SHARE, "share of the clients that drift", HOST),
    Option(
        "drift.start",
        NON_NEGATIVE,
        "first round with drift, counted from 0",
        TRACED,
    ),
    Option(
        "drift.rounds",
        COUNT,
        "rounds until the drift is complete; 1 is abrupt",
        TRACED,
    ),
)


def find_progress(round: Array, hyper: Hyper) -> Array:
    """[] float32 in [0, 1], see `progress`."""
    return progress(round, hyper.drift.start, hyper.drift.rounds)


# labels: [] float32 in [0, 1], the share of their examples that clients have handed on


def has_label_drift(config: ConfigDict) -> bool:
    """Whether examples change hands."""
    return config.drift.labels > 0


def init_labels(keys: Keys, hyper: Hyper, sizes: Sizes) -> Array:
    """As in round 0."""
    return step_labels(jnp.zeros(()), keys, jnp.zeros((), jnp.int32), hyper)


def step_labels(state: Array, keys: Keys, round: Array, hyper: Hyper) -> Array:
    """Follows the schedule; nothing is drawn."""
    return hyper.drift.labels * find_progress(round, hyper)


def apply_labels(state: Array, view: View, hyper: Hyper) -> View:
    """Gives clients the examples that they own by now."""
    old = view.federation
    shared, own_test = (old.label_mix, old.drift_source, state), old.own_test
    index, size, label_mix = move_examples(old.index, old.size, *shared)
    if own_test is not None:  # what a client is tested on moves with what it trains on
        own_test = Lists(*move_examples(own_test.index, own_test.size, *shared)[:2])
    moved = dict(index=index, size=size, label_mix=label_mix, own_test=own_test)
    return view.replace(federation=old.replace(**moved))


def measure_labels(state: Array) -> dict[str, Array]:
    """`drift_moved` [] float32, the share of their examples that clients handed on."""
    return {"drift_moved": state}


LABELS_PROCESS = Process(
    about="Clients hand on examples to one another, and with them their label mixes.",
    is_on=has_label_drift,
    init=init_labels,
    step=step_labels,
    apply=apply_labels,
    metrics=measure_labels,
    options=(
        Option(
            "drift.labels",
            SHARE,
            "share of their examples that clients hand on",
            TRACED,
        ),
        *SCHEDULE,
    ),
)


def list_drifts() -> tuple[str, ...]:
    """`none`, and the drifts of all tasks, those of plug-ins too."""
    drifts = (drift for task in TASKS.values() for drift in task.drifts)
    return "none", *dict(drifts)


# images: [] float32 >= 0, the amount by which images are distorted, in its unit


def has_image_drift(config: ConfigDict) -> bool:
    """Whether the images of clients change."""
    return config.drift.images != "none"


def init_images(keys: Keys, hyper: Hyper, sizes: Sizes) -> Array:
    """As in round 0."""
    return step_images(jnp.zeros(()), keys, jnp.zeros((), jnp.int32), hyper)


def step_images(state: Array, keys: Keys, round: Array, hyper: Hyper) -> Array:
    """Follows the schedule; nothing is drawn."""
    return hyper.drift.strength * find_progress(round, hyper)


def apply_images(state: Array, view: View, hyper: Hyper) -> View:
    """Distorts the images of the clients that drift."""
    source = view.federation.drift_source
    drifts = source != jnp.arange(source.shape[0])
    return view.replace(distortion=jnp.where(drifts, state, 0.0))


def measure_images(state: Array) -> dict[str, Array]:
    """`drift_distorted` [] float32, the amount of the distortion."""
    return {"drift_distorted": state}


IMAGES_PROCESS = Process(
    about="The images of clients rotate, blur or lose contrast.",
    is_on=has_image_drift,
    init=init_images,
    step=step_images,
    apply=apply_images,
    metrics=measure_images,
    options=(
        Option(
            "drift.images",
            list_drifts,
            "the drift of the task that examples take on",
            STATIC,
        ),
        Option(
            "drift.strength",
            NON_NEGATIVE,
            "of the distortion: degrees, pixels, or share of the contrast",
            TRACED,
        ),
        *SCHEDULE,
    ),
)
