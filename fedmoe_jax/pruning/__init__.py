"""Pruning of experts and stems to the bytes that each client has room for."""
