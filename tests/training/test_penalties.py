"""Penalties that empty units, and the cut that follows."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny
from tiny_recovery import layers_of
from torch import nn

from autoprune.errors import ConfigError, ModelError
from autoprune.models.weights import read_weight
from autoprune.plugins import load_plugins
from autoprune.policy import Layer
from autoprune.sites import Cut
from autoprune.training.goals import by_unit, structures
from autoprune.training.masks import FrozenMasks
from autoprune.training.penalties import GroupLasso, keep_units, masks_of_units

MLP = {"units": {"0.weight": 0, "2.weight": 1}}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 2)
    )


def test_a_step_is_where_half_the_distance_and_the_penalty_are_least() -> None:
    model = mlp()
    lasso = GroupLasso(model, MLP, strength=0.3)
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    rate = 0.7
    lasso.shrink(rate)
    # By gradient descent on the definition of a proximal step, unit by unit.
    for unit in range(4):
        start = torch.cat([before[0][unit], before[1][:, unit]])
        found = torch.cat([model[0].weight[unit], model[2].weight[:, unit]]).detach()

        def value(at: torch.Tensor, start: torch.Tensor = start) -> torch.Tensor:
            penalty = 0.3 * 5**0.5 * at.norm()
            return (at - start).square().sum() / 2 + rate * penalty

        least = value(found)
        generator = torch.Generator().manual_seed(unit)
        for size in (1e-3, 1e-2, 0.1):
            for _ in range(50):
                other = torch.randn(5, generator=generator, dtype=torch.float64)
                assert value(found + size * other) >= least
        assert value(torch.zeros(5, dtype=torch.float64)) >= least


def test_the_penalty_by_hand() -> None:
    model = mlp()
    lasso = GroupLasso(model, MLP, strength=0.5)
    units = torch.cat([model[0].weight, model[2].weight.T], 1).detach()
    torch.testing.assert_close(lasso.sizes()["units"], units.norm(dim=1))
    mean = lasso.sizes(mean=True)["units"]
    torch.testing.assert_close(mean, units.square().mean(1).sqrt())
    assert lasso.value() == pytest.approx(0.5 * 5**0.5 * float(units.norm(dim=1).sum()))


def test_units_of_one_weight_are_l1_as_in_network_slimming() -> None:
    model = convolutions()
    scale = torch.tensor([0.5, -0.3, 0.05, -0.02, 0.0, 2.0])
    model[1].weight.data = scale.clone()
    lasso = GroupLasso(model, {"norm": {"1.weight": 0}}, strength=2.0)
    assert lasso.value() == pytest.approx(2.0 * float(scale.abs().sum()))
    lasso.shrink(0.05)
    soft = scale.sign() * (scale.abs() - 0.1).clamp_min(0)
    torch.testing.assert_close(model[1].weight.detach(), soft)
    assert not model[1].weight.detach()[model[1].weight == 0].signbit().any()


@pytest.mark.parametrize("masked", [False, True])
def test_training_empties_whole_units(masked: bool) -> None:
    model = convolutions()
    lasso = GroupLasso(model, {"filters": {"0.weight": 0}}, strength=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = torch.ones(6, 1, 2, 2, dtype=torch.bool)
    kept[:, :, 0, 0] = not masked
    masks = FrozenMasks.of_parameters(model, {"0.weight": kept})
    generator = torch.Generator().manual_seed(0)
    with masks.held(optimizer), lasso.held(optimizer):
        for _ in range(20):
            optimizer.zero_grad()
            model(
                torch.randn(8, 1, 3, 3, generator=generator)
            ).square().mean().backward()
            optimizer.step()
            masks.check()
    empty = lasso.sizes()["filters"] == 0
    assert empty.any()
    assert not model[0].weight[empty].any()
    before = model[0].weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(model[0].weight, before)  # the hook is gone, and so is the rate


def test_the_rate_is_that_of_the_group_at_that_step() -> None:
    model = mlp()
    groups = [
        {"params": [model[0].bias], "lr": 9.0},
        {"params": [model[0].weight, model[2].weight], "lr": 0.01},
    ]
    optimizer = torch.optim.SGD(groups)
    lasso = GroupLasso(model, MLP, strength=1.0)
    before = lasso.sizes()["units"]
    with lasso.held(optimizer):
        optimizer.step()  # without gradients: only the penalty acts
        torch.testing.assert_close(lasso.sizes()["units"], before - 0.01 * 5**0.5)
        optimizer.param_groups[1]["lr"] = 0.02
        optimizer.step()
    torch.testing.assert_close(lasso.sizes()["units"], before - 0.03 * 5**0.5)


def test_the_smallest_units_of_all_go_but_never_all_of_a_group() -> None:
    sizes = {
        "one": torch.tensor([0.3, 0.1, 0.2]),
        "two": torch.tensor([5.0, 4.0, 0.25, 6.0, 0.0]),
    }
    kept = keep_units(sizes, 5 / 8)
    assert kept["one"].tolist() == [True, False, False]
    assert kept["two"].tolist() == [True, False, False, True, False]
    two = keep_units(sizes, 0.25, least=2)
    assert [int((~mask).sum()) for mask in two.values()] == [1, 1]
    ties = keep_units({"a": torch.ones(4)}, 0.5)
    assert ties["a"].tolist() == [False, False, True, True]
    with pytest.raises(ConfigError, match="7 of 8 units cannot be cut.* only 6 may go"):
        keep_units(sizes, 7 / 8)
    with pytest.raises(ConfigError, match="found -0.5"):
        keep_units(sizes, -0.5)


def test_a_cut_channel_gives_nothing_and_the_others_what_they_gave() -> None:
    model = convolutions().eval()
    whole = {
        "c": {"0.weight": 0, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 1}
    }
    kept = {"c": torch.tensor([True, False, True, True, False, True])}
    masks = masks_of_units(model, whole, kept)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "0.weight": (6, 1, 2, 2),
        "0.bias": (6,),
        "1.weight": (6,),
        "1.bias": (6,),
        "3.weight": (2, 6, 2, 2),
    }
    with torch.no_grad():
        model[1].bias.fill_(0.3)
    inputs = torch.randn(3, 1, 4, 4)
    hidden = model[:3](inputs)[:, kept["c"]]
    wanted = nn.functional.conv2d(hidden, model[3].weight[:, kept["c"]], model[3].bias)
    FrozenMasks.of_parameters(model, masks)
    assert not model[:3](inputs)[:, ~kept["c"]].any()
    torch.testing.assert_close(model(inputs), wanted)


def test_a_weight_in_two_units_goes_with_either() -> None:
    model = mlp()
    units = {"rows": {"2.weight": 0}, "columns": {"2.weight": 1}}
    kept = {
        "rows": torch.tensor([True, False]),
        "columns": torch.tensor([True, True, False, True]),
    }
    found = masks_of_units(model, units, kept)["2.weight"]
    assert found.tolist() == [[True, True, False, True], [False] * 4]


def test_what_does_not_fit_is_told() -> None:
    model = mlp()
    with pytest.raises(ModelError, match=r"units count different .*'2.weight': 2"):
        GroupLasso(model, {"units": {"0.weight": 0, "2.weight": 0}}, 0.1)
    with pytest.raises(ConfigError, match="not -1"):
        GroupLasso(model, MLP, -1.0)
    with pytest.raises(ModelError, match="no parameter '7.weight'"):
        GroupLasso(model, {"units": {"7.weight": 0}}, 0.1)
    other = torch.optim.SGD([model[0].bias], lr=0.1)
    with (
        pytest.raises(ModelError, match="does not train 0.weight"),
        GroupLasso(model, MLP, 0.1).held(other),
    ):
        pass


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_know_where_their_units_lie(kind: str) -> None:
    """Channels and heads, also of transposed weights, as matrices ``[out, in]``."""
    model = tiny(kind)
    layers = [layer for layer in layers_of(model) if layer.cut]
    for (_, name), parts in structures(layers).items():
        lasso = GroupLasso(model, {name: parts}, strength=1.0)
        before = {layer: read_weight(model, layer).clone() for layer in parts}
        units = torch.cat([by_unit(la.cut, before[la]) for la in parts if la.cut], 1)
        norms = units.norm(dim=1)
        torch.testing.assert_close(lasso.sizes()[name], norms)
        pull = 0.5 * float(norms.median()) / units.shape[1] ** 0.5
        lasso.shrink(pull)
        left = 1 - pull * units.shape[1] ** 0.5 / norms
        for layer in parts:
            assert layer.cut is not None
            found = by_unit(layer.cut, read_weight(model, layer))
            wanted = by_unit(layer.cut, before[layer]) * left.clamp_min(0)[:, None]
            torch.testing.assert_close(found, wanted)


def test_columns_of_a_convolution_are_input_channels() -> None:
    load_plugins()  # they say how a convolution is a matrix
    model = convolutions()
    cut = Cut("channels", "columns", 4, 6)
    layer = Layer("3", (2, 24), "float32", 0, "conv", None, cut=cut, kernel=4)
    by_layer = GroupLasso(model, {"a": [layer]}, 1.0).sizes()["a"]
    by_axis = GroupLasso(model, {"a": {"3.weight": 1}}, 1.0).sizes()["a"]
    torch.testing.assert_close(by_layer, by_axis)
    with pytest.raises(ModelError, match="'3' has no units"):
        GroupLasso(model, {"a": [replace(layer, cut=None)]}, 1.0)
