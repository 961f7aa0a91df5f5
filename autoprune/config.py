"""A run's configuration, read strictly from YAML: unknown keys are refused."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from autoprune.errors import ConfigError, unknown_name

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(%|x|[kMG]B|B)?")
_BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
# Strict: ``yes`` is no number, and no key goes unread.
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def parse_duration(text: Any) -> float:
    """Read a time span in seconds: ``8h``, ``90 min``, ``45``.

    Raises:
        ValueError: If it is no time span, or not positive.

    Example:
        >>> parse_duration("1.5h")
        5400.0
    """
    match = _DURATION.fullmatch(str(text).strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"expected a time such as 90s, 30min or 8h, found {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


class Limit(BaseModel):
    """A budget's limit: absolute, or relative to the dense model.

    Attributes:
        value: The number.
        relative: True if it is a fraction of the dense model's value.
    """

    model_config = _STRICT
    value: float
    relative: bool

    @classmethod
    def parse(cls, text: Any) -> Self:
        """Read a limit: ``40%`` and ``0.4x`` of dense, ``55 MB``, or a plain number.

        Raises:
            ValueError: If it is no limit.

        Example:
            >>> Limit.parse("40%")
            Limit(value=0.4, relative=True)
        """
        if isinstance(text, cls):
            return text
        if isinstance(text, dict):
            return cls(**text)
        match = _AMOUNT.fullmatch(str(text).strip())
        if not match:
            raise ValueError(
                f"expected a limit such as 40%, 0.4x or 55 MB, found {text!r}"
            )
        number, unit = float(match[1]), match[2]
        if unit in ("%", "x"):
            return cls(value=number / 100 if unit == "%" else number, relative=True)
        return cls(value=number * _BYTES.get(unit, 1), relative=False)

    def absolute(self, dense: float) -> float:
        """Give the limit in the metric's own unit."""
        return self.value * dense if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:.4g}{' x dense' if self.relative else ''}"


Duration = Annotated[float, BeforeValidator(parse_duration)]
Budgets = dict[str, Annotated[Limit, BeforeValidator(Limit.parse)]]


class _Part(BaseModel):
    model_config = _STRICT


class TextConfig(_Part):
    """Which text, and how many windows of it each split gets.

    Attributes:
        source: ``builtin``, ``file:PATH``, ``hub:...``.
        window: Tokens of a window.
        statistics: Windows of split A, for norms and Hessians.
        fitness: Windows of split B, on which trials are compared.
        choice: Windows of split C, for the choice among finalists.
        report: Windows of split D, the figures that the user sees; touched once.
    """

    source: str = "builtin"
    window: int = Field(512, ge=8, le=131072)
    statistics: int = Field(32, ge=1)
    fitness: int = Field(2, ge=1)
    choice: int = Field(8, ge=1)
    report: int = Field(8, ge=1)

    @property
    def windows(self) -> dict[str, int]:
        """Windows wanted of each split, by its name."""
        return self.model_dump(exclude={"source", "window"})


class Rule(_Part):
    """The actions that some sites may choose from.

    Attributes:
        sites: Pattern of site names, ``*`` matching anything.
        actions: Texts of actions; a list in a parameter stands for one action each.
    """

    sites: str = "blocks.*"
    actions: list[str] = Field(min_length=1)


class ObjectiveConfig(_Part):
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


class SearchConfig(_Part):
    """How the space is explored, and for how long.

    Attributes:
        sampler: Name of a strategy.
        trials: Most trials in the run, resumed ones included.
        budget: Most time in seconds, written such as ``8h``.
        seed: Of everything random.
        finalists: How many of the best are compared on split C.
    """

    sampler: str = "nsga2"
    trials: int | None = Field(None, ge=1)
    budget: Duration | None = None
    seed: int = Field(0, ge=0)
    finalists: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.trials is None and self.budget is None:
            raise ValueError(
                "a search needs an end: give trials, a time budget, or both"
            )
        return self


class RunConfig(_Part):
    """The whole configuration of a run.

    Attributes:
        model: Local folder, hub id, GGUF file, or ``demo``.
        task: What the model is for.
        text: Which text.
        fuse: Layers that runtimes fuse (q, k, v; gate, up) share one action. Zeros
            without a pattern need no kernel: there false gives each its own.
        space: Rules in order; the last that matches a site decides.
        bank: Whose compressed model gives the inputs that variants are made on:
            ``dense``, or ``uniform`` for the uniform policy nearest to the budget.
        objective: What is wanted.
        search: How and how long.
        export: The export target, which decides what size means.
        plugins: Modules to load beside the installed plugins.
    """

    model: str = "demo"
    task: str = "causal-lm"
    text: TextConfig = TextConfig()
    fuse: bool = True
    space: list[Rule] = Field(min_length=1)
    bank: Literal["dense", "uniform"] = "uniform"
    objective: ObjectiveConfig = ObjectiveConfig()
    search: SearchConfig
    export: str = "packed"
    plugins: list[str] = []

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
    "search": SearchConfig,
}
"""What stands below the keys that hold more keys."""
