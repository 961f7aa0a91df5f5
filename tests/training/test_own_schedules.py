"""A module that is named by hand brings a schedule and a recovery of its own."""

import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from tiny_trainings import open_bench, policy_of, write_lines

from autoprune.errors import PluginError
from autoprune.evaluation.scheduled import own_bank
from autoprune.plugins import load_plugins

MODULE = '''
    from autoprune import Parameter, Phase, RecoveryMethod, Schedule, hookimpl


    class Halves(Schedule):
        name = "halves"
        reference = "none"

        def phases(self, outline, settings):
            return [Phase(outline.at(0.5), 0.5), Phase(outline.at(1.0), 0.5)]


    class Scale(RecoveryMethod):
        """Multiplies what is left: it stands for a training, and is easy to check."""

        name = "scale"
        reference = "none"
        parameters = (Parameter("by", float, 1.5, "Factor.", 0, 10),)

        def recover(self, pupil, settings, *, share, folder, told):
            for name in pupil.parameters:
                pupil.model.get_parameter(name).data.mul_(settings["by"])
            told(1.0)


    @hookimpl
    def register_schedules():
        return [Halves()]


    @hookimpl
    def register_recoveries():
        return [Scale()]
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_schedules.py").write_text(dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_schedules", raising=False)
    return "own_schedules"


def test_own_schedule_and_recovery_are_carried_out(
    module: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    plugins = load_plugins([module])
    bench = open_bench(plugins, tiny_checkpoint, write_lines(tmp_path), tmp_path / "c")
    policy = policy_of(bench, "magnitude(sparsity=0.5)", "halves + scale(by=2.0)")
    bank = own_bank(bench, policy)
    for layer, action in bench.per_layer(policy).items():
        if action.steps:  # twice, in both phases
            dense = bench.stitched.dense_weight(layer).clone()
            variant = bank.get(layer, action)
            assert variant.mask is not None
            assert torch.equal(variant.weight, 4.0 * dense * variant.mask)


def test_what_is_no_schedule_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dedent(MODULE).replace("[Halves()]", "[Halves]")
    (tmp_path / "wrong_schedules.py").write_text(wrong)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="must return Schedule objects, found <class"):
        load_plugins(["wrong_schedules"])
