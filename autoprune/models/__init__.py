"""Checkpoints, their layers and sites, tasks, text and statistics of inputs."""
