from collections.abc import Mapping

import pytest
import torch
from autoprune_plugins.obd import Obd, register_methods
from autoprune_plugins.wanda import Wanda

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value
from autoprune.testing import (
    MethodContract,
    output_error,
    tiny_source,
    tiny_statistics,
)

METHOD = Obd()
LAYER = Layer("q", (2, 4), "float32", block=0, role="q", input="x")
WEIGHT = torch.tensor([[1.0, -4.0, 2.0, -3.0], [-5.0, 6.0, 7.0, -8.0]])
# Twice the losses: 100 16 36 9 and 2500 36 441 64.
STATISTICS = InputStatistics(9, torch.tensor([100.0, 1.0, 9.0, 1.0]))


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"sparsity": 0.5},
            {"sparsity": 0.29, "per": "row"},
            {"pattern": "4:8"},
            {"sparsity": 0.5, "tile": "4x4"},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> Mapping[str, Value]:
        params: Mapping[str, Value] = request.param
        return params


def prune(**params: Value) -> list[list[float]]:
    source = Source(LAYER, Variant.dense(WEIGHT))
    made = METHOD.compress([source], STATISTICS, [METHOD.check(params)])
    weight: list[list[float]] = made[0][0].weight.tolist()
    return weight


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["obd"]


def test_layers_and_rows_worked_by_hand() -> None:
    # Of two weights that cost 36, the earlier goes.
    assert prune(sparsity=0.375) == [[1, 0, 0, 0], [-5, 6, 7, -8]]
    assert prune(sparsity=0.5) == [[1, 0, 0, 0], [-5, 0, 7, -8]]
    assert prune(sparsity=0.5, per="row") == [[1, 0, 2, 0], [-5, 0, 7, 0]]
    assert prune(pattern="1:2") == [[1, 0, 2, 0], [-5, 0, 7, 0]]


@pytest.mark.parametrize(
    "params", [{"sparsity": 0.37}, {"sparsity": 0.8}, {"pattern": "2:4"}], ids=str
)
def test_within_a_row_the_order_is_wandas(params: dict[str, Value]) -> None:
    source, statistics = tiny_source((16, 64)), tiny_statistics(64)
    found, expected = (
        method.compress([source], statistics, [method.check({**params, **per})])[0][0]
        for method, per in ((METHOD, {"per": "row"}), (Wanda(), {}))
    )
    assert torch.equal(found.mask, expected.mask)


def test_without_dependence_its_losses_are_the_output_error() -> None:
    source, square_sum = tiny_source(), torch.linspace(0.5, 2, 32)
    statistics = InputStatistics(1, square_sum, torch.diag(square_sum))
    variant = METHOD.compress([source], statistics, [METHOD.check({"sparsity": 0.5})])
    losses = source.variant.weight.float().square() * square_sum
    cheapest = losses.flatten().sort().values[:128].sum()
    error = output_error(source.variant, variant[0][0], statistics)
    assert error == pytest.approx(float(cheapest), rel=1e-5)


def test_impossible_parameters_are_named() -> None:
    with pytest.raises(
        MethodError, match=r"per=.* unknown word 'head'\. Known: layer, row"
    ):
        METHOD.check({"sparsity": 0.5, "per": "head"})
    with pytest.raises(MethodError, match="obd takes either sparsity or pattern"):
        METHOD.check({})
