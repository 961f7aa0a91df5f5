"""The commands, on a tiny model; in this process where nothing else is to be shown."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from autoprune.cli import app

SPACE: dict[str, Any] = {
    "text": {
        "source": "file:book.txt",
        "window": 64,
        "statistics": 4,
        "fitness": 2,
        "choice": 2,
        "report": 2,
    },
    "space": [
        {"actions": ["rtn(bits=[3, 4], group=64)", "magnitude(sparsity=0.5)"]},
        {"sites": "embedding", "actions": ["dense"]},
    ],
    "objective": {"budgets": {"size_bytes": "45%"}},
    "search": {"sampler": "random", "trials": 6},
}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def must(*arguments: str | Path) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def write_space(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a space and its text; tests of other texts would take far longer."""
    chapters = [f"Chapter {i}. " + f"It rained {i} days. " * 30 for i in range(60)]
    (folder / "book.txt").write_text("\n\n".join(chapters))
    text = SPACE["text"] | {"source": f"file:{folder / 'book.txt'}"}
    data = {"model": str(model), **SPACE, "text": text} | changes
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def space(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A space for the tiny model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_space(tmp_path, tiny_checkpoint)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A run folder with a finished search; read only."""
    folder = tmp_path_factory.mktemp("finished")
    must("search", write_space(folder, tiny_checkpoint), "--run", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A run folder with a finished search that measured sensitivities; read only."""
    folder = tmp_path_factory.mktemp("priced")
    search = {"sampler": "allocation", "trials": 4}
    space = write_space(folder, tiny_checkpoint, search=search)
    must("search", space, "--run", folder / "run")
    return folder / "run"


def fresh(*code: str) -> str:
    done = subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from autoprune.cli import app\n"
        "for name in ('', 'search', 'status', 'evaluate', 'export', 'apply',"
        " 'solve', 'plugins', 'demo'):\n"
        "    asked = [*name.split(), '--help']\n"
        "    assert CliRunner().invoke(app, asked).exit_code == 0\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    heavy = {"torch", "pandas", "optuna", "transformers", "numpy", "yaml"}
    assert not heavy & set(fresh("-c", code).split())


def test_help_answers_at_once() -> None:
    def seconds(*code: str) -> float:
        start = time.perf_counter()
        fresh(*code)
        return time.perf_counter() - start

    bare = min(seconds("-c", "pass") for _ in range(3))
    code = (
        "import sys; from autoprune.cli import main; sys.argv[1:] = ['--help']; main()"
    )
    asked = min(seconds("-c", code) for _ in range(3))
    # 0.5 s on a free machine; a busy one is slower at starting Python, too.
    assert asked < max(0.5, 15 * bare)


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", must("--version").stdout)


def test_a_search_ends_with_the_final_table(space: Path) -> None:
    result = must("search", space)
    assert "dense" in result.stdout
    assert "winner, trial" in result.stdout
    assert "autoprune export results/runs/tiny" in result.stdout
    assert "searching: " in result.stderr
    assert "searching: " not in result.stdout
    assert (space.parent / "results/runs/tiny/policy.json").is_file()


def test_json_is_all_that_stands_on_standard_output(space: Path) -> None:
    found = json.loads(must("search", space, "--json").stdout)
    assert found["ended"] == "trials"
    assert found["trials"] == 6
    assert found["policy"]["actions"]["embedding"] == "dense"
    assert found["finals"]["winner"]["report"]["perplexity"] > 1


@pytest.mark.slow
def test_options_stand_in_place_of_the_file(
    space: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = (tmp_path / "book.txt").rename(tmp_path / "other.txt")
    write_space(tmp_path, Path("/no/such/model"), search={"budget": "1s"})
    (tmp_path / "watcher_for_cli.py").write_text(
        "import autoprune\n"
        "@autoprune.hookimpl\n"
        "def trial_finished(trial, run_dir):\n"
        "    (run_dir / f'seen-{trial.number}').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    must(
        *("search", space, "--model", tiny_checkpoint, "--run", "here"),
        *("--trials", "2", "--size", "60%", "--sampler", "tpe", "--seed", "3"),
        *("--text", f"file:{book}", "--plugin", "watcher_for_cli"),
    )
    assert sorted(path.name for path in Path("here").glob("seen-*")) == [
        "seen-0",
        "seen-1",
    ]
    config = yaml.safe_load(Path("here/config.yaml").read_text())
    assert config["model"] == str(tiny_checkpoint)
    assert config["search"]["trials"] == 2
    assert config["search"]["budget"] is None  # the file's end no longer counts
    assert config["search"]["sampler"] == "tpe"
    assert config["search"]["seed"] == 3
    assert config["objective"]["budgets"] == {
        "size_bytes": {"value": 0.6, "relative": True}
    }
    assert config["text"]["source"] == f"file:{book}"
    assert config["plugins"] == ["watcher_for_cli"]


@pytest.mark.slow
def test_a_time_budget_ends_the_search(space: Path) -> None:
    must("search", space, "--trials", "2")
    found = json.loads(must("search", space, "--budget", "0.01s", "--json").stdout)
    assert (found["ended"], found["trials"]) == ("time", 2)


def test_a_budget_without_time_for_a_trial_says_so(space: Path) -> None:
    result = run("search", space, "--budget", "0.01s")
    assert result.exit_code == 1
    assert "the time budget of 0.01 s ended before the first trial" in result.stderr


def test_the_same_command_goes_on(space: Path) -> None:
    must("search", space, "--trials", "3")
    found = json.loads(must("search", space, "--trials", "5", "--json").stdout)
    assert found["trials"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "quik"], "unknown space 'quik'. Did you mean 'quick'?"),
        (["search", "missing.yaml"], "unknown space 'missing.yaml'"),
        (["search", "tiny.yaml", "--budget", "soon"], "found 'soon'"),
        (["search", "tiny.yaml", "--size", "tiny"], "found 'tiny'"),
        (["search", "tiny.yaml", "--sampler", "tpee"], "Did you mean 'tpe'?"),
        (["search", "tiny.yaml", "--plugin", "no.such"], "plugin 'no.such'"),
        (["status", "nowhere"], "nowhere is no run folder"),
        (["export", "nowhere"], "nowhere is no run folder"),
        (["plugins", "--plugin", "no.such"], "plugin 'no.such'"),
        (["evaluate", "nowhere"], "'nowhere'"),
        (["solve", "nowhere", "--size", "40%"], "nowhere is no run folder"),
        (
            ["apply", "p", "--model", "m", "--out", "o", "--statistics", "reuze"],
            "Did you mean 'reuse'?",
        ),
    ],
    ids=" ".join,
)
def test_errors_are_a_message_and_exit_code_1(
    space: Path, arguments: list[str], message: str
) -> None:
    result = run(*arguments, *(["--json"] if "--json" not in arguments else []))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["search"],
        ["serch"],
        ["search", "quick", "--trials", "0"],
        ["export", "run", "--front", "--trial", "3"],
        ["apply", "policy.json"],
        ["apply", "p", "--model", "m", "--out", "o", "--tensor-parallel", "0"],
        ["solve", "run"],
        ["solve", "run", "--front", "1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.slow
def test_a_run_of_another_space_is_refused(space: Path) -> None:
    must("search", space, "--trials", "1")
    result = run("search", space, "--trials", "1", "--seed", "9")
    assert result.exit_code == 1
    assert "was made with something else" in result.stderr


def test_status_tells_how_a_run_stands(finished: Path) -> None:
    text = must("status", finished).stdout
    assert "6 of 6 trials (6 complete)" in " ".join(text.split())
    for found in ("Best trials", "Front", "winner, trial"):
        assert found in text
    found = json.loads(must("status", finished, "--json").stdout)
    assert found["trials"] == 6
    assert found["goals"] == {"kl": "minimize"}
    best = [row["metrics"]["kl"] for row in found["best"]]
    assert best == sorted(best)
    assert found["finals"]["winner"]


@pytest.mark.slow
def test_a_run_is_found_by_its_name(space: Path) -> None:
    must("search", space, "--trials", "1")
    Path("tiny").mkdir()  # no run, though it has the name
    assert json.loads(must("status", "tiny", "--json").stdout)["trials"] == 1


def test_evaluate_measures_model_and_policy(
    space: Path, finished: Path, tiny_checkpoint: Path
) -> None:
    policy = finished / "policy.json"
    result = must("evaluate", tiny_checkpoint, "--policy", policy, "--json")
    found = json.loads(result.stdout)
    assert found["policy"]["size_bytes"] < found["dense"]["size_bytes"]
    text = must("evaluate", tiny_checkpoint).stdout
    assert "perplexity" in text
    assert "dense" in text


def test_solve_gives_a_policy_for_another_budget(
    space: Path, priced: Path, tiny_checkpoint: Path
) -> None:
    dense = json.loads((priced / "finals.json").read_text())["dense"]["size_bytes"]
    asked = ("solve", priced, "--size", "50%")
    found = json.loads(must(*asked, "--json").stdout)
    assert found.keys() == {"policy", "metrics", "cost", "model"}
    assert found["metrics"]["size_bytes"] <= 0.5 * dense
    assert found["model"] == "sensitivities, fitted to the trials"
    result = must(*asked, "--out", "half.json")
    assert "Solved, not measured" in result.stdout
    assert "size_bytes" in result.stdout
    record = json.loads(Path("half.json").read_text())
    assert record["actions"] == found["policy"]["actions"]
    assert record["solved"]["metrics"] == found["metrics"]
    measured = must("evaluate", tiny_checkpoint, "--policy", "half.json", "--json")
    size = json.loads(measured.stdout)["policy"]["size_bytes"]
    assert size <= found["metrics"]["size_bytes"]


def test_solve_takes_any_additive_budget_and_several(priced: Path) -> None:
    budgets = ("--budget", "bits_per_weight=8", "--budget", "sparsity=0.1")
    found = json.loads(must("solve", priced, *budgets, "--json").stdout)
    assert found["metrics"]["bits_per_weight"] <= 8
    assert found["metrics"]["sparsity"] >= 0.1
    share = must("solve", priced, "--budget", "size_bytes=0.5", "--json").stdout
    assert share == must("solve", priced, "--size", "50%", "--json").stdout


def test_solve_gives_the_whole_front(priced: Path) -> None:
    points = json.loads(must("solve", priced, "--front", "4", "--json").stdout)
    assert 2 <= len(points) <= 4
    sizes = [point["metrics"]["size_bytes"] for point in points]
    costs = [point["cost"] for point in points]
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)
    said = must("solve", priced, "--front", "4").stdout
    assert "Solved, not measured" in said
    assert max(len(line.rstrip()) for line in said.splitlines()[:-1]) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "tiny"], "found 'tiny'"),
        (["--size", "1%"], "no policy of the space meets the budget size_bytes <= "),
        (["--budget", "size=40%"], "unknown additive metric 'size'"),
        (["--budget", "kl=0.1"], "unknown additive metric 'kl'"),
        (["--budget", "40%"], "a budget is written METRIC=LIMIT, found '40%'"),
        (["--budget", "sparsity=99%"], "dense model's sparsity is 0"),
        (["--size", "50%", "--out", "no/such/folder.json"], "cannot write no/such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_solve_refuses_budgets_that_make_no_sense(
    space: Path, priced: Path, arguments: list[str], message: str
) -> None:
    result = run("solve", priced, *arguments, "--json")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_solve_needs_a_run_that_measured_something(finished: Path) -> None:
    result = run("solve", finished, "--size", "50%")
    assert result.exit_code == 1
    found = " ".join(result.stderr.split())
    assert "has neither sensitivities nor slopes to solve with" in found


