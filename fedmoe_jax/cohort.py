"""Step 4 of a round: the cohort trains, spread over devices and streamed through each.

The tasks are sharded over the mesh axis `clients`. Every device walks its share in
chunks, vmaps `client_update` over a chunk and adds the results to running sums; one
psum at the end joins the devices. Padding tasks have weight zero.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fedmoe_jax.client import ClientTask, ClientUpdate
from fedmoe_jax.merge import Sums, accumulate, zero_sums
from fedmoe_jax.sharding import CLIENTS
from fedmoe_jax.types import Array, Federation, Feedback, Hyper, PyTree


@struct.dataclass
class Report:
    """What the server keeps of each client's update (leading C axis).

    Attributes:
      feedback: per-slot feedback [C, K].
      loss: [C] float32 nats.
      accuracy: [C] float32.
      finite: [C] bool.
      gate: trained gates with leading C, E axes where gates are personal, else {}.
    """

    feedback: Feedback
    loss: Array
    accuracy: Array
    finite: Array
    gate: PyTree


def pad_tasks(tasks: ClientTask, multiple: int) -> ClientTask:
    """Pads the leading axis to a multiple with invalid copies of the first task."""
    count = tasks.client.shape[0]
    padding = -count % multiple
    source = jnp.concatenate([jnp.arange(count), jnp.zeros(padding, int)])
    padded = jax.tree.map(lambda leaf: leaf[source], tasks)
    return padded.replace(valid=jnp.arange(count + padding) < count)


def make_report(update: ClientUpdate, task: ClientTask, gate_mode: str) -> Report:
    """The report of ONE client; a non-finite personal gate is left as it was."""
    gate = {}
    if gate_mode == "personal":
        gate = jax.tree.map(
            lambda old, step: jnp.where(update.finite, old + step, old),
            task.gate,
            update.delta["gate"],
        )
    return Report(
        feedback=update.feedback,
        loss=update.loss,
        accuracy=update.accuracy,
        finite=update.finite,
        gate=gate,
    )


def chunk_size(cohort_size: int, num_devices: int, client_chunk: int) -> int:
    """Clients vmapped at once on a device, at most its share of the cohort."""
    return min(client_chunk, -(-cohort_size // num_devices))


def train_share(
    params: PyTree,
    chunks: ClientTask,
    federation: Federation,
    hyper: Hyper,
    key: Array,
    *,
    client_update: Callable[..., ClientUpdate],
    gate_mode: str,
    weight: str,
) -> tuple[Sums, Report]:
    """What ONE device does: streams its chunks of tasks through `client_update`.

    Args:
      params: the server's params.
      chunks: tasks with leading axes [chunks, clients of a chunk].
      federation: data and sizes.
      hyper: hyperparameters.
      key: the round's training key; each client folds its id into it.
      client_update: for ONE client.
      gate_mode: see `merge.gate_weights`.
      weight: see `merge.accumulate`.

    Returns:
      Sums over this device's clients, and their reports with one leading axis.
    """

    def one_client(task: ClientTask) -> ClientUpdate:
        client_key = jax.random.fold_in(key, task.client)
        return client_update(params, task, federation, hyper, client_key)

    def add_client(sums: Sums, sent_and_returned) -> tuple[Sums, None]:
        task, update = sent_and_returned
        size = federation.size[task.client]
        return accumulate(
            sums, task, update, size, gate_mode=gate_mode, weight=weight
        ), None

    def one_chunk(sums: Sums, chunk: ClientTask) -> tuple[Sums, Report]:
        if chunk.client.shape[0] == 1:  # vmapping one client would group convolutions
            update = one_client(jax.tree.map(lambda leaf: leaf[0], chunk))
            updates = jax.tree.map(lambda leaf: leaf[None], update)
        else:
            updates = jax.vmap(one_client)(chunk)
        sums, _ = jax.lax.scan(add_client, sums, (chunk, updates))
        report = functools.partial(make_report, gate_mode=gate_mode)
        return sums, jax.vmap(report)(updates, chunk)

    sums, reports = jax.lax.scan(one_chunk, zero_sums(params), chunks)
    return sums, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), reports)


def build_train_cohort(
    client_update: Callable[..., ClientUpdate],
    mesh: Mesh,
    *,
    client_chunk: int,
    gate_mode: str,
    weight: str,
) -> Callable[..., tuple[Sums, Report]]:
    """Builds `train_cohort(params, tasks, federation, hyper, key) -> (Sums, Report)`.

    Args:
      client_update: for ONE client, see `client.build_client_update`.
      mesh: devices along `clients`.
      client_chunk: clients vmapped at once on each device, see `chunk_size`.
      gate_mode: `global`, `holder_rows` or `personal`.
      weight: `examples` or `routed`, see `merge.accumulate`.

    Returns:
      A function of params, tasks [C], the federation, hyperparameters and the round's
      training key; sums are replicated, reports have a leading C axis.
    """
    one_device = functools.partial(
        train_share, client_update=client_update, gate_mode=gate_mode, weight=weight
    )

    def all_devices(params, chunks, federation, hyper, key):
        sums, reports = one_device(params, chunks, federation, hyper, key)
        return jax.lax.psum(sums, CLIENTS), reports

    sharded = jax.shard_map(
        all_devices,
        mesh=mesh,
        in_specs=(P(), P(CLIENTS), P(), P(), P()),
        out_specs=(P(), P(CLIENTS)),
        check_vma=False,
    )

    def train_cohort(
        params: PyTree,
        tasks: ClientTask,
        federation: Federation,
        hyper: Hyper,
        key: Array,
    ) -> tuple[Sums, Report]:
        count = tasks.client.shape[0]
        chunk = chunk_size(count, mesh.size, client_chunk)
        padded = pad_tasks(tasks, mesh.size * chunk)
        chunks = jax.tree.map(
            lambda leaf: leaf.reshape(-1, chunk, *leaf.shape[1:]), padded
        )
        sums, reports = sharded(params, chunks, federation, hyper, key)
        return sums, jax.tree.map(lambda leaf: leaf[:count], reports)

    return train_cohort
