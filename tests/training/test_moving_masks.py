"""Masks that are made anew while a model is trained: exact after every step."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import ConfigError, ModelError
from autoprune.training.at_start import keep_random
from autoprune.training.mask_rules import DropAndGrow, GradualMagnitude
from autoprune.training.masks import FrozenMasks
from autoprune.training.moving_masks import MaskedWeight, MaskRule, MovingMasks
from autoprune.training.ramps import Ramp

STEPS = 24
NAMES = ["0.weight", "3.weight", "5.weight"]
SIZES = {"0.weight": 54, "3.weight": 96, "5.weight": 16}
RAMP = Ramp("cubic", 0.0, 0.8, start=3, end=17, interval=4)
RIGL = DropAndGrow(STEPS, interval=5, fraction=0.5)
SET = DropAndGrow(STEPS, interval=5, fraction=0.5, growth="random")
RULES: dict[str, MaskRule] = {
    "gradual": GradualMagnitude(RAMP),
    "gradual by parameter": GradualMagnitude(RAMP, per="parameter"),
    "gradual, coming back": GradualMagnitude(RAMP, comes_back=True),
    "late and at once": GradualMagnitude(Ramp("constant", 0.0, 0.7, 9, 9)),
    "rigl": RIGL,
    "set": SET,
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.Tanh(),
        nn.Linear(8, 2),
    )


def starting(rule: MaskRule) -> MovingMasks:
    model = network()
    if not isinstance(rule, DropAndGrow):
        return MovingMasks(FrozenMasks.of_none(model, NAMES), rule)
    generator = torch.Generator().manual_seed(1)
    kept = keep_random(model, NAMES, 0.6, generator=generator)
    return MovingMasks(FrozenMasks.of_parameters(model, kept), rule)


def adamw(masks: MovingMasks) -> torch.optim.Optimizer:
    return torch.optim.AdamW(masks.model.parameters(), lr=0.02, weight_decay=0.1)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(6, 2, 4, 4, generator=generator)
    loss = nn.functional.cross_entropy(
        model(inputs), (inputs.sum((1, 2, 3)) > 0).long()
    )
    loss.backward()


def train(
    masks: MovingMasks, optimizer: torch.optim.Optimizer, start: int, stop: int
) -> Iterator[int]:
    """Train with two batches a step; gives way after each, with masks as they are."""
    with masks.held(optimizer):
        for step in range(start, stop):
            optimizer.zero_grad()
            backward(masks.model, 2 * step)
            backward(masks.model, 2 * step + 1)
            optimizer.step()
            masks.check()
            yield step


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_masks_are_exact_after_every_step(rule: MaskRule) -> None:
    masks = starting(rule)
    before = masks.pruned
    for step in train(masks, adamw(masks), 0, STEPS):
        for name, mask in masks.parameters():
            zero = masks.model.get_parameter(name) == 0
            assert bool(zero[mask].all()), name
            # What has grown is zero too until a gradient moves it.
            assert isinstance(rule, DropAndGrow) or not zero[~mask].any(), name
        if isinstance(rule, DropAndGrow):
            assert masks.pruned == before  # so many for each, always
            continue
        assert isinstance(rule, GradualMagnitude)
        share = rule.ramp.sparsity(step)
        if rule.per == "model":
            assert sum(masks.pruned.values()) == round(share * sum(SIZES.values()))
        else:
            assert masks.pruned == {n: round(share * s) for n, s in SIZES.items()}
    assert masks.step == STEPS


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_a_resumed_training_goes_on_as_if_nothing_were(rule: MaskRule) -> None:
    whole = starting(rule)
    list(train(whole, adamw(whole), 0, STEPS))
    first = starting(rule)
    optimizer = adamw(first)
    list(train(first, optimizer, 0, 11))
    saved = copy.deepcopy(
        (first.model.state_dict(), optimizer.state_dict(), first.state_dict())
    )
    second = starting(rule)
    again = adamw(second)
    second.model.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    list(train(second, again, 11, STEPS))
    assert second.step == STEPS
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name
    for name, mask in whole.parameters():
        assert torch.equal(mask, dict(second.parameters())[name])


def test_without_a_shadow_what_is_pruned_stays_so() -> None:
    masks = starting(RULES["gradual"])
    seen = {name: torch.zeros(1, dtype=torch.bool) for name in NAMES}
    for _ in train(masks, adamw(masks), 0, STEPS):
        now = {name: mask.clone() for name, mask in masks.parameters()}
        assert all(bool((now[name] | ~seen[name]).all()) for name in NAMES)
        seen = now


def test_a_shadow_learns_from_the_gradient_at_the_masked_weights_and_comes_back() -> (
    None
):
    """Against a dense copy that is trained by gradients of the masked model."""
    ramp = Ramp("constant", 0.0, 0.5, start=0, end=STEPS)
    masks = starting(GradualMagnitude(ramp, comes_back=True))
    dense, back = network(), 0
    reference = torch.optim.SGD(dense.parameters(), lr=0.3, momentum=0.9)
    optimizer = torch.optim.SGD(masks.model.parameters(), lr=0.3, momentum=0.9)
    before: dict[str, Tensor] = {}
    for _ in train(masks, optimizer, 0, STEPS):
        for name, parameter in masks.model.named_parameters():
            assert parameter.grad is not None
            dense.get_parameter(name).grad = parameter.grad.clone()
        reference.step()
        pruned = {name: mask.clone() for name, mask in masks.parameters()}
        back += sum(int((before[n] & ~pruned[n]).sum()) for n in before)
        before = pruned
        for name, mask in pruned.items():
            full = dense.get_parameter(name).detach()
            kept = masks.model.get_parameter(name).detach()
            torch.testing.assert_close(kept, full.masked_fill(mask, 0.0))
    assert back > 0


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest() -> None:
    weight = torch.tensor([[0.5, -0.1, 0.0, 0.0], [0.2, 0.0, -0.9, 0.0]])
    gradient = torch.tensor([[0.0, 0.1, 0.3, -0.6], [0.4, 0.5, 0.0, 0.2]])
    rule = DropAndGrow(100, interval=10, fraction=1.0, stop=0.8)
    now = {"w": MaskedWeight(weight, weight == 0, gradient)}
    # After step 40 of 80: half of 4 living weights: -0.1 and 0.2 are dropped; of what
    # is free then, -0.6 and 0.5 pull most.
    assert rule.dropped(40) == pytest.approx(0.5)
    pruned = rule.renew(40, now)["w"]
    assert pruned.tolist() == [[False, True, True, False], [True, False, False, True]]


def test_rigl_follows_its_cosine_and_stops() -> None:
    rule = DropAndGrow(1000, interval=100, fraction=0.3)
    assert [s for s in range(1000) if rule.renews_at(s)] == list(range(100, 701, 100))
    for step in (100, 700):
        share = 0.15 * (1 + math.cos(math.pi * step / 750))
        assert rule.dropped(step) == pytest.approx(share)


@contextmanager
def dense_gradients(model: nn.Module, into: dict[str, Tensor]) -> Iterator[None]:
    """Hear gradients before anybody silences them, summed over backward passes."""
    handles = [
        model.get_parameter(name).register_hook(
            lambda grad, name=name: into.__setitem__(name, into.get(name, 0) + grad)
        )
        for name in NAMES
    ]
    yield
    for handle in handles:
        handle.remove()


def test_grown_weights_start_at_zero_and_momentum_is_forgotten() -> None:
    masks = starting(RIGL)
    optimizer = adamw(masks)
    before = {name: mask.clone() for name, mask in masks.parameters()}
    weights = {name: masks.model.get_parameter(name) for name in NAMES}
    heard: dict[str, Tensor] = {}
    grown = 0
    with dense_gradients(masks.model, heard):
        for step in train(masks, optimizer, 0, STEPS):
            now = {name: mask.clone() for name, mask in masks.parameters()}
            for name, mask in now.items():
                changed = before[name] ^ mask
                assert bool(changed.any()) <= RIGL.renews_at(step)
                new = before[name] & ~mask
                grown += int(new.sum())
                assert not weights[name][changed].any()
                for key in ("exp_avg", "exp_avg_sq"):
                    assert not optimizer.state[weights[name]][key][changed | mask].any()
                if new.any():  # none that stayed out pulled more than one that grew
                    pull, out = heard[name].abs(), before[name] & mask
                    assert pull[new].min() >= pull[out].max()
            before = now
            heard.clear()
    assert grown > 0


def test_gradients_of_a_step_are_clipped_by_what_lives() -> None:
    masks = starting(RIGL)
    optimizer = torch.optim.SGD(masks.model.parameters(), lr=0.1)
    masks.step = 5  # a step with a renewal: gradients are collected, yet silenced
    with masks.held(optimizer):
        backward(masks.model, 0)
        for name, mask in masks.parameters():
            gradient = masks.model.get_parameter(name).grad
            assert gradient is not None and not gradient[mask].any()


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match="fraction of drop and grow .* not 1.5"):
        DropAndGrow(10, fraction=1.5)
    with pytest.raises(ConfigError, match="interval .* not 0"):
        DropAndGrow(10, interval=0)
    with pytest.raises(ConfigError, match="unknown growth 'gradiant'"):
        DropAndGrow(10, growth="gradiant")
    with pytest.raises(ConfigError, match="unknown scope 'row'"):
        GradualMagnitude(RAMP, per="row")
    masks = starting(RIGL)
    state = starting(RULES["gradual, coming back"]).state_dict()
    with pytest.raises(ModelError, match="shadows of 3, expected 3 and 0"):
        masks.load_state_dict(state)
    masks.model.get_parameter("3.weight").requires_grad_(False)
    with pytest.raises(ModelError, match="3.weight has no gradient at step 5"):
        list(train(masks, adamw(masks), 0, 6))
