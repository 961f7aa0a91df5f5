"""Every hook is listed, explained, called, and used by a plugin or a test."""

import re
from pathlib import Path

import pytest

from autoprune import hookspecs
from autoprune.hookspecs import HOOKS, PROJECT
from autoprune.plugins import load_plugins

ROOT = Path(__file__).parents[1]
NAMES = [hook.__name__ for hook in HOOKS]


def sources(folder: str) -> str:
    files = [p for p in (ROOT / folder).rglob("*.py") if p != Path(__file__)]
    assert files
    return "\n".join(path.read_text() for path in files)


def test_every_hook_is_listed_once() -> None:
    specified = [
        name
        for name, value in vars(hookspecs).items()
        if hasattr(value, f"{PROJECT}_spec")
    ]
    assert specified == NAMES


@pytest.mark.parametrize("hook", HOOKS, ids=NAMES)
def test_every_hook_tells_what_it_is_for(hook: object) -> None:
    assert re.match(r"(Return|Observe) .*\.$", hook.__doc__ or "", re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_has_a_plugin_or_a_test_that_uses_it(name: str) -> None:
    built_in = {hook for record in load_plugins().records for hook in record.hooks}
    assert name in built_in or f"def {name}(" in sources("tests")


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_is_called(name: str) -> None:
    if kind := re.fullmatch(r"register_(\w+)", name):
        assert kind[1] in load_plugins().objects
    else:
        assert f'"{name}"' in sources("autoprune")
