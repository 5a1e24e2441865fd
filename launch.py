"""The program of `fedmoe_jax.launch`, from a checkout: `python launch.py --help`."""

from fedmoe_jax.launch import start

if __name__ == "__main__":
    start()
