"""Attacks on what observed runs reveal of their clients."""
