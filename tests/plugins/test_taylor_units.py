"""Units by what the loss changes without them: by hand, and in a whole search."""

from pathlib import Path

import pytest
import torch
from autoprune_plugins.taylor_units import TaylorChannels, TaylorHeads, register_methods
from tiny_runs import config_of, write_text

from autoprune.compression.method import Source
from autoprune.compression.variant import Variant
from autoprune.errors import ConfigError, MethodError
from autoprune.models.gradients import LayerGradients
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer
from autoprune.searching.plan import Plan
from autoprune.sites import Cut

METHOD = TaylorChannels()


def source_of(
    name: str,
    axis: str,
    weight: list[list[float]],
    mean: list[list[float]],
    squares: list[list[float]],
) -> Source:
    matrix = torch.tensor(weight)
    rows, columns = matrix.shape
    cut = Cut("channels", axis, 1, rows if axis == "rows" else columns)
    layer = Layer(name, (rows, columns), "float32", 0, name, name, cut=cut)
    gradient = LayerGradients(2, torch.tensor(mean), torch.tensor(squares))
    return Source(layer, Variant.dense(matrix), gradient=gradient)


@pytest.fixture
def site() -> list[Source]:
    """Give two channels that one layer makes and another takes."""
    up = source_of(
        "up",
        "rows",
        [[1.0, 2.0], [3.0, -1.0]],
        [[2.0, -1.0], [1.0, 1.0]],  # w g: 2 -2 and 3 -1
        [[4.0, 4.0], [2.0, 0.0]],  # h w² / 2: 1 4 and 4.5 0
    )
    down = source_of(
        "down",
        "columns",
        [[2.0, 4.0]],
        [[-1.0, 0.5]],  # w g: -2 and 2
        [[4.0, 1.0]],  # h w² / 2: 4 and 4
    )
    return [up, down]


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        ("param_first", [2 + 2 + 2, 3 + 1 + 2]),
        ("param_second", [1 + 4 + 4, 4.5 + 0 + 4]),
        ("param_mix", [1 + 6 + 6, 1.5 + 1 + 2]),
        ("vector", [0 + 2, 2 + 2]),
    ],
)
def test_scores_by_hand(
    importance: str, expected: list[float], site: list[Source]
) -> None:
    settings = METHOD.check({"keep": 0.5, "importance": importance})
    found = METHOD.scores(site, {}, settings)
    assert found.tolist() == pytest.approx(expected)


def test_the_unit_that_matters_less_goes(site: list[Source]) -> None:
    kinds = ["param_mix", "vector", "param_second"]
    settings = [METHOD.check({"keep": 0.5, "importance": kind}) for kind in kinds]
    up, down = METHOD.compress_site(site, {}, settings)
    assert [one.weight.tolist() for one in up] == [
        [[1, 2], [0, 0]],
        [[0, 0], [3, -1]],
        [[1, 2], [0, 0]],
    ]
    assert [one.weight.tolist() for one in down] == [[[2, 0]], [[0, 4]], [[2, 0]]]


def test_a_wrong_importance_is_refused() -> None:
    told = r"taylor_heads\(importance=.* 'param_frist'.* mean 'param_first'.* vector\."
    with pytest.raises(MethodError, match=told):
        TaylorHeads().check({"keep": 0.5, "importance": "param_frist"})


def test_missing_gradients_are_named(site: list[Source]) -> None:
    plain = [Source(one.layer, one.variant) for one in site]
    with pytest.raises(MethodError, match="of up was not gathered"):
        METHOD.scores(plain, {}, METHOD.check({"keep": 0.5}))


def test_they_are_registered() -> None:
    names = [method.name for method in register_methods()]
    assert names == ["taylor_channels", "taylor_heads"]


def test_a_plan_makes_channels_and_heads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    channels = "taylor_channels(keep=0.5, importance=vector) + rtn(bits=8, group=16)"
    rules = {"mlp": [channels, "dense"], "attention": ["taylor_heads(keep=0.5)"]}
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        space=[{"sites": f"blocks.*.{k}", "actions": a} for k, a in rules.items()],
        objective={"metric": "kl"},
    )
    plan = Plan.make(config, load_plugins(), cache=tmp_path)
    plan.bank.make(plan.pairs)
    groups = {group.name: group for group in plan.bench.inventory.groups}
    for name, (text, *_) in rules.items():
        action = plan.bench.actions.canonical(Action.parse(text))
        kept = []
        for layer in groups[f"blocks.1.{name}"].layers:
            cut = layer.cut
            assert cut is not None
            weight = plan.bank.get(layer, action).weight
            lines = weight if cut.axis == "rows" else weight.t()
            kept.append((lines.reshape(cut.units, -1) != 0).any(1).tolist())
        assert all(one == kept[0] for one in kept)
        assert sum(kept[0]) == len(kept[0]) // 2


def test_a_part_of_a_site_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        space=[{"sites": "blocks.*.gate_up", "actions": ["taylor_channels(keep=0.5)"]}],
        objective={},
    )
    with pytest.raises(ConfigError, match="taylor_channels acts on whole sites"):
        Plan.make(config, load_plugins())
