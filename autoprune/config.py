"""A run's configuration, read strictly from YAML: unknown keys are refused."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from autoprune.errors import ConfigError, unknown_name
from autoprune.limits import Limit
from autoprune.search_config import (
    Part,
    RecoveryConfig,
    SearchConfig,
    WorkersConfig,
)

Budgets = dict[str, Annotated[Limit, BeforeValidator(Limit.parse)]]


class TextConfig(Part):
    """Which text, and how many windows of it each split gets.

    Attributes:
        source: ``builtin``, ``file:PATH``, ``hub:...``.
        window: Tokens of a window.
        statistics: Windows of split A, for norms and Hessians.
        fitness: Windows of split B, on which trials are compared.
        choice: Windows of split C, for the choice among finalists.
        report: Windows of split D, the figures that the user sees; touched once.
        recovery: Windows of split A that recoveries train on; one in eight judges.
    """

    source: str = "builtin"
    window: int = Field(512, ge=8, le=131072)
    statistics: int = Field(32, ge=1)
    fitness: int = Field(2, ge=1)
    choice: int = Field(8, ge=1)
    report: int = Field(8, ge=1)
    recovery: int = Field(0, ge=0)

    @property
    def windows(self) -> dict[str, int]:
        """Windows wanted of each split, by its name.

        Recoveries train on those of the statistics' split.
        """
        wanted = self.model_dump(exclude={"source", "window", "recovery"})
        return wanted | {"statistics": max(self.statistics, self.recovery)}


class Rule(Part):
    """The actions that some sites may choose from.

    Attributes:
        sites: Pattern of site names, ``*`` matching anything.
        actions: Texts of actions; a list in a parameter stands for one action each.
    """

    sites: str = "blocks.*"
    actions: list[str] = Field(min_length=1)


class ObjectiveConfig(Part):
    """What is wanted: one metric, a reward, or a Pareto front, under budgets.

    Attributes:
        metric: The metric to improve, in its own direction.
        pareto: Several metrics to trade against each other.
        reward: Name of the reward to maximise.
        weights: Weights of the reward's terms, by metric.
        budgets: Limits by metric; a metric that shall be large gets a lower limit.
    """

    metric: str | None = None
    pareto: list[str] | None = Field(None, min_length=2)
    reward: str | None = None
    weights: dict[str, float] = {}
    budgets: Budgets = {}

    @model_validator(mode="after")
    def _one_aim(self) -> Self:
        aims = [a for a in ("metric", "pareto", "reward") if getattr(self, a)]
        if len(aims) > 1:
            raise ValueError(f"name one of metric, pareto and reward, found {aims}")
        if self.weights and not self.reward:
            raise ValueError(
                "weights belong to a reward; name it, such as reward: logs"
            )
        return self


class LatencyConfig(Part):
    """Of what time is predicted, beside what the model keeps.

    Each workload becomes a metric, ``latency_decode_ms``, that may be limited, improved
    or weighed like any other.

    Attributes:
        device: ``auto`` for the machine's own GPU, or else its processor; ``cpu``; a
            GPU such as ``h100``; the folder of a profile, or the name of one.
        workloads: Names of workloads that ship, or workloads by their own name.
    """

    device: str = "auto"
    workloads: list[str | dict[str, dict[str, int | str]]] = Field(
        ["decode", "serve", "prefill"], min_length=1
    )


class RunConfig(Part):
    """The whole configuration of a run.

    Attributes:
        model: Local folder, hub id, GGUF file, or ``demo``.
        task: What the model is for.
        text: Which text.
        fuse: Layers that runtimes fuse (q, k, v; gate, up) share one action. Zeros
            without a pattern need no kernel: there false gives each its own.
        space: Rules in order; the last that matches a site decides.
        prefilter: Leave choices out, before their variants are made, where another is
            clearly smaller and clearly closer to the dense weight.
        bank: Whose compressed model gives the inputs that variants are made on:
            ``dense``, or ``uniform`` for the uniform policy nearest to the budget.
        objective: What is wanted.
        latency: The device and the workloads whose time counts; none by default.
        search: How and how long.
        recovery: How finalists are trained after it; not at all by default.
        workers: Who evaluates: this process, others beside it, or a cluster.
        export: The export target, which decides what size means.
        tensor_parallel: GPUs that have to share every layer of an export; what they
            cannot is left out of the space, whatever the target.
        plugins: Modules to load beside the installed plugins.
    """

    model: str = "demo"
    task: str = "causal-lm"
    text: TextConfig = TextConfig()
    fuse: bool = True
    space: list[Rule] = Field(min_length=1)
    prefilter: bool = False
    bank: Literal["dense", "uniform"] = "uniform"
    objective: ObjectiveConfig = ObjectiveConfig()
    latency: LatencyConfig | None = None
    search: SearchConfig
    recovery: RecoveryConfig | None = None
    workers: WorkersConfig = WorkersConfig()
    ledger: str | None = None
    mirror: str | None = None
    export: str = "packed"
    tensor_parallel: int = Field(1, ge=1)
    plugins: list[str] = []

    @model_validator(mode="after")
    def _text_to_train_on(self) -> Self:
        if self.recovery and self.text.recovery < 2:
            raise ValueError(
                "recovery trains on some windows of the text and judges by others: "
                f"give text.recovery, such as 128; found {self.text.recovery}"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> "RunConfig":
        """Read a configuration.

        Args:
            path: A YAML file.
            **changes: Values that replace the file's, by dotted name with ``__``:
                ``search__trials=10``. None changes nothing.

        Raises:
            ConfigError: If the file is missing, is no YAML, or has a key or value that
                is not allowed; names file, place and near misses.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot read the space {path}: {error.strerror}"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no YAML: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds {data!r}; expected keys such as 'space'")
        return cls.from_dict(data, str(path), **changes)

    @classmethod
    def from_dict(
        cls, data: dict[str, Any], where: str = "configuration", **changes: Any
    ) -> "RunConfig":
        """Read a configuration from plain data; see ``from_yaml``."""
        data = {**data}
        for name, value in changes.items():
            if value is not None:
                _replace(data, name.split("__"), value)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(error, where)) from error


def _replace(data: dict[str, Any], path: list[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        below = data.get(name) or {}
        if not isinstance(below, dict):
            return  # the validation tells what is wrong with it
        data[name] = {**below}
        data = data[name]
    data[last] = value


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            *parents, name = problem["loc"]
            lines.append(unknown_name("key", str(name), _fields_at(parents)))
            if parents:
                lines[-1] += f" (in {'.'.join(map(str, parents))})"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = problem.get("input")
            told = isinstance(found, dict) or repr(found) in message
            quote = "" if told else f", found {found!r}"
            lines.append(f"{place or 'top level'}: {message}{quote}")
    return f"{where}: " + "; ".join(lines)


def _fields_at(path: list[Any]) -> list[str]:
    """Name the keys that are allowed at a place of the configuration."""
    known = [_PARTS[part] for part in path if part in _PARTS]
    return list((known[-1] if known else RunConfig).model_fields)


_PARTS: dict[str, type[BaseModel]] = {
    "text": TextConfig,
    "space": Rule,
    "objective": ObjectiveConfig,
    "budgets": Limit,
    "latency": LatencyConfig,
    "search": SearchConfig,
    "workers": WorkersConfig,
}
"""What stands below the keys that hold more keys."""
