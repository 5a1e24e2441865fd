"""Clients out of reach, clients that drop out, and the draw of a cohort."""

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from fedmoe_jax.base import Process
from fedmoe_jax.options import COUNT, SHARE, STATIC, TRACED, Option, UserError
from fedmoe_jax.types import Array, Hyper, Keys, Sizes, Static
from fedmoe_jax.world.processes import markov_start, markov_step
from fedmoe_jax.world.step import DROPOUT, PHASE, REACH, View

# ---- reach


class Reach(struct.PyTreeNode):
    """Clients that can be reached.

    Attributes:
      phase: [N] float32 in [0, 1), the time of day at which each client lives.
      now: [N] bool, whether each client can be reached in this round.
    """

    phase: Array
    now: Array


def has_reach(config: ConfigDict) -> bool:
    """Whether clients are ever out of reach."""
    return config.availability.share < 1 or config.availability.swing > 0


def reach_share(round: Array, phase: Array, *, share, swing, day) -> Array:
    """The share of the time that each client can be reached at this time of its day.

    `share + swing sin(2 pi (round / day + phase))`, within [0, 1].

    Args:
      round: [] int32.
      phase: [N] float32 in [0, 1), of each client's day.
      share: [] in [0, 1], the mean over a day where nothing is cut off.
      swing: [] >= 0.
      day: [] rounds in a day, >= 1.

    Returns:
      [N] float32 in [0, 1].
    """
    wave = jnp.sin(2 * jnp.pi * (round / day + phase))
    return jnp.clip(share + swing * wave, 0.0, 1.0)


def share_now(round: Array, phase: Array, hyper: Hyper) -> Array:
    """[N] share of the time that each client can be reached at this hour."""
    numbers = hyper.availability
    return reach_share(
        round, phase, share=numbers.share, swing=numbers.swing, day=numbers.day
    )


def init_reach(keys: Keys, hyper: Hyper, sizes: Sizes) -> Reach:
    """Places clients over the day and draws from the law of its first hour."""
    phase = jax.random.uniform(keys.always(PHASE), (sizes.num_clients,))
    share = share_now(jnp.zeros((), jnp.int32), phase, hyper)
    return Reach(phase, markov_start(keys.of(REACH), share, sizes.num_clients))


def step_reach(state: Reach, keys: Keys, round: Array, hyper: Hyper) -> Reach:
    """One step of a Markov chain of every client, with the share of its hour."""
    share = share_now(round, state.phase, hyper)
    persistence = hyper.availability.persistence
    return state.replace(now=markov_step(keys.of(REACH), state.now, share, persistence))


def apply_reach(state: Reach, view: View, hyper: Hyper) -> View:
    """Puts clients out of reach."""
    reachable = view.events.reachable & state.now
    return view.replace(events=view.events.replace(reachable=reachable))


def measure_reach(state: Reach) -> dict[str, Array]:
    """`reachable_clients` [] int32, of the population."""
    return {"reachable_clients": state.now.sum()}


PERSISTENCE = Option(
    "availability.persistence", SHARE, "correlation from round to round", TRACED
)
REACH_PROCESS = Process(
    about="Clients are out of reach for a part of their day, in spells.",
    is_on=has_reach,
    init=init_reach,
    step=step_reach,
    apply=apply_reach,
    metrics=measure_reach,
    always=("availability.sampling",),
    options=(
        Option(
            "availability.share",
            SHARE,
            "share of the time that a client can be reached",
            TRACED,
        ),
        PERSISTENCE,
        Option(
            "availability.swing",
            SHARE,
            "by how much the share rises and falls in a day",
            TRACED,
        ),
        Option("availability.day", COUNT, "rounds in a day", TRACED),
        Option(
            "availability.sampling",
            ("uniform", "size", "reachable"),
            "how cohorts are drawn: alike, by their examples, or among the reachable",
            STATIC,
        ),
    ),
)


# ---- dropout: [N] float32, the share of its training after which each client is lost


def has_dropout(config: ConfigDict) -> bool:
    """Whether clients are ever lost before or in the middle of training."""
    return config.availability.dropout > 0


def init_dropout(keys: Keys, hyper: Hyper, sizes: Sizes) -> Array:
    """No client is lost before the first round."""
    return jnp.full(sizes.num_clients, jnp.inf)


def step_dropout(state: Array, keys: Keys, round: Array, hyper: Hyper) -> Array:
    """Draws afresh in every round."""
    numbers = hyper.availability
    return draw_dropout(
        keys.of(DROPOUT), state.shape[0], rate=numbers.dropout, early=numbers.early
    )


