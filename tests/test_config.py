"""A configuration is read strictly; what is wrong with it is said at its place."""

import re
from pathlib import Path
from typing import Any

import pytest

from autoprune.config import RunConfig
from autoprune.errors import ConfigError
from autoprune.limits import Limit, parse_duration

LEAST: dict[str, Any] = {"space": [{"actions": ["dense"]}], "search": {"trials": 3}}
YAML = """
space:
  - sites: blocks.*
    actions: [dense, "rtn(bits=[4, 8])"]
objective:
  metric: kl
  budgets: {size_bytes: 40%}
search: {budget: 8h, trials: 100}
"""


def read(**changes: Any) -> RunConfig:
    return RunConfig.from_dict({**LEAST, **changes})


def test_defaults_make_a_whole_configuration() -> None:
    config = read()
    assert (config.model, config.task, config.export) == ("demo", "causal-lm", "packed")
    assert config.bank == "uniform"
    assert config.text.window == 512
    assert config.search.trials == 3
    assert config.search.budget is None


def test_a_file_is_read_with_changes(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(YAML)
    config = RunConfig.from_yaml(
        path, search__trials=7, text__window=64, search__seed=None
    )
    assert config.search.budget == 28800.0
    assert config.search.trials == 7
    assert config.search.seed == 0
    assert config.text.window == 64
    assert config.space[0].actions == ["dense", "rtn(bits=[4, 8])"]
    limit = config.objective.budgets["size_bytes"]
    assert limit == Limit(value=0.4, relative=True)
    assert limit.absolute(200.0) == 80.0


def test_a_configuration_survives_its_own_data() -> None:
    config = read(objective={"budgets": {"size_bytes": "55 MB"}}, search={"budget": 9})
    assert RunConfig.from_dict(config.model_dump()) == config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_changes_leave_the_data_alone() -> None:
    data = {**LEAST, "search": {"trials": 3}}
    RunConfig.from_dict(data, search__trials=9, text__window=64)
    assert data == LEAST


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle'. Did you mean 'model'? Known: bank, "),
        (
            {"search": {"trails": 3}},
            "unknown key 'trails'. Did you mean 'trials' or 'rivals'? Known: budget, "
            "deadline, disk, finalists, memory, proposals, pruner, refine, rivals, "
            "rounds, rungs, sampler, seed, sensitivity, trials (in search)",
        ),
        (
            {"space": [{"site": "a", "actions": ["rtn"]}]},
            "unknown key 'site'. Did you mean 'sites'? Known: actions, sites "
            "(in space.0)",
        ),
        (
            {"objective": {"budgets": {"kl": {"value": 1, "relativ": True}}}},
            "unknown key 'relativ'. Did you mean 'relative'? Known: relative, value",
        ),
        ({1: 2}, "1: Keys should be strings, found 1"),
        ({"space": []}, "space: List should have at least 1 item"),
        ({"space": [{"actions": []}]}, "space.0.actions: List should have at least 1"),
        ({"space": [{"actions": [4]}]}, "space.0.actions.0: Input should be a valid s"),
        ({"space": [{}]}, "space.0.actions: Field required"),
        ({"search": {}}, "search: a search needs an end: give trials, a time budget"),
        ({"search": {"trials": 0}}, "search.trials: Input should be greater than or "),
        ({"search": {"trials": True}}, "valid integer, found True"),
        ({"search": {"trials": "3"}}, "valid integer, found '3'"),
        ({"search": {"trials": 1, "seed": -1}}, "equal to 0, found -1"),
        ({"search": {"budget": "8 hours"}}, "search.budget: expected a time such as "),
        ({"search": {"budget": "0h"}}, "30min or 8h, found '0h'"),
        ({"search": [1]}, "search: Input should be a valid dictionary or instance of"),
        (
            {"bank": "unifrom"},
            "bank: Input should be 'dense' or 'uniform', found 'unif",
        ),
        ({"text": {"window": 4}}, "text.window: Input should be greater than or equal"),
        ({"text": {"fitness": 0}}, "text.fitness: Input should be greater than or equ"),
        (
            {"objective": {"metric": "kl", "reward": "logs"}},
            "name one of metric, pareto and reward, found ['metric', 'reward']",
        ),
        ({"objective": {"pareto": ["kl"]}}, "objective.pareto: List should have at le"),
        ({"objective": {"weights": {"kl": 1}}}, "weights belong to a reward; name it"),
        (
            {"objective": {"reward": "logs", "weights": {"kl": float("nan")}}},
            "objective.weights.kl: Input should be a finite number, found nan",
        ),
        (
            {"objective": {"budgets": {"size_bytes": "forty"}}},
            "objective.budgets.size_bytes: expected a limit such as 40%, 0.4x or 55 "
            "MB, found 'forty'",
        ),
    ],
)
def test_what_is_wrong_is_said_at_its_place(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read(**changes) if 1 not in changes else RunConfig.from_dict(LEAST | changes)
    assert str(caught.value).startswith("configuration: ")


def test_a_value_is_quoted_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read(search={"budget": "soon"})
    assert str(caught.value).count("'soon'") == 1


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"bank: .*'x'; .*'modle'"):
        read(modle="demo", bank="x")


