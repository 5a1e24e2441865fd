"""DrJAX: a round written in its broadcast, map and mean, as one jitted program.

DrJAX brings primitives only, so the client's SGD is a `lax.scan` here, and its
convolution is im2col: XLA's own is about 11 times slower inside a loop on CPU.
`--processes` CPU devices share the clients through DrJAX's own mesh placement.
"""

import functools
import math

import drjax
import jax
import jax.numpy as jnp
import jax_models
import meter
from meter import works


def build_round(work, images, labels):
    """A jitted function (params, ids [C, M], keys [C]) -> params."""
    gradient = jax.grad(
        functools.partial(jax_models.loss, convolution=jax_models.matmul_convolution)
    )

    def train_client(params, ids, key, images, labels):
        def step(params, inputs):
            batch, key = inputs
            gradients = gradient(params, images[batch], labels[batch], key)
            return jax.tree.map(
                lambda p, g: p - works.LEARNING_RATE * g, params, gradients
            ), None

        batches = ids.reshape(-1, work.batch)
        keys = jax.random.split(key, len(batches))
        return jax.lax.scan(step, params, (batches, keys))[0]

    @jax.jit
    @drjax.program(placements={"clients": work.cohort})
    def run_round(params, ids, keys, images, labels):
        def client(start, ids, key):
            end = train_client(start, ids, key, images, labels)
            return jax.tree.map(jnp.subtract, end, start)

        mapped = drjax.map_fn(client, (drjax.broadcast(params), ids, keys))
        change = drjax.reduce_mean(mapped)
        return jax.tree.map(
            lambda p, d: p + works.SERVER_LEARNING_RATE * d, params, change
        )

    return lambda params, ids, keys: run_round(params, ids, keys, images, labels)


def main() -> None:
    work, rounds, processes = meter.parse_flags()
    devices = math.gcd(work.cohort, processes)  # clients must divide among them
    jax.config.update("jax_num_cpu_devices", devices)
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("clients",), (jax.sharding.AxisType.Auto,))
        jax.set_mesh(mesh)
    images, labels = works.load_images(work)
    ids = works.load_ids(work)
    images, labels = jnp.asarray(works.normalise(images)), jnp.asarray(labels)
    run_round = build_round(work, images, labels)
    params = jax_models.init(work.model, jax.random.key(0))
    start = params
    clock = meter.Meter()
    for number in range(rounds):
        cohort = works.sample_cohort(work, number)
        keys = jax.random.split(jax.random.key(number), work.cohort)
        params = jax.block_until_ready(run_round(params, ids[cohort], keys))
        clock.end_round()
    jax_models.finish(start, params, images, labels)


if __name__ == "__main__":
    main()
