"""Formats in which a compressed model is written, and their check by reloading."""
