"""Masks before training, against formulas that are computed in another way."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from torch.func import functional_call

from autoprune.errors import ConfigError, ModelError
from autoprune.training.at_start import (
    Kept,
    grasp_scores,
    keep_largest,
    keep_random,
    magnitude_scores,
    snip_scores,
)
from autoprune.training.choosing import erk_counts
from autoprune.training.masks import FrozenMasks
from autoprune.training.synflow import keep_synflow

NAMES = ["0.weight", "4.weight", "6.weight"]


def network(seed: int = 0) -> nn.Sequential:
    """A convolution with its batch norm, whose buffers a pass moves, and two layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(7, 1, 3, 3, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    return lambda: nn.functional.cross_entropy(model(inputs), labels)


def kept_of(model: nn.Module, names: list[str], sparsity: float) -> dict[str, Kept]:
    loss, generator = loss_of(model), torch.Generator().manual_seed(0)
    return {
        "random": keep_random(model, names, sparsity, generator=generator),
        "magnitude": keep_largest(magnitude_scores(model, names), sparsity),
        "snip": keep_largest(snip_scores(model, names, loss), sparsity),
        "grasp": keep_largest(grasp_scores(model, names, loss), sparsity),
        "synflow": keep_synflow(
            model, names, sparsity, flow=model, shape=(1, 1, 3, 3), rounds=5
        ),
    }


@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.9])
def test_counts_are_exact_and_the_model_is_left_as_it_was(sparsity: float) -> None:
    model = network()
    model[4].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, kept in kept_of(model, NAMES, sparsity).items():
        assert list(kept) == NAMES
        gone = sum(int((~mask).sum()) for mask in kept.values())
        assert gone == round(sparsity * (12 + 60 + 15)), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert flags.count(False) == 1 and not model[4].weight.requires_grad
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    kept = kept_of(model, NAMES, sparsity)["snip"]
    assert sum(FrozenMasks.of_parameters(model, kept).pruned.values()) == gone


def test_snip_is_the_slope_of_the_loss_along_each_mask() -> None:
    model = network().double().eval()
    inputs = torch.randn(4, 1, 3, 3, dtype=torch.float64)

    def loss_with(masks: tuple[Tensor, ...]) -> Tensor:
        masked = {
            name: mask * model.get_parameter(name).detach()
            for name, mask in zip(NAMES, masks, strict=True)
        }
        return functional_call(model, masked, (inputs,)).square().mean()

    ones = tuple(torch.ones_like(model.get_parameter(name)) for name in NAMES)
    slopes = torch.autograd.functional.jacobian(lambda *m: loss_with(m), ones)
    scores = snip_scores(model, NAMES, lambda: model(inputs).square().mean())
    for name, slope in zip(NAMES, slopes, strict=True):
        torch.testing.assert_close(scores[name], slope.abs())


def test_grasp_is_the_weight_times_the_hessians_product_with_the_gradient() -> None:
    model = network().double().eval()
    inputs = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    weights = tuple(model.get_parameter(name).detach().clone() for name in NAMES)

    def loss_at(*own: Tensor) -> Tensor:
        values = dict(zip(NAMES, own, strict=True))
        return functional_call(model, values, (inputs,)).square().mean()

    gradient = torch.autograd.functional.jacobian(loss_at, weights)
    _, product = torch.autograd.functional.hvp(loss_at, weights, gradient)
    scores = grasp_scores(model, NAMES, lambda: model(inputs).square().mean())
    for name, weight, hg in zip(NAMES, weights, product, strict=True):
        torch.testing.assert_close(scores[name], weight * hg)
    assert any(bool((score < 0).any()) for score in scores.values())


def test_grasp_passes_attention_twice() -> None:
    model, ids = tiny("llama"), torch.arange(3, 19).view(2, 8)
    names = [n for n, p in model.named_parameters() if "q_proj" in n]
    scores = grasp_scores(model, names, lambda: model(ids, labels=ids).loss)
    assert all(
        bool(score.isfinite().all() and score.any()) for score in scores.values()
    )


def test_random_masks_follow_their_layout() -> None:
    model = network()
    shapes = {name: model.get_parameter(name).shape for name in NAMES}

    def gone(layout: str) -> dict[str, int]:
        generator = torch.Generator().manual_seed(3)
        kept = keep_random(model, NAMES, 0.7, layout=layout, generator=generator)
        return {name: int((~mask).sum()) for name, mask in kept.items()}

    assert gone("uniform") == {"0.weight": 8, "4.weight": 42, "6.weight": 10}
    assert gone("erk") == erk_counts(shapes, 0.7)
    assert gone("erk")["4.weight"] > 42
    with pytest.raises(ConfigError, match="unknown layout 'ekr'. Did you mean 'erk'"):
        gone("ekr")


def test_what_cannot_be_scored_is_told() -> None:
    model = network()
    with pytest.raises(ModelError, match="gradient of 6.weight is zero"):
        snip_scores(model, NAMES, lambda: model[:5](torch.ones(2, 1, 3, 3)).sum())
    with pytest.raises(ModelError, match="none of 1 parameters, first 6.weight"):
        snip_scores(model, ["6.weight"], lambda: model[0].weight.square().sum())
    with pytest.raises(ConfigError, match="found 1.5"):
        keep_largest(magnitude_scores(model, NAMES), 1.5)
