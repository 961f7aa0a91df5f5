from collections.abc import Mapping

import pytest
import torch
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.ria import Ria, register_methods, relative_importance
from autoprune_plugins.wanda import Wanda

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value
from autoprune.testing import MethodContract, tiny_source, tiny_statistics

METHOD = Ria()
LAYER = Layer("q", (2, 2), "float32", block=0, role="q", input="x")
WEIGHT = torch.tensor([[1.0, -1.0], [3.0, 2.0]])


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"sparsity": 0.5},
            {"sparsity": 0.29, "per": "row", "power": 1.0},
            {"pattern": "2:4"},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> Mapping[str, Value]:
        params: Mapping[str, Value] = request.param
        return params


def prune(squares: list[float], **params: Value) -> list[list[float]]:
    source = Source(LAYER, Variant.dense(WEIGHT))
    statistics = InputStatistics(1, torch.tensor(squares))
    made = METHOD.compress([source], statistics, [METHOD.check(params)])
    weight: list[list[float]] = made[0][0].weight.tolist()
    return weight


def mask(method: CompressionMethod, source: Source, **params: Value) -> torch.Tensor:
    settings = [method.check(params)]
    found = method.compress([source], tiny_statistics(), settings)[0][0].mask
    assert found is not None
    return found


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["ria"]


def test_a_layer_worked_by_hand() -> None:
    # Columns add up to 4 and 3, rows to 2 and 5.
    expected = torch.tensor(
        [[1 / 4 + 1 / 2, 1 / 3 + 1 / 2], [3 / 4 + 3 / 5, 2 / 3 + 2 / 5]]
    )
    torch.testing.assert_close(relative_importance(WEIGHT), expected)
    # 0.75 0.83 1.35 1.07: by size alone both ones would go first as well.
    assert prune([1.0, 1.0], sparsity=0.25) == [[0, -1], [3, 2]]
    # Norms 4 and 1, to the power of a half: 1.5 0.83 2.7 1.07.
    assert prune([16.0, 1.0], sparsity=0.5) == [[1, 0], [3, 0]]
    # To the power of 0 norms do not count.
    assert prune([16.0, 1.0], sparsity=0.5, power=0.0) == [[0, 0], [3, 2]]


def test_the_unit_of_inputs_does_not_matter() -> None:
    source, statistics = tiny_source(), tiny_statistics()
    assert statistics.square_sum is not None
    louder = InputStatistics(1, statistics.square_sum * 100)
    settings = [METHOD.check({"sparsity": 0.5})]
    masks = [
        METHOD.compress([source], s, settings)[0][0].mask for s in (statistics, louder)
    ]
    assert torch.equal(*masks)


def test_rows_and_columns_of_equal_size_give_wanda_and_magnitude() -> None:
    # Circulant sizes: every row and column adds up to the same.
    sizes = torch.stack([torch.arange(1.0, 33).roll(shift) for shift in range(32)])
    layer = Layer("q", (32, 32), "float32", block=0, role="q", input="x")
    source = Source(layer, Variant.dense(sizes))
    found = mask(METHOD, source, sparsity=0.4, per="row", power=1.0)
    assert torch.equal(found, mask(Wanda(), source, sparsity=0.4))
    found = mask(METHOD, source, sparsity=0.4, power=0.0)
    assert torch.equal(found, mask(Magnitude(), source, sparsity=0.4, per="layer"))


def test_a_faint_channel_does_not_die_out() -> None:
    source = tiny_source()
    faint = source.variant.weight.clone()
    faint[3] *= 0.01
    faint = Source(source.layer, Variant.dense(faint))
    assert not mask(Magnitude(), faint, sparsity=0.5, per="layer")[3].any()
    assert mask(METHOD, faint, sparsity=0.5)[3].any()


def test_rows_and_columns_of_zeros_have_no_importance() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 2.0]])
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.5, 1.5]])
    assert torch.equal(relative_importance(weight), expected)


def test_impossible_parameters_are_named() -> None:
    with pytest.raises(MethodError, match="from 0 to 2, found 3"):
        METHOD.check({"sparsity": 0.5, "power": 3.0})
    with pytest.raises(MethodError, match="row or layer, found 'head'"):
        METHOD.check({"sparsity": 0.5, "per": "head"})
