"""Masks of parameters by name, of any shape, held like those of layers."""

import pytest
import torch
from tiny_models import tiny
from torch import nn

from autoprune.errors import ModelError
from autoprune.training.masks import FrozenMasks


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )


def test_kernels_stay_pruned_at_every_step() -> None:
    model = convolutions()
    mask = torch.rand(3, 2, 3, 3) < 0.5
    masks = FrozenMasks.of_parameters(model, {"0.weight": mask})
    assert masks.pruned == {"0.weight": int((~mask).sum())}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    before = model[0].weight.detach().clone()
    with masks.held(optimizer):
        for seed in range(4):
            inputs = torch.randn(
                5, 2, 4, 4, generator=torch.Generator().manual_seed(seed)
            )
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            masks.check()
            zero = model[0].weight == 0
            assert torch.equal(zero, ~mask)
    assert (model[0].weight != before)[mask].all()


def test_both_names_of_a_tied_parameter_are_its_own() -> None:
    model = tiny("qwen2")
    one, other = torch.ones(2, 64, 32, dtype=torch.bool)
    one[3], other[4] = False, False
    masks = FrozenMasks.of_parameters(
        model, {"lm_head.weight": one, "model.embed_tokens.weight": other}
    )
    assert masks.pruned == {"model.embed_tokens.weight": 64}
    assert not model.lm_head.weight[3:5].any()


def test_other_weights_may_be_pruned_while_it_is_held() -> None:
    model = convolutions()
    masks = FrozenMasks.of_none(model, ["0.weight", "4.weight"])
    assert masks.pruned == {"0.weight": 0, "4.weight": 0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 2, 4, 4)).square().mean().backward()
        optimizer.step()
        masks.check()

    with masks.held(optimizer):
        step()
        pruned = {
            "0.weight": torch.rand(3, 2, 3, 3) < 0.5,
            "4.weight": torch.rand(2, 12) < 0.5,
        }
        masks.replace(pruned)
        masks.check()
        masks.forget(optimizer)
        for name, mask in pruned.items():
            momentum = optimizer.state[model.get_parameter(name)]["momentum_buffer"]
            assert not momentum[mask].any()
        step()
        for name, mask in pruned.items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None and not gradient[mask].any()
    assert masks.pruned == {name: int(mask.sum()) for name, mask in pruned.items()}


def test_unknown_names_and_other_shapes_are_told() -> None:
    model = convolutions()
    masks = FrozenMasks.of_none(model, ["0.weight"])
    with pytest.raises(ModelError, match=r"1 masks cannot replace 1: '0.weight'"):
        masks.replace({"4.weight": torch.ones(2, 12, dtype=torch.bool)})
    with pytest.raises(ModelError, match=r"no parameter '9.weight' \(1 of 2 names"):
        FrozenMasks.of_none(model, ["0.weight", "9.weight"])
    with pytest.raises(ModelError, match=r"'4.weight' has shape \(12, 2\).*\(2, 12\)"):
        FrozenMasks.of_parameters(
            model, {"4.weight": torch.ones(12, 2, dtype=torch.bool)}
        )
