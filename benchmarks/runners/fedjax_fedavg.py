"""FedJAX: its `federated_averaging` on its `jit` backend, one dispatch a step.

FedJAX 0.0.17 calls `jax.tree_map`, which JAX has removed; the first lines put it back.
Its `pmap` backend does not run on current JAX. The data are float32 ahead of time.
"""

import jax

jax.tree_map = jax.tree.map  # pyright: ignore[reportAttributeAccessIssue] see above

import fedjax  # noqa: E402
import jax_models  # noqa: E402
import meter  # noqa: E402
import numpy as np  # noqa: E402
from meter import works  # noqa: E402


def build_algorithm(work):
    """FedAvg; batches are not shuffled, as with the other peers."""

    def loss(params, batch, key):
        images, labels = batch["x"], batch["y"]
        return jax_models.loss(
            params, images, labels, key, jax_models.native_convolution
        )

    return fedjax.algorithms.fed_avg.federated_averaging(
        jax.jit(jax.grad(loss)),
        fedjax.optimizers.sgd(works.LEARNING_RATE),
        fedjax.optimizers.sgd(works.SERVER_LEARNING_RATE),
        fedjax.ShuffleRepeatBatchHParams(
            batch_size=work.batch, num_epochs=1, skip_shuffle=True
        ),
    )


def build_clients(work, images, labels):
    """A function from a client to its `ClientDataset`."""
    ids = works.load_ids(work)
    if work.pool is not None:
        return lambda client: fedjax.ClientDataset(
            {"x": images[ids[client]], "y": labels[ids[client]]}
        )
    x = images.reshape(work.clients, work.examples, *works.IMAGE)
    y = labels.reshape(work.clients, work.examples)
    held = [fedjax.ClientDataset({"x": x[i], "y": y[i]}) for i in range(work.clients)]
    return held.__getitem__


def main() -> None:
    work, rounds, _ = meter.parse_flags()
    images, labels = works.load_images(work)
    images = works.normalise(images)
    fetch = build_clients(work, images, labels)
    algorithm = build_algorithm(work)
    params = jax_models.init(work.model, jax.random.PRNGKey(0))
    state = algorithm.init(params)
    clock = meter.Meter()
    for number in range(rounds):
        cohort = works.sample_cohort(work, number)
        keys = np.asarray(jax.random.split(jax.random.PRNGKey(number), len(cohort)))
        clients = [(i, fetch(i), key) for i, key in zip(cohort, keys, strict=True)]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state.params)
        clock.end_round()
    jax_models.finish(params, state.params, images, labels)


if __name__ == "__main__":
    main()
