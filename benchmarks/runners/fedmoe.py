"""fedmoe_jax: the same rounds that `launch.py` runs, dense (one expert, one slot)."""

import jax
import meter
import numpy as np
import optax
from meter import works

from benchmarks.start import keep_running, make_config, start
from fedmoe_jax.client import normalise
from fedmoe_jax.models.routing import gate_logits, route
from fedmoe_jax.runtime.xla import set_cpu_devices
from fedmoe_jax.types import Dataset, Partition

CNN = {
    "model.stem": "simple_cnn",
    "model.stem_width": works.CHANNELS[0],
    "model.expert_width": works.DENSE,
    "model.stem_dropout": works.DROPOUT[0],
    "model.expert_dropout": works.DROPOUT[1],
}
MLP = {"model.stem": "flat", "model.expert_width": works.HIDDEN}


def describe(work: works.Work):
    """The work as a config: with one expert that everyone holds it is plain FedAvg."""
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


def load(work: works.Work) -> tuple[Dataset, Partition]:
    """The images and who owns them, as the simulator takes them."""
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
    return Dataset(x, y, *test, names), partition


def check(model, params, federation) -> float:
    """Loss of the server's model on the checked images, without dropout."""
    x = normalise(federation.test_x, federation.mean, federation.std)
    features = model.stem(params["stem"], x, None)
    gates = route(gate_logits(params["gate"], features), np.ones(1, bool), 1)
    expert = jax.tree.map(lambda leaf: leaf[0], params["experts"])
    outputs = gates * model.expert(expert, features, None)
    logits = model.head(params["head"], outputs)
    labels = federation.test_y
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main() -> None:
    work, rounds, devices = meter.parse_flags()
    set_cpu_devices(devices)
    started = start(describe(work), *load(work), devices)
    check_loss = jax.jit(check, static_argnums=0)
    model, federation = started.program.model, started.federation
    before = float(check_loss(model, started.state.params, federation))
    advance = keep_running(started)
    clock = meter.Meter()
    for _ in range(rounds):
        state = jax.block_until_ready(advance())
        clock.end_round()
    meter.finish(before, float(check_loss(model, state.params, federation)))


if __name__ == "__main__":
    main()
