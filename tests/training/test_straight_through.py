"""Masks on their way to goals: exact counts and groups, pulled shadows."""

import copy

import pytest
import torch
from torch import nn

from autoprune.errors import ConfigError, ModelError
from autoprune.training.goals import Goal, prune_towards
from autoprune.training.mask_rules import StraightThrough
from autoprune.training.masks import FrozenMasks
from autoprune.training.moving_masks import MovingMasks
from autoprune.training.ramps import Ramp

GOALS = {"0.weight": Goal(24, "2:4"), "2.weight": Goal(13)}
RAMP = Ramp("cubic", 0.0, 1.0, start=0, end=6, interval=2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, 8, generator=generator)
    optimizer.zero_grad()
    (model(inputs) - inputs[:, :4]).square().mean().backward()
    optimizer.step()


def test_counts_follow_the_ramp_and_groups_hold_at_its_end() -> None:
    rule = StraightThrough(GOALS, RAMP, interval=3, stop=13)
    masks = MovingMasks(FrozenMasks.of_none(network(), GOALS), rule)
    optimizer = torch.optim.SGD(masks.model.parameters(), lr=1.0, momentum=0.9)
    moved, before = [], {}
    with masks.held(optimizer):
        for number in range(18):
            step(masks.model, optimizer, number)
            masks.check()
            share = RAMP.sparsity(number)
            counts = {name: round(share * one.pruned) for name, one in GOALS.items()}
            assert masks.pruned == counts
            now = {name: mask.clone() for name, mask in masks.parameters()}
            if number >= 6:
                groups = now["0.weight"].view(-1, 4)
                assert (groups.sum(1) == 2).all()
            if before and any(not torch.equal(now[n], before[n]) for n in now):
                moved.append(number)
            before = now
    assert set(moved) <= {2, 4, 6, 9, 12} and {2, 4, 6} <= set(moved)
    assert {9, 12} & set(moved)  # at its goal, weights still come back


def test_of_a_pattern_only_what_may_go_at_its_end_goes_before() -> None:
    scores = torch.tensor([[5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 9.0, 3.0]])
    half = prune_towards(scores, Goal(4, "2:4"), 0.5)
    assert half.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0]]
    whole = prune_towards(scores, Goal(4, "2:4"))
    assert whole.tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    anywhere = prune_towards(scores, Goal(4))
    assert anywhere.tolist() == [[1, 0, 0, 0, 1, 1, 0, 1]]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_shadows_are_pulled_to_zero_by_the_decay(decay: float) -> None:
    """By hand: the gradient is that at the masked weights."""
    rate, ramp = 0.1, Ramp("constant", 0.0, 1.0)
    rule = StraightThrough(GOALS, ramp, interval=2, decay=decay)
    masks = MovingMasks(FrozenMasks.of_none(network(), GOALS), rule)
    optimizer = torch.optim.SGD(masks.model.parameters(), lr=rate)
    with masks.held(optimizer):
        step(masks.model, optimizer, 0)  # after it, what has to go is pruned
        pruned = {name: mask.clone() for name, mask in masks.parameters()}
        before = masks.state_dict()["shadows"]
        masked = copy.deepcopy(masks.model)
        step(masks.model, optimizer, 1)
    step(masked, torch.optim.SGD(masked.parameters(), lr=rate), 1)
    for name, mask in pruned.items():
        gradient = masked.get_parameter(name).grad
        assert gradient is not None and before[name][mask].all()
        wanted = before[name] - rate * (gradient + decay * before[name] * mask)
        torch.testing.assert_close(masks.state_dict()["shadows"][name], wanted)


def test_masks_that_are_not_named_stay() -> None:
    model = network()
    kept = {name: torch.rand(model.get_parameter(name).shape) < 0.5 for name in GOALS}
    frozen = FrozenMasks.of_parameters(model, kept)
    rule = StraightThrough(
        {"0.weight": Goal(24)}, Ramp("constant", 0.0, 1.0), interval=1
    )
    masks = MovingMasks(frozen, rule, ["0.weight"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with masks.held(optimizer):
        for number in range(6):
            step(model, optimizer, number)
            masks.check()
    pruned = dict(frozen.parameters())
    assert torch.equal(pruned["2.weight"], ~kept["2.weight"])
    assert not torch.equal(pruned["0.weight"], ~kept["0.weight"])
    assert masks.pruned["0.weight"] == 24
    with pytest.raises(ModelError, match="'1.weight' has no mask that could move"):
        MovingMasks(frozen, rule, ["1.weight"])


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match="ends at 1, found 0.5"):
        StraightThrough(GOALS, Ramp("cubic", 0.0, 0.5, 0, 3))
    with pytest.raises(ConfigError, match="interval of masks .* not 0"):
        StraightThrough(GOALS, RAMP, interval=0)
    with pytest.raises(ConfigError, match="decay of shadows .* not -1"):
        StraightThrough(GOALS, RAMP, decay=-1)
