import pytest
import torch
from autoprune_plugins.magnitude import Magnitude, register_methods

from autoprune.compression.method import Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Layer, Value

METHOD = Magnitude()
LAYER = Layer("q", (2, 4), "float32", block=0, role="q", input="x")
WEIGHT = torch.tensor([[1.0, -4.0, 2.0, -3.0], [-5.0, 6.0, 7.0, -8.0]])


def prune(**params: Value) -> list[list[float]]:
    source = Source(LAYER, Variant.dense(WEIGHT))
    made = METHOD.compress([source], NO_STATISTICS, [METHOD.check(params)])
    weight: list[list[float]] = made[0][0].weight.tolist()
    return weight


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["magnitude"]


def test_rows_worked_by_hand() -> None:
    assert prune(sparsity=0.5) == [[0, -4, 0, -3], [0, 0, 7, -8]]


def test_a_layer_worked_by_hand() -> None:
    assert prune(sparsity=0.5, per="layer") == [[0, 0, 0, 0], [-5, 6, 7, -8]]


def test_a_pattern_worked_by_hand() -> None:
    assert prune(pattern="1:2") == [[0, -4, 0, -3], [0, 6, 0, -8]]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({}, "either sparsity or pattern, found neither"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "found 0.5 and 2:4"),
        ({"sparsity": 1.2}, "between 0 and 1, found 1.2"),
        ({"sparsity": 0.0}, "between 0 and 1, found 0.0"),
        ({"sparsity": "half"}, "takes a number, found 'half'"),
        ({"pattern": "4:2"}, "found '4:2'"),
        ({"sparsity": 0.5, "per": "column"}, "row or layer, found 'column'"),
        ({"sparsty": 0.5}, "'sparsty'. Did you mean 'sparsity'"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        METHOD.check(params)


@pytest.mark.parametrize(
    ("columns", "pattern", "reason"),
    [
        (4, "4:8", "its 4 inputs are fewer than the 8 of 4:8"),
        (18, "2:4", "4 of 2:4 does not divide its 18 inputs"),
        (16, "2:4", None),
    ],
)
def test_patterns_that_do_not_fit_are_refused(
    columns: int, pattern: str, reason: str | None
) -> None:
    layer = Layer("q", (2, columns), "float32", block=0, role="q", input=None)
    settings = METHOD.check({"pattern": pattern})
    assert METHOD.refuses(layer, Storage.dense(layer), settings) == reason


def test_a_second_pruning_is_refused() -> None:
    settings = METHOD.check({"sparsity": 0.5})
    dense = Storage.dense(LAYER)
    reason = METHOD.refuses(LAYER, dense.masked(4, "2:4"), settings)
    assert reason == "already pruned (2:4, 50% zeros): prune once, as far as wanted"
    reason = METHOD.refuses(LAYER, dense.quantized(4, None, symmetric=False), settings)
    assert reason == "already quantized to 4 bits: prune before quantizing"
