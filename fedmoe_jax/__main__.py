"""The program of `fedmoe_jax.launch`: `python -m fedmoe_jax --help`."""

from fedmoe_jax.launch import start

if __name__ == "__main__":
    start()
