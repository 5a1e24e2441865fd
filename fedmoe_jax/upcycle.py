"""Dense warm-up: clients train the first expert alone, and all others are its copies.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055) in a federation: in the first
`upcycle.rounds` rounds the model is in effect a dense one with a single expert. Scores
and the strategy's own state learn nothing then, as nothing tells experts apart.
"""

import jax
import jax.numpy as jnp

from fedmoe_jax.types import AlignState, Array, Assignment, Hyper, PyTree


def is_warming(round: Array, hyper: Hyper) -> Array:
    """[] bool, whether a round, [] int32, belongs to the dense warm-up."""
    return round < hyper.upcycle.rounds


def hold_first(assignment: Assignment, warming: Array) -> Assignment:
    """Expert 0 alone for every client of a warm-up, and no calibration of its gate.

    Calibration would teach the gate that expert 0 is best, which it will not be among
    its copies.

    Args:
      assignment: the strategy's, leaves [C, G, ...].
      warming: [] bool; where it is false nothing changes.
    """
    first = jnp.zeros_like(assignment.slot).at[..., 0].set(True)
    factor = assignment.calibration
    factor = jnp.ones(first.shape[:-1]) if factor is None else factor
    asked, assigned = assignment.asked, assignment.assigned
    if asked is not None:  # all ask for the same, which says nothing
        assert assigned is not None
        one = jnp.zeros_like(asked).at[..., 0].set(True)
        asked, assigned = (jnp.where(warming, one, each) for each in (asked, assigned))
    return assignment.replace(
        held=jnp.where(warming, 0, assignment.held),
        slot=jnp.where(warming, first, assignment.slot),
        calibration=jnp.where(warming, 0.0, factor),
        asked=asked,
        assigned=assigned,
    )


def copy_first(tree: PyTree, warming: Array) -> PyTree:
    """Params, or the server's optimiser state, with expert 0 in all rows of experts.

    Args:
      tree: by part; leaves under `experts` are [E, ...].
      warming: [] bool, of the round that has made it; where false nothing changes.
    """
    copy = lambda leaf: jnp.where(warming, leaf[:1], leaf)
    return tree | {"experts": jax.tree.map(copy, tree["experts"])}


def keep_scores(before: AlignState, after: AlignState, warming: Array) -> AlignState:
    """The alignment state after a round, in a warm-up as it was before it.

    Held sets, too: a client that is not assigned any experts for a while after a
    warm-up is evaluated with all of them, not with the first one as it has become.

    Args:
      before: before the round.
      after: after the round.
      warming: [] bool, whether the round belongs to a warm-up.
    """
    return jax.tree.map(lambda old, new: jnp.where(warming, old, new), before, after)