def test_plugins_and_methods_are_listed(space: Path) -> None:
    records = json.loads(must("plugins", "--json").stdout)
    assert "methods:gptq" in {name for one in records for name in one["objects"]}
    assert "gptq" in must("plugins").stdout
    methods = json.loads(must("methods", "--json").stdout)
    assert "gptq" in {method["name"] for method in methods}
    assert "2210.17323" in must("methods").stdout
    assert json.loads(must("methods", "gptq", "--json").stdout)["name"] == "gptq"
    assert "Round columns one by one" in must("methods", "gptq").stdout
    assert "\n| `gptq` | quantizes |" in must("methods", "--markdown").stdout


def test_a_method_that_does_not_exist_is_told_with_what_is_near() -> None:
    result = run("methods", "gtpq")
    assert result.exit_code == 1
    assert "unknown method 'gtpq'. Did you mean 'gptq'?" in result.stderr
    assert result.stdout == ""
    assert run("methods", "gptq", "--markdown").exit_code == 2
    assert "\n| `packed` | kept values" in must("targets", "--markdown").stdout
    assert run("targets", "--json", "--markdown").exit_code == 2
    names = [one["name"] for one in json.loads(must("targets", "--json").stdout)]
    assert {"packed", "gguf", "compressed-tensors"} <= set(names)


