"""`python -m fedmoe_jax.attack RUNS... --workdir=DIR` attacks runs, see `command`."""

from absl import app

from fedmoe_jax.attack.command import define_flags, main

if __name__ == "__main__":
    define_flags()
    app.run(main)
