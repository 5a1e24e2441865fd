"""Groups of clients from the directions of their updates: the control of prototypes.

As `prototypes`, but a client describes its data by the direction of its gradient, of
the server's model with the first expert, over all of its examples: clustered FL
(Sattler et al., arXiv 1910.01991), which parts clients by the cosine of their updates,
as a stage. Of unit vectors the squared distance is 2 - 2 cosine. A client sends a
sketch of `SKETCH` numbers, whose distances are those of the directions up to a few per
cent. Other than class means a gradient depends on how often labels occur, so that label
skew looks like groups.
"""

import functools

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedmoe_jax.align.prototypes import Means
from fedmoe_jax.base import Model, Task
from fedmoe_jax.strategies.prototypes import (
    PROTOTYPES,
    apply_dense,
    count_stage_bytes,
    init,
    is_asked,
    make_stages,
    sum_examples,
    take_dense,
    weigh_positions,
    welcome,
)
from fedmoe_jax.types import Array, Federation, Hyper, PyTree, Sizes
from fedmoe_jax.world.costs import TRAINING_PASSES

SKETCH = 512
KEY = 0  # of the sketch, which all clients of all runs share


def shape_sketch(sizes: Sizes) -> tuple[int, int]:
    """L and D of `describe_update`: one class, whose mean is a sketch."""
    return 1, SKETCH


def sketch(vector: Array) -> Array:
    """[SKETCH] numbers whose distances are those of vectors [P], about.

    Every number of the vector is added to one of the sketch, drawn for its place, with
    a drawn sign (the count sketch of Charikar, Chen and Farach-Colton, 2002).
    """
    place, sign = jax.random.split(jax.random.key(KEY))
    bucket = jax.random.randint(place, vector.shape, 0, SKETCH)
    signed = vector * jax.random.rademacher(sign, vector.shape, vector.dtype)
    return jnp.zeros(SKETCH).at[bucket].add(signed)


def describe_update(
    params: PyTree,
    federation: Federation,
    index: Array,
    size: Array,
    model: Model,
    task: Task,
    sizes: Sizes,
) -> Means:
    """ONE client's direction of descent, as the one class of every layer.

    Arguments are those of `prototypes.describe_features`; leaves are [G, 1, SKETCH]
    and [G, 1].
    """
    dense = take_dense(params)
    gate = {"gate": dense.pop("gate")}  # which has nothing to choose

    def sum_batch(batch: PyTree, weight: Array) -> tuple[PyTree, Array]:
        def total_loss(dense: PyTree) -> tuple[Array, Array]:
            whole = dense | gate
            outputs, _ = apply_dense(whole, federation.fixed, batch, model, sizes)
            scores = task.loss(outputs, batch)
            own = weigh_positions(scores, weight)
            return (own * scores.loss).sum(), own.sum()

        return jax.grad(total_loss, has_aux=True)(dense)

    grads, count = sum_examples(sum_batch, federation, index, size, task, sizes)
    direction, _ = ravel_pytree(grads)
    direction = direction / jnp.maximum(jnp.linalg.norm(direction), 1e-9)
    every = lambda leaf: jnp.broadcast_to(leaf, (sizes.num_layers, *leaf.shape))
    return Means(every(sketch(direction)[None]), every(count[None]))


def count_sketch(round: Array, hyper: Hyper, sizes: Sizes) -> tuple[Array, int]:
    """The sketch, and its count; forward and backward. `Strategy.message`."""
    return jnp.where(is_asked(round, hyper), SKETCH + 1.0, 0.0), TRAINING_PASSES


UPDATE_GROUPS = PROTOTYPES._replace(
    about=(
        "Finds groups of clients from the directions of their gradients, and gives "
        "each group experts of its own; without groups all train one expert."
    ),
    needs="a sketch of every client's gradient",
    init=functools.partial(init, shape=shape_sketch),
    stages=make_stages(describe_update),
    welcome=functools.partial(welcome, describe=describe_update),
    message=count_sketch,
    stage_bytes=functools.partial(count_stage_bytes, shape=shape_sketch),
)
