"""`python -m fedmoe_jax.data NAME` prepares a data set of TFDS, see `prepare`."""

from absl import app

from fedmoe_jax.data.prepare import define_flags, main

if __name__ == "__main__":
    define_flags()
    app.run(main)
