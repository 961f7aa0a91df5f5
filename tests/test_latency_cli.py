"""Commands about time: a search within a time, other times after it, advice."""

import json
from pathlib import Path

import pytest
import yaml
from tiny_runs import space_of, write_text
from typer.testing import CliRunner, Result

from autoprune.cli import app

NAME = "latency_prefill_ms"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def must(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def space(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    data = space_of(
        tiny_checkpoint,
        write_text(folder),
        space=[{"sites": "blocks.*.block", "actions": ["drop", "dense"]}],
        objective={"metric": "kl"},
        search={"trials": 4, "finalists": 1, "refine": "none"},
    )
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def ended(space: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("timed") / "run"
    limits = ["--latency", "prefill=60%", "--device", "a100"]
    return folder, must("search", space, "--run", folder, *limits)


def test_a_search_keeps_the_time_given(ended: tuple[Path, Result]) -> None:
    folder, result = ended
    finals = json.loads((folder / "finals.json").read_text())
    assert finals["winner"]["report"][NAME] <= 0.6 * finals["dense"][NAME]
    assert finals["winner"]["latency"].keys() == {"prefill"}
    shown = " ".join(result.stdout.split())
    assert "prefill time" in shown
    assert "Times are predicted. a100: the data sheet of a100; not measured" in shown
    assert "data sheet of a100" in " ".join(result.stderr.split())
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["latency"] == {"device": "a100", "workloads": ["prefill"]}


def test_a_run_is_solved_for_another_time(
    ended: tuple[Path, Result], tmp_path: Path
) -> None:
    folder, _ = ended
    finals = json.loads((folder / "finals.json").read_text())
    policy = tmp_path / "policy.json"
    found = must("solve", folder, "--latency", "prefill=0.6", "--out", policy, "--json")
    solved = json.loads(found.stdout)
    assert solved["metrics"][NAME] <= 0.6 * finals["dense"][NAME]
    assert policy.exists()
    assert "data sheet of a100; not measured on a GPU yet" in solved["model"]


def test_status_says_what_times_come_from(ended: tuple[Path, Result]) -> None:
    shown = " ".join(must("status", ended[0]).stdout.split())
    assert "times are predicted, from the data sheet of a100; not measured" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--latency", "prefill"], "a limit on time is WORKLOAD=LIMIT"),
        (["--latency", "prefil=60%"], "Did you mean 'prefill'"),
        (["--latency", "prefill=60%", "--device", "h101"], "Did you mean 'h100'"),
        (["--latency", "prefill=lots", "--device", "h100"], "expected a limit such as"),
    ],
)
def test_wrong_times_are_told(
    space: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    result = run("search", space, "--run", tmp_path / "run", *words)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_solve_needs_a_run_that_knows_the_time(ended: tuple[Path, Result]) -> None:
    result = run("solve", ended[0], "--latency", "decode=60%")
    assert result.exit_code == 1
    assert "latency_decode_ms" in " ".join(result.output.split())


@pytest.mark.slow
def test_advice_is_a_table_and_plain_data() -> None:
    asked = ["--device", "l40s", "--workload", "decode", "--format", "int4-g64"]
    found = must("advise", "--model", "demo", *asked)
    assert "not measured on a GPU yet" in " ".join(found.stdout.split())
    assert "half the MLP" in found.stdout
    plain = json.loads(must("advise", "--model", "demo", *asked, "--json").stdout)
    assert plain["device"] == "l40s"
    assert {gain["change"] for gain in plain["gains"]} >= {"int4-g64", "50 % zeros"}


def test_advice_on_what_is_unknown_is_an_error() -> None:
    result = run("advise", "--model", "demo", "--device", "h101")
    assert result.exit_code == 1
    assert "Did you mean 'h100'" in " ".join(result.output.split())
