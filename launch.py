"""The program of `fedmoe_jax.launch`, from a checkout: `python launch.py --help`."""

import sys

try:
    from fedmoe_jax.launch import start
except ModuleNotFoundError as error:
    if (error.name or "").startswith("fedmoe_jax"):
        raise
    print(
        f"error: {error.name} is not installed for this Python; allowed: one with the "
        "packages, as `make setup` and `. .venv/bin/activate` give",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    start()
