"""Why an evaluator on Ray is gone, in words for a trial's row."""

import re

import ray
from ray.exceptions import RayTaskError

NODE = "its node is gone"
"""What is said of an evaluator that went with its node."""


def cause_of(error: Exception) -> str:
    """Say in a few words why an evaluator is gone.

    Example:
        >>> cause_of(ConnectionError("the server is away"))
        'ConnectionError: the server is away'
    """
    said = " ".join(str(error).split())
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "memory monitor" in said:
        return "killed by Ray, as the memory of its node was running out"
    if re.search(r"(node (has died|was|died)|NodeDied|node_died)", said, re.I):
        return NODE
    if code := re.search(r"exit code (-?\d+)", said):
        return f"ended with exit code {code[1]}"
    if "worker process has died" in said:
        return "died without a word, as when it crashes or is killed for its memory"
    if isinstance(error, RayTaskError) or "creation task" in said:
        return said.rpartition("ray::")[2] or said
    return f"{type(error).__name__}: {said}"
