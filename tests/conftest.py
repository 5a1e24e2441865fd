"""Settings of every test: eight CPU devices, strict shapes, repeatable examples."""

import os

# JAX reads these once, when it is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Most of the suite's time is spent compiling programs that run once.
        "--xla_backend_optimization_level=0",
    ]
)

import hypothesis
import jax

# [N] + [N, E] is an error in tests: a silent broadcast hides a wrong axis.
jax.config.update("jax_numpy_rank_promotion", "raise")
# `launch.main`, called by tests, would keep every later program in the user's cache.
jax.config.update("jax_enable_compilation_cache", False)

hypothesis.settings.register_profile(
    "fedmoe", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("fedmoe")
