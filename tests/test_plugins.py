"""Plugins are found, checked and isolated; clashes name both modules."""

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from autoprune.errors import PluginError
from autoprune.plugins import Plugins, load_plugins

HEAD = """
from autoprune.evaluation.reward import Reward
from autoprune.hookspecs import hookimpl

class Last(Reward):
    default_weights = {}
    def __init__(self, name):
        self.name = name
    def score(self, measurement, dense, weights):
        return 0.0
"""
GOOD = """
@hookimpl
def register_rewards():
    return [Last("last")]
"""


class Installer:
    """Puts modules, and packages with an entry point, where Python finds them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str, body: str, head: str = HEAD) -> str:
        (self.folder / f"{name}.py").write_text(head + dedent(body))
        return name

    def package(
        self, name: str, body: str, head: str = HEAD, *, point: str | None = None
    ) -> str:
        self.module(name, body, head)
        info = self.folder / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n"
        )
        line = f"{point or name} = {name}\n"
        (info / "entry_points.txt").write_text(f"[autoprune]\n{line}")
        return name


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Installer(tmp_path)
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def record(plugins: Plugins, name: str) -> str | None:
    return next(r.error for r in plugins.records if r.name == name)


def test_the_built_in_plugins_all_load() -> None:
    plugins = load_plugins()
    assert [r for r in plugins.records if r.error] == []
    built_in = {r.name: r for r in plugins.records if r.module.startswith("autoprune_")}
    assert built_in["rtn"].objects == ("methods:rtn",)
    assert built_in["rtn"].hooks == ("register_methods",)
    assert built_in["rtn"].distribution.startswith("autoprune ")
    assert {"magnitude", "wanda", "sparsegpt", "rtn", "gptq"} <= plugins.methods.keys()
    assert plugins.get("tasks", "causal-lm").name == "causal-lm"


def test_an_installed_plugin_is_found(install: Installer) -> None:
    install.package("pack_a", GOOD)
    plugins = load_plugins()
    (found,) = [r for r in plugins.records if r.name == "pack_a"]
    assert found.distribution == "pack_a 1.5"
    assert found.objects == ("rewards:last",)
    assert plugins.get("rewards", "last").name == "last"


def test_a_module_named_by_hand_is_found_and_taken_once(install: Installer) -> None:
    name = install.module("by_hand", GOOD)
    plugins = load_plugins([name, name])
    assert [r.distribution for r in plugins.records if r.module == name] == [
        "named by hand"
    ]
    assert "last" in plugins.objects["rewards"]
    again = load_plugins([install.package("pack_b", GOOD)])
    assert [r.distribution for r in again.records if r.module == "pack_b"] == [
        "pack_b 1.5"
    ]


def test_two_packages_may_name_their_entry_points_alike(install: Installer) -> None:
    install.package("pack_c", GOOD, point="methods")
    install.package("pack_d", GOOD.replace("last", "other"), point="methods")
    plugins = load_plugins()
    assert {"last", "other"} <= plugins.objects["rewards"].keys()
    assert [r.module for r in plugins.records if r.name == "methods"] == [
        "pack_c",
        "pack_d",
    ]


def test_one_module_behind_two_entry_points_is_taken_once(install: Installer) -> None:
    install.package("pack_e", GOOD)
    points = install.folder / "pack_e-1.5.dist-info" / "entry_points.txt"
    points.write_text("[autoprune]\na = pack_e\nb = pack_e\n")
    plugins = load_plugins()
    assert [(r.name, r.error) for r in plugins.records if r.module == "pack_e"] == [
        ("a", None)
    ]
    assert "last" in plugins.objects["rewards"]


@pytest.mark.parametrize("name", ["pack_f", "its_point"], ids=["module", "point"])
def test_a_plugin_is_left_out_on_wish(
    name: str, install: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    install.package("pack_f", GOOD, point="its_point")
    monkeypatch.setenv("AUTOPRUNE_DISABLE_PLUGINS", f"wanda, {name}")
    plugins = load_plugins()
    assert "last" not in plugins.objects["rewards"]
    assert "wanda" not in plugins.methods
    assert not {"wanda", "its_point"} & {r.name for r in plugins.records}


def test_a_clash_names_both_modules(install: Installer) -> None:
    install.package("pack_g", GOOD.replace("last", "logs"))
    message = (
        r"two plugins register the reward 'logs': pack_g \(pack_g 1\.5\) and "
        r"autoprune_plugins\.rewards \(autoprune .*\)\. Uninstall one, or leave one "
        r"out: set AUTOPRUNE_DISABLE_PLUGINS to pack_g or to autoprune_plugins\.rewards"
    )
    with pytest.raises(PluginError, match=message):
        load_plugins()


def test_a_clash_ends_when_one_is_left_out(
    install: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    install.package("pack_h", GOOD.replace("last", "logs"))
    monkeypatch.setenv("AUTOPRUNE_DISABLE_PLUGINS", "autoprune_plugins.rewards")
    plugins = load_plugins()
    assert type(plugins.get("rewards", "logs")).__module__ == "pack_h"


BROKEN = {
    "import": (
        "import nowhere_to_be_found",
        "ModuleNotFoundError: No module named 'no",
    ),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "no-hook": ("x = 1", "it implements no hook. Mark functions with @hookimpl"),
    "misspelt": (
        "@hookimpl\ndef register_reward(): return []",
        "unknown hook 'register_reward'. Did you mean 'register_rewards'",
    ),
    "arguments": (
        "@hookimpl\ndef propose_policies(problem, sensitivities): return []",
        "PluginValidationError: .*(sensitivities|propose_policies)",
    ),
    "raises": (
        "@hookimpl\ndef register_rewards(): raise ValueError('no luck')",
        "ValueError: no luck",
    ),
    "nothing": (
        "@hookimpl\ndef register_rewards(): pass",
        "register_rewards must return a list of Reward objects, found None",
    ),
    "wrong-type": (
        "@hookimpl\ndef register_rewards(): return ['logs']",
        "register_rewards must return Reward objects, found 'logs'",
    ),
    "class": (
        "@hookimpl\ndef register_rewards(): return [Last]",
        "register_rewards must return Reward objects, found <class '.*Last'>",
    ),
    "upper-case": (
        "@hookimpl\ndef register_rewards(): return [Last('Last')]",
        "whose name 'Last' is not lower case letters, digits",
    ),
    "no-name": (
        "@hookimpl\ndef register_rewards(): return [Last(None)]",
        "whose name None is not lower case",
    ),
    "twice": (
        "@hookimpl\ndef register_rewards(): return [Last('a'), Last('a')]",
        "register_rewards returned two objects named 'a'",
    ),
}


@pytest.mark.parametrize(("body", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_named_and_left_out(
    body: str, message: str, install: Installer, caplog: pytest.LogCaptureFixture
) -> None:
    install.package("bad", "@hookimpl\ndef trial_finished(): raise OSError\n" + body)
    if message.startswith("it implements"):
        install.module("bad", body)
    install.package("fine", GOOD)
    with caplog.at_level(logging.WARNING):
        plugins = load_plugins()
    assert re.search(message, record(plugins, "bad") or "works")
    assert "plugin 'bad' is left out" in caplog.text
    assert record(plugins, "fine") is None
    assert plugins.objects["rewards"].keys() == {"logs", "last"}
    caplog.clear()  # none of its hooks is called any more
    plugins.notify("trial_finished", trial=None, run_dir=install.folder)
    assert "OSError" not in caplog.text


@pytest.mark.parametrize(("body", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_module_named_by_hand_is_an_error(
    body: str, message: str, install: Installer
) -> None:
    name = install.module("bad_by_hand", body)
    with pytest.raises(PluginError, match=f"cannot load plugin '{name}': .*{message}"):
        load_plugins([name])


@pytest.mark.parametrize("name", ["nowhere.at_all", "no module", "autoprune.nowhere"])
def test_a_missing_module_named_by_hand_is_an_error(name: str) -> None:
    with pytest.raises(PluginError, match=f"'{name}': ModuleNotFoundError: No module"):
        load_plugins([name])


def test_an_unknown_name_gets_near_misses_and_broken_plugins(
    install: Installer,
) -> None:
    install.package("bad", "raise ValueError('no luck')")
    plugins = load_plugins()
    message = (
        r"unknown method 'wnada'\. Did you mean 'wanda'\? Known: .*magnitude.* "
        r"Plugin 'bad' is broken: ValueError: no luck"
    )
    with pytest.raises(PluginError, match=message):
        plugins.get("methods", "wnada")
    with pytest.raises(PluginError, match="unknown text source 'fiel'. .*'file'"):
        plugins.get("text_sources", "fiel")


def test_an_observer_that_raises_stops_no_other(
    install: Installer, caplog: pytest.LogCaptureFixture
) -> None:
    body = """
    @hookimpl
    def trial_finished(trial, run_dir):
        (run_dir / f"{__name__}.txt").write_text(str(trial))
    """
    install.package("obs_a", body)
    install.package("obs_b", body + "    raise OSError('no space')")
    install.package("obs_c", body.replace("(trial, run_dir)", "(run_dir, trial=5)"))
    plugins = load_plugins()
    given = plugins.notify("trial_finished", trial=7, run_dir=install.folder)
    assert given == [None, None]
    texts = [(install.folder / f"obs_{n}.txt").read_text() for n in "abc"]
    assert texts == ["7", "7", "5"]
    assert "plugin 'obs_b' failed in trial_finished" in caplog.text
    assert "no space" in caplog.text


def test_proposals_of_all_plugins_are_given(install: Installer) -> None:
    body = "@hookimpl\ndef propose_policies(problem): return [('mine', problem)]"
    install.package("prop", body)
    plugins = load_plugins()
    caller = plugins.manager.subset_hook_caller(
        "propose_policies",
        [p for n, p in plugins.manager.list_name_plugin() if n != "prop"],
    )
    assert caller(problem="a problem", bench=None) == [[("mine", "a problem")]]


def test_an_implementation_may_take_the_bench_or_leave_it(install: Installer) -> None:
    old = "@hookimpl\ndef propose_policies(problem): return [('old', problem)]"
    new = "@hookimpl\ndef propose_policies(bench, problem): return [('new', bench)]"
    install.package("prop_old", old)
    install.package("prop_new", new)
    plugins = load_plugins()
    for record_ in plugins.records:
        if record_.name == "proposals":  # the built-in one wants a real problem
            plugins.manager.unregister(name=record_.module)
    found = plugins.notify("propose_policies", problem="a problem", bench="a bench")
    assert sorted(found) == [[("new", "a bench")], [("old", "a problem")]]
