"""What a model is asked for: named workloads, of which time is predicted."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from autoprune.errors import ConfigError, unknown_name

EXECUTIONS = ("graph", "eager")
AUTO = "auto"
DTYPES = (AUTO, "bfloat16", "float16", "float32")
USUAL = {"cuda": "bfloat16", "cpu": "float32"}
"""The type that a kind of device computes in where nothing else is said."""

CONTEXTS = 3
"""Points of the decode at which attention is timed, the middle of each third."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch of prompts and what is generated from them.

    Attributes:
        name: Unique, lower case.
        batch: Sequences that run together.
        prompt: Tokens of each prompt.
        output: Tokens generated for each, the first by the prefill itself.
        execution: ``graph`` for a captured graph, ``eager`` for a launch an operation.
        dtype: Type of activations and of what is not compressed; ``auto`` for what is
            usual on the device.
    """

    name: str
    batch: int
    prompt: int
    output: int
    execution: str = "graph"
    dtype: str = AUTO

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "output"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"workload {self.name!r}: {name} is a whole number of at least 1, "
                    f"found {value!r}"
                )
        for name, known in (("execution", EXECUTIONS), ("dtype", DTYPES)):
            if (value := getattr(self, name)) not in known:
                problem = unknown_name(name, str(value), known)
                raise ConfigError(f"workload {self.name!r}: {problem}")

    @classmethod
    def from_dict(cls, name: str, data: Any) -> "Workload":
        """Read a workload from plain data.

        Raises:
            ConfigError: If a key is missing or unknown, or a value is impossible.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"workload {name!r}: expected keys batch, prompt and output, found "
                f"{data!r}"
            )
        known = {field.name for field in fields(cls)} - {"name"}
        for key in data:
            if key not in known:
                problem = unknown_name("key", str(key), known)
                raise ConfigError(f"workload {name!r}: {problem}")
        if missing := [k for k in ("batch", "prompt", "output") if k not in data]:
            raise ConfigError(f"workload {name!r}: {missing[0]} is missing")
        return cls(name, **data)

    def on(self, kind: str) -> "Workload":
        """Give it with the usual type of ``cuda`` or ``cpu``, unless it has one."""
        return replace(self, dtype=USUAL[kind]) if self.dtype == AUTO else self

    @property
    def decode_contexts(self) -> tuple[int, ...]:
        """Tokens that a step attends to, at the middle of each third of the decode."""
        steps = max(self.output - 1, 1)
        middles = ((2 * i + 1) / (2 * CONTEXTS) for i in range(CONTEXTS))
        return tuple(self.prompt + max(1, round(steps * share)) for share in middles)


@cache
def shipped_workloads() -> Mapping[str, Workload]:
    """Give the workloads that ship, by name."""
    text = (files("autoprune.latency") / "workloads.yaml").read_text(encoding="utf-8")
    found = yaml.safe_load(text)
    return {name: Workload.from_dict(name, data) for name, data in found.items()}


def find_workload(name: str) -> Workload:
    """Look up a workload that ships.

    Raises:
        ConfigError: If there is none of that name; lists near misses.
    """
    known = shipped_workloads()
    if name not in known:
        raise ConfigError(unknown_name("workload", name, known))
    return known[name]
