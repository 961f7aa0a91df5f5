"""Pruning in rounds: who goes back where, and how many weights go."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import ConfigError
from autoprune.training.masks import FrozenMasks
from autoprune.training.tickets import (
    Round,
    State,
    TicketSettings,
    best_ticket,
    rounds_of_tickets,
    shrinking,
)

SETTINGS = TicketSettings(steps=10, rewind_to=4)


@dataclass
class Recorder:
    """Adds the number of steps to what is kept, and remembers what it was given."""

    calls: list[tuple[int, int]] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def __call__(
        self, state: State, kept: Mapping[str, Tensor], *, start: int, stop: int
    ) -> tuple[State, float]:
        self.calls.append((start, stop))
        self.states.append(state)
        added = state["w"] + (stop - start) * kept.get("w", torch.ones(4))
        return {"w": added, "b": state["b"]}, float(len(self.calls))


def run(rewind: str, sparsities: list[float]) -> tuple[Recorder, list[Round]]:
    recorder = Recorder()
    state = {"w": torch.tensor([4.0, 1.0, -30.0, 2.0]), "b": torch.ones(1)}
    settings = replace(SETTINGS, rewind=rewind)
    found = rounds_of_tickets(state, ["w"], sparsities, recorder, settings)
    return recorder, list(found)


def test_weights_go_back_with_the_learning_rate() -> None:
    recorder, found = run("weights", [0.25, 0.5])
    assert recorder.calls == [(0, 4), (4, 10), (4, 10), (4, 10)]
    early = torch.tensor([8.0, 5.0, -26.0, 6.0])
    dense = torch.tensor([14.0, 11.0, -20.0, 12.0])
    assert torch.equal(found[0].state["w"], dense) and found[0].kept == {}
    kept = [one.kept["w"].tolist() for one in found[1:]]
    assert kept == [[True, False, True, True], [True, False, True, False]]
    for given, one in zip(recorder.states[2:], found[1:], strict=True):
        assert torch.equal(given["w"], early * one.kept["w"])
        assert torch.equal(given["b"], torch.ones(1))
    assert [one.steps for one in found] == [10, 16, 22]
    assert [one.sparsity for one in found] == [0.0, 0.25, 0.5]
    assert [one.quality for one in found] == [2.0, 3.0, 4.0]


def test_the_learning_rate_goes_back_alone() -> None:
    recorder, found = run("rate", [0.25, 0.5])
    assert recorder.calls == [(0, 4), (4, 10), (4, 10), (4, 10)]
    for before, given, one in zip(found, recorder.states[2:], found[1:], strict=False):
        assert torch.equal(given["w"], before.state["w"] * one.kept["w"])


def test_fine_tuning_goes_on() -> None:
    recorder, found = run("none", [0.25, 0.5])
    assert recorder.calls == [(0, 4), (4, 10), (10, 16), (16, 22)]
    for before, given, one in zip(found, recorder.states[2:], found[1:], strict=False):
        assert torch.equal(given["w"], before.state["w"] * one.kept["w"])
    assert [one.steps for one in found] == [10, 16, 22]


def test_what_is_pruned_stays_so_beside_a_living_zero() -> None:
    def dead(
        state: State, kept: Mapping[str, Tensor], *, start: int, stop: int
    ) -> tuple[State, float]:
        return {"w": torch.zeros(4)}, 0.0

    state = {"w": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    settings = TicketSettings(steps=1, rewind_to=0)
    found = list(rounds_of_tickets(state, ["w"], [0.25, 0.5, 0.75], dead, settings))
    masks = [one.kept["w"] for one in found[1:]]
    assert [int((~mask).sum()) for mask in masks] == [1, 2, 3]
    assert all(
        bool((one | ~two).all()) for one, two in zip(masks, masks[1:], strict=False)
    )


def test_the_first_lottery_ticket_goes_back_to_the_start() -> None:
    recorder = Recorder()
    state = {"w": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.ones(1)}
    settings = TicketSettings(steps=5, rewind_to=0)
    list(rounds_of_tickets(state, ["w"], [0.5], recorder, settings))
    assert recorder.calls == [(0, 5), (0, 5)]
    assert recorder.states[1]["w"].tolist() == [4.0, 0.0, 3.0, 0.0]


def test_a_criterion_ends_the_loop() -> None:
    recorder = Recorder()
    state = {"w": torch.arange(4.0), "b": torch.ones(1)}
    rounds = rounds_of_tickets(state, ["w"], shrinking(0.3), recorder, SETTINGS)
    best = best_ticket(rounds, lambda one: one.quality < 4.5)
    assert (best.number, best.quality) == (2, 4.0)
    assert len(recorder.calls) == 5  # no round after the first that is not good
    with pytest.raises(ConfigError, match="not even the dense model"):
        best_ticket([best], lambda one: False)
    few = rounds_of_tickets(state, ["w"], [0.5], Recorder(), SETTINGS)
    assert best_ticket(few, lambda one: True).number == 1


@pytest.mark.parametrize("rewind", ["none", "weights", "rate"])
def test_masks_hold_at_every_step_of_a_real_training(rewind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3))
    inputs, labels = torch.randn(9, 1, 3, 3), torch.arange(9) % 3
    names = ["0.weight", "2.weight"]

    def train_from(
        state: State, kept: Mapping[str, Tensor], *, start: int, stop: int
    ) -> tuple[State, float]:
        model.load_state_dict(state)
        masks = FrozenMasks.of_parameters(model, kept)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        loss = partial(nn.functional.cross_entropy, target=labels)
        with masks.held(optimizer):
            for _ in range(start, stop):
                optimizer.zero_grad()
                loss(model(inputs)).backward()
                optimizer.step()
                masks.check()
                for name, mask in kept.items():
                    assert torch.equal(model.get_parameter(name) != 0, mask)
        found = {name: value.clone() for name, value in model.state_dict().items()}
        return found, -float(loss(model(inputs)).detach())

    state = {name: value.clone() for name, value in model.state_dict().items()}
    settings = TicketSettings(steps=6, rewind_to=2, rewind=rewind)
    sparsities = shrinking(rounds=3, final=0.75)
    found = list(rounds_of_tickets(state, names, sparsities, train_from, settings))
    for one in found[1:]:
        zeros = sum(int((one.state[name] == 0).sum()) for name in names)
        assert zeros == round(one.sparsity * 32)
    assert found[-1].sparsity == 0.75


def test_sparsities_of_rounds() -> None:
    assert list(shrinking(0.2, rounds=3)) == pytest.approx([0.2, 0.36, 0.488])
    assert list(shrinking(rounds=3, final=0.875)) == pytest.approx([0.5, 0.75, 0.875])
    assert list(shrinking(rounds=7, final=0.9))[-1] == 0.9
    with pytest.raises(ConfigError, match="found 1.0 and 3 rounds"):
        list(shrinking(rounds=3, final=1.0))
    with pytest.raises(ConfigError, match=r"found 0\.9 and None rounds"):
        list(shrinking(final=0.9))
    with pytest.raises(ConfigError, match=r"a share in \(0, 1\), found 0"):
        list(shrinking(0.0))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rewind": "wieghts"}, "unknown rewinding 'wieghts'. Did you mean 'weights'"),
        ({"rewind_to": 10}, r"a step in \[0, 10\), found 10"),
        ({"per": "row"}, "unknown scope 'row'"),
    ],
)
def test_what_is_out_of_range_is_named(wrong: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(SETTINGS, **wrong)
