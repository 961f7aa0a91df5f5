"""Spaces that ship: one YAML file per question that a user asks."""
