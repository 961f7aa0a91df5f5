"""No search begins whose export would fail."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from autoprune_plugins.packed import Packed
from tiny_runs import config_of, write_text

from autoprune.errors import ConfigError, ExportError
from autoprune.exporting.exporter import Digests, Exporter, ExportJob
from autoprune.hookspecs import hookimpl
from autoprune.plugins import load_plugins
from autoprune.preflight import preflight, smallest_policy
from autoprune.run import search
from autoprune.searching.plan import Plan


class Forgetful(Packed):
    """Reads one layer back as something else."""

    name = "forgetful"

    def load(self, folder: Path) -> Any:
        model = super().load(folder)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 1
        return model


class Bragging(Packed):
    """Predicts less than it writes."""

    name = "bragging"

    def size_bytes(self, storages: Any, untouched: Any) -> int:
        return super().size_bytes(storages, untouched) - 8


class Fused(Packed):
    """Takes the layers of a site as one."""

    name = "fused"
    fuses = True


class Described(Packed):
    """Has no weights."""

    name = "described"
    weights = False


class Full(Packed):
    """Cannot write."""

    name = "full"

    def write(self, folder: Path, job: ExportJob) -> Digests:
        raise OSError(28, "No space left on device")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    made: Any = ModuleType("unlucky_targets")

    @hookimpl
    def register_exporters() -> list[Exporter]:
        return [Forgetful(), Bragging(), Fused(), Described(), Full()]

    made.register_exporters = register_exporters
    monkeypatch.setitem(sys.modules, made.__name__, made)
    yield made.__name__


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


def plan_of(model: Path, text: str, **changes: Any) -> Plan:
    config = config_of(model, text, **changes)
    plan = Plan.make(config, load_plugins(config.plugins))
    plan.bank.make(plan.pairs)
    return plan


def test_the_smallest_policy_is_exported_and_nothing_stays(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    plan = plan_of(tiny_checkpoint, text)
    policy = smallest_policy(plan)
    smallest = {"gptq(bits=3, group=16)", "rtn(bits=4, group=16)"}
    assert set(map(str, policy.actions.values())) == smallest
    sizes = [
        plan.bench.exporter.size_bytes(plan.bench.storages(one), plan.bench.untouched)
        for one in (policy, plan.bench.dense_policy())
    ]
    assert sizes[0] < sizes[1]
    assert preflight(plan, tmp_path) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("forgetful", r"1 of 15 layers have other weights, first '.*1.mlp.up_proj'"),
        ("bragging", r"have \d+ bytes, \d+ were predicted"),
        ("full", "No space left on device"),
    ],
)
def test_a_target_that_fails_is_found_before_the_search(
    target: str,
    message: str,
    module: str,
    tiny_checkpoint: Path,
    text: str,
    tmp_path: Path,
) -> None:
    config = config_of(tiny_checkpoint, text, export=target, plugins=[module])
    with pytest.raises(ExportError, match=rf"as {target}, so no search .*{message}"):
        search(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*preflight*"))


def test_targets_that_no_search_can_have_are_refused(
    module: str, tiny_checkpoint: Path, text: str
) -> None:
    known = {"plugins": [module]}
    with pytest.raises(ConfigError, match="'described' stores no weights"):
        plan_of(tiny_checkpoint, text, export="described", **known)
    with pytest.raises(ConfigError, match="'fused' take them as one. Set fuse: true"):
        plan_of(tiny_checkpoint, text, export="fused", fuse=False, **known)
    assert plan_of(tiny_checkpoint, text, export="fused", **known).problem