@pytest.mark.slow
@pytest.mark.ci
def test_export_and_apply_deliver_what_loads(
    space: Path, finished: Path, tiny_checkpoint: Path
) -> None:
    (report,) = json.loads(must("export", finished, "--out", "won", "--json").stdout)
    assert Path(report["folder"], "policy.json").is_file()
    assert report["verified"]["perplexity"] == pytest.approx(
        report["metrics"]["perplexity"], rel=1e-3
    )
    again = run("export", finished, "--out", "won")
    assert again.exit_code == 1
    assert "won exists already" in again.stderr
    plain = must(
        *("apply", finished / "policy.json", "--model", tiny_checkpoint),
        *("--out", "plain", "--target", "transformers"),
    )
    assert "AutoModelForCausalLM.from_pretrained" in plain.stdout
    must("export", finished, "--trial", "1", "--out", "one")
    front = must("export", finished, "--front", "--out", "all", "--json")
    for one in json.loads(front.stdout):
        assert Path(one["folder"]).parent.name == "all"


@pytest.mark.slow
def test_the_demo_ends_with_two_verified_exports(
    space: Path, tiny_checkpoint: Path
) -> None:
    result = must("demo", "--model", tiny_checkpoint, "--trials", "4")
    text = result.stdout
    for found in (
        "dense",
        "winner, trial",
        "Exported, and verified",
        "autoprune.load(",
    ):
        assert found in text
    assert "AutoModelForCausalLM.from_pretrained(" in text
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 80
    for target in ("packed", "transformers"):
        assert Path(f"results/runs/demo/export-{target}/policy.json").is_file()


