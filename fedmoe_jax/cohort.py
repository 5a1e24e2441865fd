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
      client_chunk: clients vmapped at once on each device.
      gate_mode: `global`, `holder_rows` or `personal`.
      weight: `examples` or `routed`, see `merge.accumulate`.

    Returns:
      A function of params, tasks [C], the federation, hyperparameters and the round's
      training key; sums are replicated, reports have a leading C axis.
    """

    def train_share(params, tasks, federation, hyper, key):
        def one_client(task: ClientTask) -> ClientUpdate:
            client_key = jax.random.fold_in(key, task.client)
            return client_update(params, task, federation, hyper, client_key)

        def add_client(sums: Sums, sent_and_returned) -> tuple[Sums, None]:
            task, update = sent_and_returned
            size = federation.size[task.client]
            added = accumulate(
                sums, task, update, size, gate_mode=gate_mode, weight=weight
            )
            return added, None

        def one_chunk(sums: Sums, chunk: ClientTask) -> tuple[Sums, Report]:
            if client_chunk == 1:  # vmapping a single client would group convolutions
                updates = jax.tree.map(
                    lambda leaf: leaf[None],
                    one_client(jax.tree.map(lambda leaf: leaf[0], chunk)),
                )
            else:
                updates = jax.vmap(one_client)(chunk)
            sums, _ = jax.lax.scan(add_client, sums, (chunk, updates))
            report = functools.partial(make_report, gate_mode=gate_mode)
            return sums, jax.vmap(report)(updates, chunk)

        chunks = jax.tree.map(
            lambda leaf: leaf.reshape(-1, client_chunk, *leaf.shape[1:]), tasks
        )
        sums, reports = jax.lax.scan(one_chunk, zero_sums(params), chunks)
        reports = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), reports)
        return jax.lax.psum(sums, CLIENTS), reports

    sharded = jax.shard_map(
        train_share,
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
        padded = pad_tasks(tasks, mesh.size * client_chunk)
        sums, reports = sharded(params, padded, federation, hyper, key)
        return sums, jax.tree.map(lambda leaf: leaf[:count], reports)

    return train_cohort
