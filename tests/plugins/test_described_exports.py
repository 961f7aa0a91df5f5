"""Targets with code, a graph or words only pass through the whole way of an export."""

from pathlib import Path

import pytest
from tiny_runs import config_of, write_text

import autoprune
from autoprune.deliver import export_policy
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Policy
from autoprune.searching.plan import Plan

HALF = "channels(keep=0.5, score=magnitude)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [pytest.param("per-layer", marks=pytest.mark.ci), "onnx", "recipes"]
)
def test_a_fresh_process_agrees(
    target: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        space=[
            {"sites": "blocks.0.mlp", "actions": [HALF]},
            {"sites": "blocks.1.attention", "actions": ["drop"]},
        ],
        objective={},
        export="transformers",
    )
    plan = Plan.make(config, load_plugins(), cache=tmp_path)
    names = [site.name for site in plan.problem.space.sites]
    removed = {"blocks.0.mlp": HALF, "blocks.1.attention": "drop"}
    texts = dict.fromkeys(names, "dense") | removed
    policy = Policy({name: Action.parse(text) for name, text in texts.items()})
    plan.bank.make(plan.pairs)
    report = export_policy(
        plan.bench,
        plan.bank,
        policy,
        place=tmp_path / "export",
        target=target,
        record={},
        plugins=[],
        force=False,
    )
    if target == "recipes":
        assert (report.size_bytes, report.verified) == (0, None)
        assert "units of the model: cut it first" in report.notes[0]
        return
    assert report.verified is not None
    assert report.size_bytes > 0
    if target == "per-layer":
        assert len(autoprune.load(tmp_path / "export").model.layers) == 2
        assert report.notes[0] == "left out the attention of blocks 1"