def apply_dropout(state: Array, view: View, hyper: Hyper) -> View:
    """Ends the training of lost clients, at the first moment that ends it."""
    dropout = jnp.minimum(view.events.dropout, state)
    return view.replace(events=view.events.replace(dropout=dropout))


def draw_dropout(key: Array, num_clients: int, *, rate: Array, early: Array) -> Array:
    """After which share of its training each client would be lost in this round.

    Args:
      key: a JAX key, consumed.
      num_clients: N.
      rate: [] chance of being lost.
      early: [] share of the lost that never start training; others are lost at a
        uniform moment of it.

    Returns:
      [N] float32: 0 for before, in (0, 1) for during training, infinity for never.
    """
    lost, before, moment = jax.random.split(key, 3)
    lost = jax.random.bernoulli(lost, rate, (num_clients,))
    before = jax.random.bernoulli(before, early, (num_clients,))
    moment = jax.random.uniform(moment, (num_clients,), minval=1e-6)
    return jnp.where(lost, jnp.where(before, 0.0, moment), jnp.inf)


DROPOUT_PROCESS = Process(
    about="Clients are lost before or in the middle of their training.",
    is_on=has_dropout,
    init=init_dropout,
    step=step_dropout,
    apply=apply_dropout,
    options=(
        Option(
            "availability.dropout",
            SHARE,
            "chance per client and round of being lost",
            TRACED,
        ),
        Option(
            "availability.early",
            SHARE,
            "share of the lost that never start training",
            TRACED,
        ),
    ),
)


# ---- cohorts


def choose_cohort(
    key: Array, view: View, sizes: Sizes, static: Static, urge: Array | None = None
) -> Array:
    """The cohort's client ids [C], ascending.

    Args:
      key: a JAX key, consumed.
      view: gives the examples of each client, and which can be reached.
      sizes: static sizes.
      static: gives `availability.sampling`. `uniform` and `size` do not know which
        clients can be reached, and the others are missing in the round; `reachable`
        draws among those that can, if there are enough.
      urge: see `sample_weighted`; None for no floor.
    """
    count, wanted = sizes.num_clients, sizes.cohort_size
    sampling = static.availability.sampling
    if wanted == count or (sampling == "uniform" and urge is None):
        return sample_cohort(key, count, wanted)
    by_size = sampling == "size"
    weight = view.federation.size if by_size else view.events.reachable
    if sampling == "uniform":
        weight = jnp.ones(count)
    return sample_weighted(key, weight.astype(jnp.float32), wanted, urge)


def sample_cohort(key: Array, num_clients: int, cohort_size: int) -> Array:
    """Draws the clients of one round uniformly, without replacement.

    Args:
      key: a JAX key, consumed.
      num_clients: N.
      cohort_size: C; with C = N all take part and nothing is drawn.

    Returns:
      [C] int32 client ids in ascending order.

    Raises:
      UserError: if `cohort_size` is not in [1, num_clients].
    """
    if not 1 <= cohort_size <= num_clients:
        raise UserError(
            f"cohort_size={cohort_size} is not allowed; allowed: 1 to "
            f"num_clients={num_clients}"
        )
    if cohort_size == num_clients:
        return jnp.arange(num_clients, dtype=jnp.int32)
    chosen = jax.random.choice(key, num_clients, (cohort_size,), replace=False)
    return jnp.sort(chosen.astype(jnp.int32))


def sample_weighted(
    key: Array, weight: Array, cohort_size: int, urge: Array | None = None
) -> Array:
    """Draws clients one after the other, each in proportion to its weight.

    By the Gumbel top-k trick, which is the same as drawing without replacement. Where
    fewer than C clients have weight, the rest of the cohort are clients without any.

    Args:
      key: a JAX key, consumed.
      weight: [N] float32 >= 0.
      cohort_size: C <= N.
      urge: [N] float32 >= 0, added to the logarithms of the weights, so that a client
        is drawn as one of `exp(urge)` times the weight; one without weight has none.

    Returns:
      [C] int32 client ids in ascending order.
    """
    luck = jax.random.gumbel(key, weight.shape)
    merit = jnp.where(weight > 0, jnp.log(jnp.maximum(weight, 1e-30)), -1e4)
    if urge is not None:
        merit += jnp.where(weight > 0, urge, 0.0)
    chosen = jax.lax.top_k(merit + luck, cohort_size)[1]
    return jnp.sort(chosen.astype(jnp.int32))
