"""A run on synthetic images, started without a work folder: what benchmarks time."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import default
from fedmoe_jax.base import Data
from fedmoe_jax.data.images import label_images
from fedmoe_jax.federation import make_federation
from fedmoe_jax.program import Program, build_program, make_hyper
from fedmoe_jax.round import build_run_rounds
from fedmoe_jax.runtime.sharding import build_mesh, replicate
from fedmoe_jax.state import init_state
from fedmoe_jax.train.loop import compile_once
from fedmoe_jax.types import Federation, Hyper, Partition, SimState


class Started(NamedTuple):
    """A run ready to be timed; `run_rounds` is compiled and donates the state."""

    program: Program
    federation: Federation
    hyper: Hyper
    state: SimState
    run_rounds: Callable
    compile_seconds: float


def make_config(**fields) -> ConfigDict:
    """The default config with other values, by dotted names."""
    config = default.get_config()
    config.update_from_flattened_dict(fields)
    return config


def make_images(count: int, shape: tuple[int, int, int], classes: int) -> Data:
    """Uniform noise with random labels, the first 2,000 images as test set."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    y = rng.integers(0, classes, count, dtype=np.int32)
    names = tuple(str(label) for label in range(classes))
    return label_images(x, y, x[:2000], y[:2000], names)


def share_out(clients: int, examples: int, count: int, classes: int) -> Partition:
    """Gives every client as many examples, one after the other, round and round."""
    index = np.arange(clients * examples, dtype=np.int32) % count
    return Partition(
        index=index.reshape(clients, examples),
        size=np.full(clients, examples, np.int32),
        label_counts=np.ones((clients, classes), np.int32),
        public=np.zeros(0, np.int32),
    )


def start(
    config: ConfigDict, data: Data, partition: Partition, devices: int
) -> Started:
    """Puts the run on its devices and compiles its rounds."""
    mesh = build_mesh(devices)
    federation = make_federation(config, data, partition)
    program = build_program(config, data, federation, mesh)
    hyper = replicate(make_hyper(config), mesh)
    state, frozen = replicate(init_state(jax.random.key(0), hyper, program), mesh)
    federation = replicate(federation, mesh).replace(frozen=frozen)
    functions = [build_run_rounds(program)]
    (run_rounds,), seconds = compile_once(functions, state, federation, hyper)
    return Started(program, federation, hyper, state, run_rounds, seconds)


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each call, all of them in turn in every repetition."""
    seconds = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def keep_running(started: Started) -> Callable[[], SimState]:
    """A call that advances the run by its R rounds and remembers the state."""
    state = started.state

    def advance() -> SimState:
        nonlocal state
        state, _ = started.run_rounds(state, started.federation, started.hyper)
        return state

    return advance
