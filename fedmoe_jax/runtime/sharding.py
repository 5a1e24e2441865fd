"""The device mesh and the one place where a program is spread over it.

The axis `clients` shares out a cohort and the test images of one run, the axis `runs`
the runs of a sweep. Programs are written for one device (single program, multiple
data): state is the same on all devices of `clients`, each trains its share of the
cohort, and one collective joins them.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedmoe_jax.options import UserError
from fedmoe_jax.types import PER_RUN, Array, Federation, PyTree

RUNS = "runs"
CLIENTS = "clients"

EVERYWHERE = P()

ALIGNMENT = 64  # bytes; XLA's CPU client copies host arrays that start elsewhere


def build_mesh(num_devices: int, num_runs: int = 1) -> Mesh:
    """A mesh [num_runs, devices / num_runs] of the first devices of every process.

    Args:
      num_devices: how many devices of all processes together, 0 for all.
      num_runs: devices along `runs`; a divisor of the number of devices.

    Raises:
      UserError: more devices are asked for than there are, or processes would have
        different numbers of them.
    """
    available, processes = jax.device_count(), jax.process_count()
    if not 0 <= num_devices <= available or num_devices % processes:
        even = f", multiples of the {processes} processes" if processes > 1 else ""
        raise UserError(
            f"run.num_devices={num_devices} is not allowed; "
            f"allowed: 0 (all) to {available}, the devices there are{even}"
        )
    each = (num_devices or available) // processes
    devices = [d for i in range(processes) for d in jax.local_devices(i)[:each]]
    shape = (num_runs, len(devices) // num_runs)
    # Explicit axes, the default, would not let the model code reshape freely.
    return jax.make_mesh(
        shape, (RUNS, CLIENTS), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def find_platform(mesh: Mesh) -> str:
    """The kind of the mesh's devices: `cpu`, `gpu` or `tpu`."""
    return mesh.devices.flat[0].platform


def map_runs(function: Callable, platform: str) -> Callable:
    """Maps `function(state, federation, ...)` of ONE run over a leading S axis.

    The federation's `PER_RUN` fields have that axis too, the others are shared. A loop
    on the platform `cpu`, where one run keeps a device busy; vmapped elsewhere. One run
    is called as it is, so that it costs nothing to be a sweep of one.
    """

    @functools.wraps(function)
    def mapped(states: PyTree, federation: Federation, *others: PyTree) -> PyTree:
        own = {name: getattr(federation, name) for name in PER_RUN}

        def one_run(arguments: tuple) -> PyTree:
            state, own, rest = arguments
            return function(state, federation.replace(**own), *rest)

        arguments = (states, own, others)
        if jax.tree.leaves(states)[0].shape[0] == 1:
            first = jax.tree.map(lambda leaf: leaf[0], arguments)
            return jax.tree.map(lambda leaf: leaf[None], one_run(first))
        if platform == "cpu":
            return jax.lax.map(one_run, arguments)
        return jax.vmap(one_run)(arguments)

    return mapped


def runs_at_once(num_runs: int, mesh: Mesh, platform: str) -> int:
    """Runs that one device works on at the same time, see `map_runs`."""
    return 1 if platform == "cpu" else num_runs // mesh.shape[RUNS]


def spread(
    function: Callable,
    mesh: Mesh,
    in_specs: PyTree = EVERYWHERE,
    out_specs: PyTree = EVERYWHERE,
) -> Callable:
    """`function`, written for one device, on all devices of the mesh.

    Args:
      function: may use the axis names `runs` and `clients` in collectives.
      mesh: the devices.
      in_specs: how arguments are divided; by default every device gets all of them.
      out_specs: how results are put together; by default they are equal everywhere.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts every leaf on every device of the mesh, see `place`."""
    return place(tree, mesh, EVERYWHERE)


def place(tree: PyTree, mesh: Mesh, spec: P) -> PyTree:
    """Puts values that all processes have on the devices of the mesh.

    The CPU devices of one process share one copy of a NumPy leaf that is whole on each,
    the host's own, so it must not change later.

    Args:
      tree: JAX or NumPy arrays; equal on all processes, which is not checked.
      mesh: the devices.
      spec: how every leaf is divided.
    """
    sharding, on_cpu = NamedSharding(mesh, spec), find_platform(mesh) == "cpu"

    def place_leaf(leaf: Array | np.ndarray | np.generic) -> Array:
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, sharding)
        host = align(leaf) if on_cpu else np.asarray(leaf)
        part = lambda index: np.asarray(host[index])
        return jax.make_array_from_callback(host.shape, sharding, part)

    return jax.tree.map(place_leaf, tree)


def align(leaf: np.ndarray | np.generic) -> np.ndarray:
    """The leaf, or a copy that starts where XLA's CPU client can use it as it is."""
    leaf = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    if leaf.ctypes.data % ALIGNMENT == 0:
        return leaf
    room = np.empty(leaf.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
    copy[...] = leaf
    return copy
