"""Defences of what clients reveal: noise on feedback, choices, requests and sums."""
