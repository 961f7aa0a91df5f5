"""Channels, heads and blocks: scores by hand, whole runs on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.units import Channels, Heads
from tiny_runs import config_of, write_text

from autoprune.compression.method import Source
from autoprune.compression.variant import Variant
from autoprune.deliver import export
from autoprune.errors import ConfigError, MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer, Policy
from autoprune.run import search
from autoprune.searching.plan import Plan
from autoprune.sites import Cut

MLP = ["channels(keep=[0.5, 0.75])", "channels(keep=0.75) + rtn(bits=8, group=16)"]
HEADS = ["heads(keep=0.5, score=magnitude)", "rtn(bits=[4, 8], group=16)"]


def source_of(name: str, axis: str, weight: list[list[float]]) -> Source:
    matrix = torch.tensor(weight)
    rows, columns = matrix.shape
    units = rows if axis == "rows" else columns
    cut = Cut("channels", axis, 1, units)
    layer = Layer(name, (rows, columns), "float32", 0, name, name, cut=cut)
    return Source(layer, Variant.dense(matrix))


@pytest.fixture
def site() -> list[Source]:
    gate = source_of("gate", "rows", [[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    up = source_of("up", "rows", [[4.0, 0.0], [0.0, 5.0], [0.0, 2.0]])
    down = source_of("down", "columns", [[0.0, 12.0, 2.0], [0.0, 0.0, -2.0]])
    return [gate, up, down]


def test_scores_by_hand(site: list[Source]) -> None:
    method = Channels()
    read = {"down": InputStatistics(10, torch.tensor([4.0, 1.0, 25.0]))}
    wanda = method.scores(site, read, method.check({"keep": 0.5}))
    assert wanda.tolist() == [0.0, 12.0, 20.0]  # sums of |w| times norms 2, 1, 5
    settings = method.check({"keep": 0.5, "score": "magnitude"})
    found = method.scores(site, {}, settings)
    assert found.tolist() == pytest.approx([5.0, 13.0, 13.0**0.5])


def test_a_wrong_score_is_refused() -> None:
    with pytest.raises(
        MethodError, match=r"heads\(score=.*'taylor'.* magnitude, wanda\."
    ):
        Heads().check({"keep": 0.5, "score": "taylor"})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


def space(**rules: Any) -> list[dict[str, Any]]:
    return [{"sites": f"blocks.*.{name}", "actions": a} for name, a in rules.items()]


@pytest.mark.slow
def test_a_search_over_channels_and_heads(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        space=space(mlp=[*MLP, "dense"], attention=[*HEADS, "dense"]),
        objective={"metric": "kl", "budgets": {"size_bytes": "75%"}},
        search={"trials": 8, "finalists": 2},
    )
    found = search(config, tmp_path / "run")
    assert found.policy is not None
    assert {name.rpartition(".")[2] for name in found.policy} == {
        "embedding",
        "attention",
        "mlp",
    }
    table = found.trials
    assert (table["size_bytes"] <= 0.75 * found.finals["dense"]["size_bytes"]).all()
    for target in ("packed", "transformers"):
        folder = tmp_path / target
        export(tmp_path / "run", target=target, out=folder)
        assert (folder / "policy.json").exists()


def test_masks_of_a_site_agree_and_stay_with_the_step_after(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint,
        text,
        space=space(mlp=MLP, attention=["heads(keep=0.5)", "dense"]),
        objective={"metric": "kl"},
    )
    plan = Plan.make(config, load_plugins(), cache=tmp_path)
    plan.bank.make(plan.pairs)
    groups = {group.name: group for group in plan.bench.inventory.groups}
    for name, text_of_action in (("mlp", MLP[1]), ("attention", HEADS[0])):
        action = plan.bench.actions.canonical(Action.parse(text_of_action))
        kept = []
        for layer in groups[f"blocks.1.{name}"].layers:
            cut = layer.cut
            assert cut is not None
            weight = plan.bank.get(layer, action).weight
            lines = weight if cut.axis == "rows" else weight.t()
            kept.append((lines.reshape(cut.units, -1) != 0).any(1).tolist())
        assert all(one == kept[0] for one in kept)
        assert 0 < sum(kept[0]) < len(kept[0])


def test_dropping_a_block_is_passing_by(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    config = config_of(
        tiny_checkpoint, text, space=space(block=["drop", "dense"]), objective={}
    )
    plan = Plan.make(config, load_plugins(), cache=tmp_path)
    sites = [site.name for site in plan.problem.space.sites]
    actions = {
        name: Action.parse("drop" if name == "blocks.0.block" else "dense")
        for name in sites
    }
    policy = Policy(actions)
    measured = plan.evaluator().measure(policy)
    plan.bank.put(plan.bench.per_layer(policy))
    model = plan.bench.stitched.model
    ids = plan.bench.splits["fitness"].ids
    with torch.inference_mode():
        dropped = model(ids).logits
        plan.bench.stitched.restore()
        del model.model.layers[0]
        model.config.num_hidden_layers = 1
        for index, block in enumerate(model.model.layers):
            block.self_attn.layer_idx = index
        torch.testing.assert_close(model(ids).logits, dropped)
    blocks = sum(la.numel for la in plan.bench.layers if la.block is not None)
    half = sum(la.numel for la in plan.bench.layers if la.block == 0)
    assert measured.metrics["sparsity"] == pytest.approx(half / blocks)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"gate_up": ["channels(keep=0.5)"]}, r"channels acts on whole sites"),
        ({"attention": ["channels(keep=0.5)"]}, r"Name sites such as blocks\.\*\.mlp"),
        ({"mlp": ["channels(keep=0.5)"], "block": ["drop"]}, "both hold"),
        ({"mlp": ["drop + rtn(bits=4)"]}, "nothing is left to quantize"),
        ({"mlp": ["channels(keep=0.5) + wanda(sparsity=0.5)"]}, "already pruned"),
        ({"mlp": ["rtn(bits=4) + channels(keep=0.5)"]}, "comes first"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(
    rule: dict[str, list[str]], told: str, tiny_checkpoint: Path, text: str
) -> None:
    config = config_of(tiny_checkpoint, text, space=space(**rule), objective={})
    with pytest.raises(ConfigError, match=told):
        Plan.make(config, load_plugins())
