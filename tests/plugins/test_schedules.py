"""Schedules lay out phases; the figures are worked out by hand."""

import pytest
from autoprune_plugins.schedules import register_schedules

from autoprune.compression.actions import Actions
from autoprune.compression.parameters import complete
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer
from autoprune.training.schedule import Outline, Phase, pruning_of

ACTIONS = Actions(load_plugins().methods)
LAYERS = [
    Layer(f"blocks.{n}.up", (8, 16), "float32", n, "up", f"blocks.{n}")
    for n in range(3)
]
HALF = Action.parse("wanda(sparsity=0.8)")


def phases(name: str, *, action: Action = HALF, **given: object) -> list[Phase]:
    schedule = next(one for one in register_schedules() if one.name == name)
    settings = complete(name, schedule.parameters, given)
    errors = {0: 0.3, 1: 0.1, 2: 0.2}
    outline = Outline(dict.fromkeys(LAYERS, action), ACTIONS, lambda: errors)
    return schedule.phases(outline, settings)


def sparsities(found: list[Phase]) -> list[float]:
    """Tell how far the first layer is pruned in each phase."""
    texts = [str(one.pruning.get(LAYERS[0], "dense")) for one in found]
    return [0.0 if t == "dense" else float(t[15:-1]) for t in texts]


@pytest.mark.parametrize("name", [one.name for one in register_schedules()])
def test_the_last_phase_has_all_on_and_shares_are_whole(name: str) -> None:
    found = phases(name)
    assert found[-1].pruning == dict.fromkeys(LAYERS, HALF)
    assert sum(one.share for one in found) == pytest.approx(1.0)


def test_rounds_follow_the_ramp() -> None:
    # 0.8 (1 - (1 - n/3)^3): 0.8 x 19/27, 0.8 x 26/27, 0.8
    assert sparsities(phases("iterative")) == [0.562963, 0.77037, 0.8]
    assert sparsities(phases("iterative", rounds=2, ramp="linear")) == [0.4, 0.8]
    assert not any(one.rewinds for one in phases("iterative"))
    assert all(one.rewinds for one in phases("iterative", rewind="weights"))


def test_patterns_and_units_grow_as_well() -> None:
    two = phases("iterative", action=Action.parse("wanda(pattern=2:4)"), ramp="linear")
    # A third of the two that go is none, two thirds are one.
    texts = [str(one.pruning[LAYERS[0]]) for one in two]
    assert texts == ["wanda(pattern=3:4)", "wanda(pattern=3:4)", "wanda(pattern=2:4)"]


def test_gradual_pruning_begins_and_ends_where_it_is_told() -> None:
    found = phases("gradual", steps=2, start=0.2, end=0.6, ramp="linear")
    assert sparsities(found) == [0.0, 0.4, 0.8]
    assert [one.share for one in found] == pytest.approx([0.2, 0.2, 0.6])


def test_late_pruning_lets_weights_settle() -> None:
    found = phases("late", start=0.4)
    assert [one.share for one in found] == [0.4, 0.6]
    assert not found[0].pruning


@pytest.mark.parametrize(
    ("order", "blocks"),
    [("error", [1, 2, 0]), ("first", [0, 1, 2]), ("last", [2, 1, 0])],
)
def test_blocks_come_in_order(order: str, blocks: list[int]) -> None:
    found = phases("progressive", order=order)
    begun = [{layer.block for layer in one.pruning} for one in found]
    assert begun == [set(blocks[: n + 1]) for n in range(3)]
    assert len(phases("progressive", stages=50)) == 3


def test_pruning_ends_where_something_else_is_stored() -> None:
    joint = Action.parse("wanda(pattern=2:4) + gptq(bits=4, group=16)")
    assert str(pruning_of(LAYERS[0], joint, ACTIONS)) == "wanda(pattern=2:4)"
    plain = Action.parse("rtn(bits=4, group=16)")
    assert not pruning_of(LAYERS[0], plain, ACTIONS).steps
