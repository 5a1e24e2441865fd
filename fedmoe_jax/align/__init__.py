"""Scores of clients and experts, and decisions from them."""
