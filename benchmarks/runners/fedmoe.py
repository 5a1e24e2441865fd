"""fedmoe_jax: the same rounds that `launch.py` runs; in dense works with one expert."""

import functools

import jax
import jax.numpy as jnp
import meter
import numpy as np
from meter import works
from ml_collections import ConfigDict

from benchmarks.start import keep_running, make_config, start
from configs import cifar10
from fedmoe_jax.base import Data, Route
from fedmoe_jax.data.images import label_images
from fedmoe_jax.program import Program
from fedmoe_jax.runtime.xla import set_cpu_devices
from fedmoe_jax.tasks.batches import take_batch
from fedmoe_jax.types import Federation, Partition, PyTree

CNN = {
    "model.stem": "simple_cnn",
    "model.stem_width": works.CHANNELS[0],
    "model.expert_width": works.DENSE,
    "model.stem_dropout": works.DROPOUT[0],
    "model.expert_dropout": works.DROPOUT[1],
}
MLP = {"model.stem": "flat", "model.expert_width": works.HIDDEN}


def describe(work: works.Work) -> ConfigDict:
    """The work as a config: one expert that all clients hold is plain FedAvg."""
    if work.model == "mixture":
        config = cifar10.get_config()
        config.client.learning_rate = works.MIXTURE_LEARNING_RATE
        config.client.clip = 0.0
        return config
    fields = {
        "num_clients": work.clients,
        "cohort_size": work.cohort,
        "batch_size": work.batch,
        "local_epochs": 1.0,
        "chunk_rounds": 1,
        "num_experts": 1,
        "max_held": 1,
        "num_active": 1,
        "strategy": "fedavg",
        "model.expert": "dense",
        "client.learning_rate": works.LEARNING_RATE,
        "client.momentum": 0.0,
        "server.learning_rate": works.SERVER_LEARNING_RATE,
        "loss.calibration": 0.0,
    }
    return make_config(**fields, **(CNN if work.model == "cnn" else MLP))


def load(work: works.Work) -> tuple[Data, Partition]:
    """The images and their owners, as the simulator takes them."""
    x, y = works.load_images(work)
    test = (x[: works.CHECKED], y[: works.CHECKED])
    names = tuple(str(label) for label in range(works.CLASSES))
    ids = works.load_ids(work)
    partition = Partition(
        index=ids,
        size=np.full(work.clients, work.examples, np.int32),
        label_counts=np.ones((work.clients, works.CLASSES), np.int32),
        public=np.zeros(0, np.int32),
    )
    return label_images(x, y, *test, names), partition


def check(params: PyTree, federation: Federation, *, program: Program) -> jax.Array:
    """Loss of the server's model on the checked images, without dropout."""
    images = jnp.arange(len(federation.test_stratum))
    batch = take_batch(federation.test, images, federation.statistics, program.task)
    held = jnp.arange(program.sizes.num_experts)[None]
    slots, route = (held, held >= 0), Route(program.sizes.num_active)
    logits, _ = program.model.apply(
        params, federation.frozen, batch, *slots, route, None
    )
    return program.task.loss(logits, batch).loss.mean()


def main() -> None:
    work, rounds, devices = meter.parse_flags()
    set_cpu_devices(devices)
    started = start(describe(work), *load(work), devices)
    check_loss = jax.jit(functools.partial(check, program=started.program))
    federation = started.federation
    before = float(check_loss(started.state.params, federation))
    advance = keep_running(started)
    clock = meter.Meter()
    for _ in range(rounds):
        state = jax.block_until_ready(advance())
        clock.end_round()
    meter.finish(before, float(check_loss(state.params, federation)))


if __name__ == "__main__":
    main()
