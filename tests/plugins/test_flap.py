"""FLAP: scores by hand, indifference to constants, heads, a bank on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.flap import Fluctuation, register_methods
from tiny_runs import config_of, write_text
from torch import Tensor

from autoprune.compression.method import Source
from autoprune.compression.storage import Storage
from autoprune.compression.structured import in_units
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import Gathering, InputStatistics
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer
from autoprune.searching.plan import Plan
from autoprune.sites import Cut

METHOD = Fluctuation()
# Columns 0 to 3 hold variances 1, 0, 4, 1.
INPUTS = torch.tensor([[1.0, 7.0, 10.0, 0.0], [-1.0, 7.0, 6.0, 2.0]])
WEIGHT = torch.tensor([[1.0, 50.0, 1.0, 3.0], [2.0, -9.0, 0.0, 0.0]])


def source_of(name: str, axis: str, weight: Tensor, unit: int) -> Source:
    rows, columns = weight.shape
    units = (rows if axis == "rows" else columns) // unit
    kind = "channels" if unit == 1 else "heads"
    cut = Cut(kind, axis, unit, units)
    dtype = str(weight.dtype).removeprefix("torch.")
    layer = Layer(name, (rows, columns), dtype, 0, name, name, cut=cut)
    return Source(layer, Variant.dense(weight))


def site_of(unit: int) -> list[Source]:
    maker = torch.ones(4, 3)
    return [
        source_of("v", "rows", maker, unit),
        source_of("o", "columns", WEIGHT, unit),
    ]


def read_of(inputs: Tensor) -> dict[str, InputStatistics]:
    gathering = Gathering(METHOD.needs, inputs.shape[1])
    gathering.add(inputs)
    return {"o": gathering.result()}


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["flap"]


@pytest.mark.parametrize(
    ("unit", "scores"), [(1, [5.0, 0.0, 4.0, 9.0]), (2, [2.5, 6.5])]
)
def test_scores_by_hand(unit: int, scores: list[float]) -> None:
    settings = METHOD.check({"keep": 0.5})
    found = METHOD.scores(site_of(unit), read_of(INPUTS), settings)
    assert found.tolist() == pytest.approx(scores, abs=1e-5)


def test_a_constant_does_not_matter() -> None:
    inputs = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    settings = METHOD.check({"keep": 0.5})
    shifted = inputs + torch.tensor([3.0, -2.0, 0.0, 5.0])
    before, after = (
        METHOD.scores(site_of(1), read_of(x), settings) for x in (inputs, shifted)
    )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    mean = inputs.double().mean(0)
    variance = (inputs.double() - mean).square().mean(0)
    torch.testing.assert_close(
        before, variance * WEIGHT.double().square().sum(0), rtol=1e-4, atol=1e-4
    )


def test_scores_rank_units_by_how_the_output_fluctuates() -> None:
    inputs = torch.randn(300, 4, generator=torch.Generator().manual_seed(1)) + 4
    inputs = inputs.double()
    fluctuation = []
    for column in range(4):
        output = inputs[:, column : column + 1] * WEIGHT[:, column].double()
        fluctuation.append((output - output.mean(0)).square().sum(1).mean())
    found = METHOD.scores(site_of(1), read_of(inputs.float()), {"keep": 0.5})
    torch.testing.assert_close(found, torch.stack(fluctuation), rtol=1e-4, atol=1e-4)


def test_masks_agree_and_storage_is_exact() -> None:
    site = site_of(1)
    settings = [METHOD.check({"keep": keep}) for keep in (0.25, 0.5, 0.75)]
    settings[1] = METHOD.check({"keep": 0.5, "bias": False})
    made = METHOD.compress_site(site, read_of(INPUTS), settings)
    wanted = [[0, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 1]]
    for source, variants in zip(site, made, strict=True):
        for one, variant, kept in zip(settings, variants, wanted, strict=True):
            found = (in_units(source, variant.weight) != 0).any(1)
            assert found.int().tolist() == kept
            stored = METHOD.storage(source.layer, Storage.dense(source.layer), one)
            assert variant.storage == stored
            assert stored.bias == (source.layer.name == "o" and one["bias"])
            assert sum(part.nbytes for part in variant.pack().values()) == stored.nbytes


def test_the_bias_by_hand() -> None:
    # Means are 0, 7, 8, 1; scores 5, 0, 4, 9: columns 1 and 2 go, then column 0.
    settings = [METHOD.check({"keep": keep}) for keep in (0.5, 0.25)]
    half, quarter = METHOD.compress_site(site_of(1), read_of(INPUTS), settings)[-1]
    assert half.bias is not None and quarter.bias is not None
    assert half.bias.tolist() == [7 * 50 + 8 * 1, 7 * -9]
    assert quarter.bias.tolist() == half.bias.tolist()  # column 0 has mean zero
    heads = METHOD.compress_site(site_of(2), read_of(INPUTS), settings[:1])[-1][0]
    assert heads.bias is not None and heads.bias.tolist() == [7 * 50, 7 * -9]
    bare = METHOD.check({"keep": 0.5, "bias": False})
    made = METHOD.compress_site(site_of(1), read_of(INPUTS), [bare, settings[0]])
    assert [variant.bias is None for variant in made[-1]] == [True, False]
    assert torch.equal(made[-1][0].weight, made[-1][1].weight)
    assert all(variant.bias is None for variant in made[0])


def test_constant_channels_go_without_a_trace() -> None:
    """Masked weight and bias give what the dense layer gives, exactly."""
    inputs = torch.randint(-8, 9, (64, 4), generator=torch.Generator().manual_seed(2))
    inputs = inputs.float()
    inputs[:, 1], inputs[:, 2] = 5.0, -3.0
    settings = METHOD.check({"keep": 0.5})
    taker = METHOD.compress_site(site_of(1), read_of(inputs), [settings])[-1][0]
    assert taker.bias is not None
    assert (taker.weight != 0).any(0).tolist() == [True, False, False, True]
    given = torch.nn.functional.linear(inputs, taker.weight, taker.bias)
    assert torch.equal(given, inputs @ WEIGHT.T)


def test_the_bias_leaves_the_least_error_of_any() -> None:
    """What is left has mean zero, and its power is the score of what went."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(500, 4, generator=generator) + torch.tensor([1.0, 4, -2, 0])
    settings = METHOD.check({"keep": 0.75})
    scores = METHOD.scores(site_of(1), read_of(inputs), settings)
    taker = METHOD.compress_site(site_of(1), read_of(inputs), [settings])[-1][0]
    assert taker.bias is not None
    left = inputs @ WEIGHT.T - (inputs @ taker.weight.T + taker.bias)
    torch.testing.assert_close(left.mean(0), torch.zeros(2), rtol=0, atol=1e-3)
    power = float(left.square().sum(1).mean())
    assert power == pytest.approx(float(scores.min()), rel=1e-3)


