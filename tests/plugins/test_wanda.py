import pytest
import torch
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.wanda import Wanda, register_methods

from autoprune.compression.method import Source
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS, InputStatistics
from autoprune.policy import Layer, Value
from autoprune.testing import tiny_source, tiny_statistics

METHOD = Wanda()
LAYER = Layer("q", (2, 4), "float32", block=0, role="q", input="x")
WEIGHT = torch.tensor([[1.0, -4.0, 2.0, -3.0], [-5.0, 6.0, 7.0, -8.0]])
# Norms 10, 1, 3, 1: scores 10 4 6 3 and 50 6 21 8.
STATISTICS = InputStatistics(9, torch.tensor([100.0, 1.0, 9.0, 1.0]))


def prune(**params: Value) -> list[list[float]]:
    source = Source(LAYER, Variant.dense(WEIGHT))
    made = METHOD.compress([source], STATISTICS, [METHOD.check(params)])
    weight: list[list[float]] = made[0][0].weight.tolist()
    return weight


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["wanda"]


def test_rows_worked_by_hand() -> None:
    assert prune(sparsity=0.5) == [[1, 0, 2, 0], [-5, 0, 7, 0]]
    assert prune(sparsity=0.75) == [[1, 0, 0, 0], [-5, 0, 0, 0]]


def test_a_pattern_worked_by_hand() -> None:
    assert prune(pattern="1:2") == [[1, 0, 2, 0], [-5, 0, 7, 0]]


def test_equal_norms_give_magnitude() -> None:
    source, equal = tiny_source(), InputStatistics(1, torch.full((32,), 4.0))
    settings = [METHOD.check({"sparsity": 0.4}), METHOD.check({"pattern": "2:4"})]
    found = METHOD.compress([source], equal, settings)[0]
    plain = [{**one, "per": "row"} for one in settings]
    expected = Magnitude().compress([source], NO_STATISTICS, plain)[0]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.weight, other.weight)


def test_dead_inputs_go_first() -> None:
    statistics = tiny_statistics(dead=range(16))
    settings = [METHOD.check({"sparsity": 0.5})]
    variant = METHOD.compress([tiny_source()], statistics, settings)[0][0]
    assert variant.mask is not None
    assert variant.mask.tolist() == [[False] * 16 + [True] * 16] * 8


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({}, "wanda takes either sparsity or pattern, found neither"),
        ({"sparsity": 1.2}, "between 0 and 1, found 1.2"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        METHOD.check(params)


@pytest.mark.parametrize(
    ("statistics", "match"),
    [
        (NO_STATISTICS, "sum of squares of the inputs of q was not gathered"),
        (InputStatistics(1, torch.ones(3)), "has 3 inputs, but q has 4"),
        (
            InputStatistics(1, torch.tensor([1.0, float("inf"), 1.0, 1.0])),
            "inputs of q holds NaN or infinity in 1 of 4 places",
        ),
    ],
    ids=["missing", "size", "infinite"],
)
def test_unusable_statistics_are_named(statistics: InputStatistics, match: str) -> None:
    source = Source(LAYER, Variant.dense(WEIGHT))
    with pytest.raises(MethodError, match=match):
        METHOD.compress([source], statistics, [METHOD.check({"sparsity": 0.5})])
