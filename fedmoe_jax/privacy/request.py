"""Randomised response on held sets: what clients ask for on the link, and train.

Each of the E bits of a client's held set is kept with probability e^eps / (1 + e^eps),
eps being `privacy.flip`. The client asks for the experts of the randomised set,
receives all of them and sends something of equal size back for each: those that it does
not train are cover traffic. It trains the experts that it was assigned and has asked
for. Where the randomised set is empty, it asks for one expert drawn uniformly; where it
asks for none of its own, it trains one drawn among those that it asks for. Both read
the randomised set alone, so that the guarantee is of what is asked for as it is, and no
valid slot is ever lacking.

A listener on the link, or whoever serves experts, sees the randomised set; the server
that assigns knows the true one, and feedback names the experts that were trained. Cover
traffic takes time and counts against the deadline, but no memory: what is not trained
is not kept.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.align.explore import uniform_scores
from fedmoe_jax.models.submodel import held_mask, is_local
from fedmoe_jax.types import Array, Assignment, Hyper

REQUEST = 1602  # purpose, folded into the key of a decision


def randomise(wanted: Array, travels: Array, epsilon: Array, drawn: Array) -> Array:
    """The experts that ONE client asks for: [E] bool, one at least if any travels.

    Args:
      wanted: [E] bool, those that it is to hold.
      travels: [E] bool, those that do not stay with the client.
      epsilon: [] float32 > 0, of each bit.
      drawn: [2, E] float32 uniform in [0, 1): of the bits, and lots.
    """
    kept = drawn[0] < jax.nn.sigmoid(epsilon)
    asked = jnp.where(kept, wanted, ~wanted) & travels
    best = jnp.where(travels, drawn[1], -1.0).argmax()
    one = (jnp.arange(len(wanted)) == best) & travels
    return jnp.where(asked.any(), asked, one)


def train_asked(
    held: Array, slot: Array, asked: Array, travels: Array, lots: Array
) -> tuple[Array, Array]:
    """The slots that ONE client trains: held [K] int32 and slot [K] bool.

    Args:
      held: [K] int32, as assigned.
      slot: [K] bool, as assigned.
      asked: [E] bool, the experts that it asks for.
      travels: [E] bool; the others it has, and need not ask for.
      lots: [E] float32 in [0, 1), which draw an expert where it asks for none of these.
    """
    own = slot & (asked | ~travels)[held]
    other = jnp.where(asked, lots, -1.0).argmax().astype(held.dtype)
    first = jnp.arange(len(held)) == 0
    none = ~own.any()
    return jnp.where(none & first, other, held), jnp.where(none, first, own)


def request(
    assignment: Assignment,
    client: Array,
    hyper: Hyper,
    key: Array,
    *,
    num_experts: int,
    local_experts: int,
) -> Assignment:
    """The assignment of ONE layer as clients ask for it, leaves [C, ...].

    A client's draws do not depend on the rest of the cohort.

    Args:
      assignment: the strategy's.
      client: [C] int32, client ids.
      hyper: gives `privacy.flip`.
      key: of the decision, not consumed.
      num_experts: E.
      local_experts: the last experts, which stay with the clients.
    """
    travels = ~is_local(jnp.arange(num_experts), num_experts, local_experts)
    request_key = jax.random.fold_in(key, REQUEST)
    drawn = uniform_scores(request_key, client, 3 * num_experts)
    drawn = drawn.reshape(-1, 3, num_experts)

    def ask(held: Array, slot: Array, drawn: Array) -> tuple[Array, ...]:
        wanted = held_mask(held, slot, num_experts)
        asked = randomise(wanted, travels, hyper.privacy.flip, drawn[:2])
        trained = train_asked(held, slot, asked, travels, drawn[2])
        return *trained, asked, wanted & travels

    own = assignment.held, assignment.slot
    held, slot, asked, assigned = jax.vmap(ask)(*own, drawn)
    return assignment.replace(held=held, slot=slot, asked=asked, assigned=assigned)