def in_terminal(*arguments: str, cwd: Path, press_after: str) -> tuple[int, str]:
    """Run the command in a terminal; press Ctrl-C once it says what matches."""
    mine, theirs = pty.openpty()
    command = [sys.executable, "-c", "from autoprune.cli import main; main()"]
    process = subprocess.Popen(
        [*command, *arguments],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "80", "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    said, pressed = b"", False
    try:
        while chunk := read(mine):
            said += chunk
            if not pressed and re.search(press_after.encode(), said):
                os.write(mine, b"\x03")
                pressed = True
    finally:
        process.kill()
        os.close(mine)
    assert pressed, said.decode()
    return process.wait(), said.decode()


def take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # all who wrote are gone
        return b""


@pytest.mark.slow
@pytest.mark.ci
def test_ctrl_c_stops_after_the_trial_and_nothing_is_lost(
    space: Path, tiny_checkpoint: Path
) -> None:
    search = {"sampler": "random", "trials": 1000}
    text = SPACE["text"] | {"source": "builtin", "fitness": 64}
    write_space(space.parent, tiny_checkpoint, text=text, search=search)
    code, said = in_terminal(
        "search", "tiny.yaml", cwd=space.parent, press_after=r"[1-9]\d*/1000"
    )
    assert code == 130
    assert "finishing the running trial" in said
    stopped = re.search(r"Stopped after (\d+) trials", said)
    assert stopped, said
    assert not Path("results/runs/tiny/finals.json").exists()
    done = int(stopped[1])
    assert json.loads(must("status", "tiny", "--json").stdout)["trials"] == done
    more = must("search", "tiny.yaml", "--trials", str(done + 1), "--json")
    assert json.loads(more.stdout)["trials"] == done + 1
