"""What the README says is true: code runs, commands exist, hooks are complete."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from autoprune.cli import app
from autoprune.config import RunConfig
from autoprune.hookspecs import HOOKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert found, f"the README has no {language}"
    return found


def lines_of(program: str) -> list[str]:
    lines = "".join(blocks("console")).splitlines()
    inline = re.findall(rf"`({program} [a-z][^`]*)`", README)
    return [line for line in [*lines, *inline] if line.split()[0] == program]


@pytest.mark.parametrize("line", lines_of("autoprune"))
def test_commands_exist(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    command = COMMANDS[name]
    options = {option for one in command.params for option in one.opts}
    given = [word for word in words if word.startswith("--")]
    assert set(given) <= options
    flags = {
        o for one in command.params if getattr(one, "is_flag", 0) for o in one.opts
    }
    arguments = [one for one in command.params if not one.opts[0].startswith("-")]
    left, words = [], list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            left.append(word)
        elif word not in flags:
            words.pop(0)
    required = sum(one.required for one in arguments)
    assert required <= len(left) <= len(arguments), left


def test_every_command_is_shown() -> None:
    shown = {line.split()[1] for line in lines_of("autoprune")}
    # `make demo` is how the README shows the demo.
    assert COMMANDS.keys() - {"demo"} <= shown


@pytest.mark.parametrize("line", lines_of("make"))
def test_targets_of_make_exist(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    makefile = (ROOT / "Makefile").read_text()
    for target in words:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configurations_can_be_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "readme.yaml"
    path.write_text(text)
    assert RunConfig.from_yaml(path).space


def test_hooks_stand_with_their_exact_arguments() -> None:
    rows = re.findall(r"^\| `(\w+\([\w, ]*\))` \|", README, re.MULTILINE)
    wanted = [
        f"{hook.__name__}({', '.join(inspect.signature(hook).parameters)})"
        for hook in HOOKS
    ]
    assert rows == wanted


def test_the_layout_names_what_there_is() -> None:
    (layout,) = re.findall(
        r"^```\n(autoprune/.*?)^```", README, re.DOTALL | re.MULTILINE
    )
    package = ROOT / "autoprune"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    modules = {path.name for path in package.glob("[!_]*.py")}
    words = set(layout.split())
    assert rooms | modules <= words
    named = {word for word in words if re.fullmatch(r"\w+(/|\.py)", word)}
    for word in named - {"autoprune/"}:
        assert (package / word).exists() or (ROOT / word).exists(), word


@pytest.mark.slow
@pytest.mark.ci
def test_python_runs(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        if title := re.match(r"# (\w+\.py)\n", block):
            Path(title[1]).write_text(block)
        else:
            exec(block.replace('"demo"', repr(str(tiny_checkpoint))), names)
    assert names["found"]["policy"]["perplexity"] > 1  # type: ignore[index]
    from autoprune.plugins import load_plugins

    assert "random-pruning" in load_plugins(["my_method"]).methods
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout
