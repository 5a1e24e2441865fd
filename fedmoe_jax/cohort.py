"""Step 4 of a round: the cohort trains, spread over devices and streamed through each.

Every device walks its share of the clients in chunks, vmaps `client_update` over a
chunk and adds the results to running sums, so that memory does not grow with the
cohort. One psum at the end joins the devices.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from fedmoe_jax.client import ClientTask, ClientUpdate
from fedmoe_jax.dealing import chunk_size, deal
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


def take_tasks(tasks: ClientTask, position: Array) -> ClientTask:
    """Tasks at positions of any shape; positions beyond the cohort get zero steps."""
    count = tasks.client.shape[0]
    taken = jax.tree.map(lambda leaf: leaf[jnp.minimum(position, count - 1)], tasks)
    return taken.replace(steps=jnp.where(position < count, taken.steps, 0))


def place_reports(reports: Report, position: Array, count: int) -> Report:
    """This device's reports at their places in the cohort [C], zeros elsewhere."""

    def place(leaf: Array) -> Array:
        empty = jnp.zeros((count, *leaf.shape[1:]), leaf.dtype)
        return empty.at[position].set(leaf, mode="drop")

    return jax.tree.map(place, reports)


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
    *,
    client_chunk: int,
    gate_mode: str,
    weight: str,
) -> Callable[..., tuple[Sums, Report]]:
    """Builds `train_cohort(params, tasks, federation, hyper, key) -> (Sums, Report)`.

    It is written for one device and joins the devices of the mesh axis `clients`.

    Args:
      client_update: for ONE client, see `client.build_client_update`.
      client_chunk: clients vmapped at once on each device, see `chunk_size`.
      gate_mode: `global`, `holder_rows` or `personal`.
      weight: `examples` or `routed`, see `merge.accumulate`.

    Returns:
      A function of params, tasks [C], the federation, hyperparameters and the round's
      training key; sums and reports [C] are the same on all devices.
    """

    def train_cohort(
        params: PyTree,
        tasks: ClientTask,
        federation: Federation,
        hyper: Hyper,
        key: Array,
    ) -> tuple[Sums, Report]:
        count, num_devices = tasks.client.shape[0], jax.lax.axis_size(CLIENTS)
        chunk = chunk_size(count, num_devices, client_chunk)
        position = deal(tasks.steps, num_devices, chunk)
        position = position[jax.lax.axis_index(CLIENTS)]  # [chunks, clients of a chunk]
        sums, reports = train_share(
            params,
            take_tasks(tasks, position),
            federation,
            hyper,
            key,
            client_update=client_update,
            gate_mode=gate_mode,
            weight=weight,
        )
        placed = place_reports(reports, position.reshape(-1), count)
        # With a single dtype the devices are joined by a single collective.
        placed = placed.replace(finite=placed.finite.astype(jnp.float32))
        sums, report = jax.lax.psum((sums, placed), CLIENTS)
        return sums, report.replace(finite=report.finite > 0)

    return train_cohort