@pytest.mark.parametrize("content", ["search: [1]", "search: 4", "search: a"])
def test_a_change_below_what_holds_no_keys_is_refused(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(f"space: [{{actions: [dense]}}]\n{content}\n")
    with pytest.raises(ConfigError, match="search: Input should be a valid dictionary"):
        RunConfig.from_yaml(path, search__trials=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"space: [", "is no YAML: while parsing a flow"),
        (b"\xff\xfe\xfa", "is no YAML"),
        (b"", "holds None; expected keys such as 'space'"),
        (b"[1, 2]", r"holds \[1, 2\]; expected keys"),
    ],
    ids=["syntax", "bytes", "empty", "list"],
)
def test_a_file_that_is_no_configuration_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"space.yaml {message}"):
        RunConfig.from_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(ConfigError, match=r"nowhere.yaml: No such file"):
        RunConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="Is a directory"):
        RunConfig.from_yaml(tmp_path)


def test_a_file_is_named_in_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("space: []\nsearch: {trials: 1}\n")
    with pytest.raises(ConfigError, match=r"space\.yaml: space: List"):
        RunConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8h", 28800.0),
        ("1.5 h", 5400.0),
        ("30min", 1800.0),
        ("2m", 120.0),
        ("90s", 90.0),
        ("45", 45.0),
        (45, 45.0),
        (0.5, 0.5),
        ("1d", 86400.0),
    ],
)
def test_a_duration_is_read(text: Any, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "8 hours", "-1h", "0", "0.0s", True, None])
def test_what_is_no_duration_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"found {text!r}")):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "value", "relative", "shown"),
    [
        ("40%", 0.4, True, "0.4 x dense"),
        ("0.4x", 0.4, True, "0.4 x dense"),
        ("55 MB", 55e6, False, "5.5e+07"),
        ("1.5GB", 1.5e9, False, "1.5e+09"),
        ("3kB", 3e3, False, "3000"),
        ("12B", 12.0, False, "12"),
        ("1e-3", 1e-3, False, "0.001"),
        (4, 4.0, False, "4"),
    ],
)
def test_a_limit_is_read(text: Any, value: float, relative: bool, shown: str) -> None:
    limit = Limit.parse(text)
    assert limit == Limit(value=value, relative=relative)
    assert str(limit) == shown
    assert Limit.parse(limit) is limit


@pytest.mark.parametrize("text", ["", "%", "40 percent", "-3", "5 TB", True, None])
def test_what_is_no_limit_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"found {text!r}")):
        Limit.parse(text)
