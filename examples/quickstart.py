# %% [markdown]
# # A strategy of one's own, in a few minutes
#
# A server owns a mixture of experts and decides, every round, which client trains which
# of them. Here is a new way to decide, compared with two of the package's on
# scikit-learn's digits. Nothing is written to disk.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt

import fedmoe_jax
from fedmoe_jax import Option, Strategy
from fedmoe_jax.align.desirability import normalise_fitness
from fedmoe_jax.align.top_k import top_k
from fedmoe_jax.configs import default
from fedmoe_jax.options import SHARE, TRACED

# %% [markdown]
# A strategy is a record of pure functions of arrays: `N` clients, a cohort of `C`, `E`
# experts. This one wants the fittest experts of each client, but one that the client
# has just held loses a part of its appeal.


# %%
def assign(evidence, hyper, sizes, key):
    """Top k_c of the fitness, less for the experts of the last assignment."""
    scores = normalise_fitness(evidence.fitness)  # [C, E]
    scores = scores - hyper.restless.weight * evidence.held
    return top_k(scores, evidence.capacity, sizes.max_held)


RESTLESS = Strategy(
    about="Gives each client its fittest experts, and rather not the last ones again.",
    assign=assign,
    options=(
        Option(
            "restless.weight", SHARE, "loss of an expert just held", TRACED, default=0.3
        ),
    ),
)
STRATEGIES = {"restless": RESTLESS}
fedmoe_jax.load_plugins(__name__)

# %% [markdown]
# It has joined the table of strategies, and its field the config. Three short runs:


# %%
def run(strategy):
    """One run on the digits; the rows of its rounds as arrays."""
    config = default.get_config("smoke")
    config.num_rounds, config.strategy = 12, strategy
    return fedmoe_jax.run(config)


runs = {name: run(name) for name in ("random", "greedy", "restless")}

# %%
figure, axes = plt.subplots()
for name, result in runs.items():
    accuracy = 100 * result.rows["personal_accuracy"]
    measured = jnp.isfinite(accuracy)
    axes.plot(result.rows["round"][measured], accuracy[measured], label=name)
axes.set(xlabel="Round", ylabel="Personal accuracy (%)")
axes.legend()

# %% [markdown]
# The server's model, routed over all experts, on the test images:

# %%
result = runs["restless"]
images, labels = (result.plan.data.test[name] for name in ("x", "y"))
logits = fedmoe_jax.predict(result, images)
print(f"global accuracy {(logits.argmax(-1) == labels).mean():.3f}")