def test_what_is_no_number_is_named() -> None:
    site, settings = site_of(1), METHOD.check({"keep": 0.5})
    read = read_of(torch.full((3, 4), torch.inf))
    with pytest.raises(MethodError, match="sum of squares of the inputs of o holds"):
        METHOD.scores(site, read, settings)
    site[0] = source_of("v", "rows", torch.full((4, 3), torch.nan), 1)
    with pytest.raises(MethodError, match="weight of v holds NaN"):
        METHOD.scores(site, read_of(INPUTS), settings)
    with pytest.raises(MethodError, match="sum of the inputs of o was not gathered"):
        METHOD.scores(site_of(1), {"o": InputStatistics(2, torch.ones(4))}, settings)


def test_a_bank_makes_it_with_the_step_after(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    texts = {
        "mlp": "flap(keep=0.5) + rtn(bits=8, group=16)",
        "attention": "flap(keep=0.5)",
    }
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        space=[
            {"sites": f"blocks.*.{name}", "actions": [text, "dense"]}
            for name, text in texts.items()
        ],
        objective={"metric": "kl"},
    )
    plugins = load_plugins(["autoprune_plugins.flap"])
    plan = Plan.make(config, plugins, cache=tmp_path)
    plan.bank.make(plan.pairs)
    groups = {group.name: group for group in plan.bench.inventory.groups}
    for name, text in texts.items():
        action = plan.bench.actions.canonical(Action.parse(text))
        layers = groups[f"blocks.1.{name}"].layers
        variants = [plan.bank.get(layer, action) for layer in layers]
        kept = [
            in_units(Source(layer, variant), variant.weight).any(1).tolist()
            for layer, variant in zip(layers, variants, strict=True)
        ]
        assert all(one == kept[0] for one in kept)
        assert sum(kept[0]) * 2 == len(kept[0])
        _check_on_model(plan, layers, action)


def _check_on_model(plan: Plan, layers: tuple[Layer, ...], action: Action) -> None:
    """A bank puts the bias on with the weight, and both off again."""
    model, taker = plan.bench.stitched.model, layers[-1]
    module: Any = model.get_submodule(taker.name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan.bank.put(dict.fromkeys(layers, action))
    bias = plan.bank.get(taker, action).bias
    assert bias is not None and bias.any()
    assert torch.equal(module.bias, bias.to(module.bias.dtype))
    plan.bank.put({})
    assert module.bias is None
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
