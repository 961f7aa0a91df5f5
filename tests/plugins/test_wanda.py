import pytest
import torch
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.wanda import Wanda, register_methods

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS, InputStatistics
from autoprune.policy import Layer, Value
from autoprune.testing import MethodContract, tiny_source, tiny_statistics

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


def test_a_layer_worked_by_hand() -> None:
    assert prune(sparsity=0.5, per="layer") == [[1, 0, 0, 0], [-5, 0, 7, -8]]


def test_tiles_worked_by_hand() -> None:
    assert prune(sparsity=0.5, tile="row") == [[0, 0, 0, 0], [-5, 6, 7, -8]]
    # Columns sum up to 60, 10, 27, 11.
    assert prune(sparsity=0.5, tile="column") == [[1, 0, 2, 0], [-5, 0, 7, 0]]
    # Vectors sum up to 14, 9 and 56, 29.
    assert prune(sparsity=0.5, tile="1x2") == [[1, -4, 0, 0], [-5, 6, 0, 0]]


def test_equal_norms_give_magnitude() -> None:
    source, equal = tiny_source(), InputStatistics(1, torch.full((32,), 4.0))
    params: list[dict[str, Value]] = [
        {"sparsity": 0.4},
        {"sparsity": 0.4, "per": "layer"},
        {"pattern": "2:4"},
        {"sparsity": 0.4, "tile": "4x4"},
        {"sparsity": 0.4, "tile": "row"},
        {"sparsity": 0.4, "tile": "column"},
    ]
    found = METHOD.compress([source], equal, [METHOD.check(one) for one in params])[0]
    plain = [Magnitude().check(one) for one in params]
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
        ({"sparsity": 0.5, "per": "column"}, r"wanda\(per=.* word 'column'"),
        ({"sparsity": 0.5, "tile": "8"}, r"wanda\(tile=.* found '8'"),
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


def test_dead_columns_go_first() -> None:
    statistics = tiny_statistics(dead=range(0, 32, 4))
    settings = [METHOD.check({"sparsity": 0.25, "tile": "column"})]
    variant = METHOD.compress([tiny_source()], statistics, settings)[0][0]
    assert variant.mask is not None
    assert variant.mask.tolist() == [[column % 4 > 0 for column in range(32)]] * 8


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"pattern": "1:4"},
            {"pattern": "2:4"},
            {"pattern": "4:8"},
            {"sparsity": 0.7, "per": "layer"},
            {"sparsity": 0.5, "tile": "1x8"},
            {"sparsity": 0.29, "tile": "row"},
            {"sparsity": 0.4, "tile": "column"},
            {"sparsity": 0.6, "tile": "4x4", "per": "layer"},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> dict[str, Value]:
        params: dict[str, Value] = request.param
        return params
