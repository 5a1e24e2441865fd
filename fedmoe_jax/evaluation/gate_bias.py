"""The bias of every client's gates in evaluation, from what the server knows now."""

import jax.numpy as jnp

from fedmoe_jax.align.affinity import bias_experts
from fedmoe_jax.align_layers import EVIDENCE
from fedmoe_jax.broadcast import gather_evidence
from fedmoe_jax.moe_layers import map_layers
from fedmoe_jax.program import Program
from fedmoe_jax.types import Array, Evidence, Hyper, SimState
from fedmoe_jax.world.step import View


def bias_clients(
    state: SimState, view: View, hyper: Hyper, program: Program
) -> Array | None:
    """The bias that each client would be sent now: [N, G, E] float32, None without one.

    Args:
      state: the simulation.
      view: of the world as it is now.
      hyper: gives `gate.bias`.
      program: its strategy has an `affinity` where there is a bias.
    """
    if program.strategy.affinity is None:
        return None
    everyone = jnp.arange(program.sizes.num_clients)
    evidence = gather_evidence(state, view, everyone, state.belief, hyper, program)

    def bias_layer(evidence: Evidence) -> Array:
        return bias_experts(evidence, hyper, program.strategy)

    over_layers = map_layers(bias_layer, program.sizes.num_layers, (EVIDENCE,), 1)
    return over_layers(evidence)
