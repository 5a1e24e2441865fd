"""`python -m fedmoe_jax.data` prepares CIFAR-10, see `load`."""

from absl import app

from fedmoe_jax.data.load import define_flags, main

if __name__ == "__main__":
    define_flags()
    app.run(main)
