"""A convolution is made narrower where it stands, and so is the norm behind it."""

from typing import Any

import pytest
import torch
from autoprune_plugins.conv_layers import Convolution
from tiny_convnets import tiny_resnet
from torch import Tensor, nn

KIND = Convolution()
KEPT = torch.tensor([1, 3])


@pytest.fixture
def model() -> nn.Sequential:
    """Two convolutions with biases, a norm that has seen something in between."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(4)
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)
        made = nn.Sequential(
            nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)
        )
    return made.eval().requires_grad_(False)


def images() -> Tensor:
    return torch.randn(2, 2, 8, 7, generator=torch.Generator().manual_seed(0))


def test_filters_go_with_their_bias_and_norm_and_with_channels(model: Any) -> None:
    model[3].weight[:, [0, 2]] = 0  # so nobody reads what the norm makes of nothing
    expected = model(images())
    KIND.narrow(model, "0", rows=KEPT)
    KIND.narrow(model, "3", channels=KEPT)
    torch.testing.assert_close(model(images()), expected)
    assert [tuple(one.shape) for one in model[0].parameters()] == [(2, 2, 3, 3), (2,)]
    norm = model[1]
    assert {len(one) for one in (norm.weight, norm.bias, norm.running_var)} == {2}
    assert norm.num_batches_tracked.shape == ()
    assert (model[0].out_channels, norm.num_features, model[3].in_channels) == (2, 2, 2)
    assert model[3].weight.is_contiguous() and KIND.refuses(model[3]) is None


def test_rows_and_channels_of_one_layer_go_at_once(model: Any) -> None:
    expected = model[3].weight[[2, 0]][:, KEPT]
    KIND.narrow(model, "3", rows=torch.tensor([2, 0]), channels=KEPT)
    assert torch.equal(model[3].weight, expected)
    assert len(model[3].bias) == 2


def test_a_model_without_weights_gets_the_same_shapes(model: Any) -> None:
    empty = tiny_resnet().to("meta")
    place: Any = empty.resnet.embedder.embedder
    KIND.narrow(empty, "resnet.embedder.embedder.convolution", rows=KEPT)
    assert place.convolution.weight.shape == (2, 1, 7, 7)
    assert place.convolution.weight.is_meta and place.normalization.bias.is_meta
    assert place.normalization.running_mean.shape == (2,)


def test_a_norm_behind_something_else_stays() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    KIND.narrow(model, "0", rows=KEPT)
    assert model[2].weight.shape == (4,)


def test_a_shortcut_is_added_to_the_last_layer_of_its_block() -> None:
    for layer_type, last in (("basic", 1), ("bottleneck", 2)):
        model = tiny_resnet(layer_type)
        first = "resnet.encoder.stages.1.layers.0"
        told = KIND.added_to(model, f"{first}.layer.{last}.convolution")
        assert told == (f"{first}.shortcut.convolution",)
        assert KIND.added_to(model, f"{first}.layer.0.convolution") == ()
        assert KIND.added_to(model, told[0]) == ()
        second = f"resnet.encoder.stages.1.layers.1.layer.{last}.convolution"
        assert KIND.added_to(model, second) == ()  # what is added there is no layer
    assert KIND.added_to(nn.Sequential(nn.Conv2d(1, 1, 1)), "0") == ()
