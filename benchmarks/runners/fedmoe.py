"""fedmoe_jax: the same rounds that `launch.py` runs; in dense works with one expert."""

import functools

import jax
import jax.numpy as jnp
import meter
import numpy as np
from meter import works
from ml_collections import ConfigDict

from benchmarks.start import keep_running, make_config, start
from configs import cifar10, languages
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
    if work.model == "language":
        return describe_language(work)
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


def describe_language(work: works.Work) -> ConfigDict:
    """`configs/languages.py`, with held sets that stay as they are drawn."""
    config = languages.get_config()
    with config.unlocked():
        config.strategy, config.seed = "fixed_random", 0
    config.num_clients, config.cohort_size = work.clients, work.cohort
    config.chunk_rounds = 1
    return config


def load(work: works.Work) -> tuple[Data, Partition]:
    """The examples and their owners, as the simulator takes them."""
    if work.model == "language":
        return load_language(work)
    x, y = works.load_images(work)
    test = (x[: works.CHECKED], y[: works.CHECKED])
    names = tuple(str(label) for label in range(works.CLASSES))
    return label_images(x, y, *test, names), share_out(work, works.CLASSES)


def load_language(work: works.Work) -> tuple[Data, Partition]:
    """The windows and their owners; those that are checked are the test set."""
    windows, language = works.load_windows(work)
    checked = works.checked_windows(work)
    full = np.full(len(windows), works.WINDOW + 1, np.int32)
    train = {"tokens": windows, "length": full}
    data = Data(
        train=train,
        test={name: leaf[checked] for name, leaf in train.items()},
        stratum=language,
        test_stratum=language[checked],
        stratum_names=tuple(str(number) for number in range(works.LANGUAGES)),
        task="text",
        vocabulary=works.VOCABULARY,
    )
    return data, share_out(work, works.LANGUAGES)


def share_out(work: works.Work, strata: int) -> Partition:
    """The examples of every client, as many as of any other."""
    return Partition(
        index=works.load_ids(work),
        size=np.full(work.clients, work.examples, np.int32),
        label_counts=np.ones((work.clients, strata), np.int32),
        public=np.zeros(0, np.int32),
    )


def check(params: PyTree, federation: Federation, *, program: Program) -> jax.Array:
    """Loss of the server's model on the checked examples, without dropout."""
    examples = jnp.arange(len(federation.test_stratum))
    batch = take_batch(federation.test, examples, federation.statistics, program.task)
    shape = program.sizes.num_layers, program.sizes.num_experts
    held = jnp.broadcast_to(jnp.arange(shape[1]), shape)
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
