from collections.abc import Mapping

import pytest
import torch
from autoprune_plugins.admm import Admm
from autoprune_plugins.alps import Alps, register_methods
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.sparsegpt import SparseGpt
from autoprune_plugins.wanda import Wanda

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.obs import best_on_support
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

METHOD = Alps()
PRUNINGS = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}]


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"sparsity": 0.5},
            {"sparsity": 0.77, "damping": 0.1},
            {"pattern": "2:4"},
            {"pattern": "1:4"},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> Mapping[str, Value]:
        params: Mapping[str, Value] = request.param
        return params


def make(
    method: CompressionMethod,
    source: Source,
    statistics: InputStatistics,
    **params: Value,
) -> Variant:
    return method.compress([source], statistics, [method.check(params)])[0][0]


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["alps"]


def test_a_pair_worked_by_hand() -> None:
    # Of inputs that are nearly the same, the one of the larger weight stays and takes
    # over h_12 / h_22 of the other.
    layer = Layer("q", (2, 2), "float32", block=0, role="q", input="x")
    source = Source(layer, Variant.dense(torch.tensor([[1.0, 4.0], [5.0, 2.0]])))
    statistics = InputStatistics(4, None, torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    variant = make(METHOD, source, statistics, pattern="1:2", damping=0.0)
    expected = torch.tensor([[0.0, 4.9], [6.8, 0.0]])
    torch.testing.assert_close(variant.weight, expected)


@pytest.mark.parametrize("pattern", ["2:4", None])
def test_without_dependence_it_is_nearly_wanda(pattern: str | None) -> None:
    source = tiny_source(dtype=torch.float32)
    square_sum = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1
    statistics = InputStatistics(1, square_sum, torch.diag(square_sum))
    params: dict[str, Value] = {"pattern": pattern} if pattern else {"sparsity": 0.4}
    per: dict[str, Value] = {} if pattern else {"per": "layer"}
    found = make(METHOD, source, statistics, **params, damping=0.0)
    best = make(Wanda(), source, statistics, **params, **per)
    # Wanda's mask is the best there is. A loose coupling first lets weights that are
    # out push in, and the mask that stands in the end is a little off.
    errors = [output_error(source.variant, v, statistics) for v in (best, found)]
    assert errors[0] <= errors[1] < 1.05 * errors[0]
    assert found.mask is not None
    torch.testing.assert_close(found.weight, source.variant.weight * found.mask)


@pytest.mark.parametrize("params", PRUNINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_err_least(params: dict[str, Value], seed: int) -> None:
    source, statistics = (
        tiny_source((24, 96), seed=seed),
        tiny_statistics(96, seed=seed),
    )
    methods = (METHOD, Admm(), SparseGpt(), Wanda(), Magnitude())
    errors = [
        output_error(
            source.variant, make(method, source, statistics, **params), statistics
        )
        for method in methods
    ]
    assert errors == sorted(errors) and errors[0] < 0.7 * errors[2]


def test_weights_are_the_best_on_their_mask() -> None:
    source = tiny_source((24, 96), dtype=torch.float32)
    statistics = tiny_statistics(96)
    variant = make(METHOD, source, statistics, sparsity=0.5)
    hessian = statistics.hessian
    assert variant.mask is not None and hessian is not None
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(96)
    best = best_on_support(source.variant.weight, variant.mask, damped)
    least = output_error(
        source.variant, source.variant.pruned(best, variant.mask), statistics
    )
    assert output_error(source.variant, variant, statistics) < 1.05 * least


@pytest.mark.parametrize("level", range(1, 10))
def test_kept_counts_are_exact(level: int) -> None:
    source, statistics = tiny_source((7, 50)), tiny_statistics(50)
    variant = make(METHOD, source, statistics, sparsity=level / 10)
    assert variant.storage.kept == 350 - round(level / 10 * 350)


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "4:8"])
def test_patterns_hold_in_every_group(pattern: str) -> None:
    keep, of = (int(number) for number in pattern.split(":"))
    variant = make(METHOD, tiny_source((9, 48)), tiny_statistics(48), pattern=pattern)
    assert variant.mask is not None
    assert (variant.mask.view(-1, of).sum(1) == keep).all()


def test_dead_inputs_go_first() -> None:
    statistics = tiny_statistics(dead=range(8))
    variant = make(METHOD, tiny_source(), statistics, sparsity=0.25)
    assert variant.mask is not None
    assert variant.mask.tolist() == [[False] * 8 + [True] * 24] * 8


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_hessian_needs_no_repair(damping: float) -> None:
    # Eigenvalues of zero meet a penalty above zero in every division.
    statistics = InputStatistics(1, None, torch.ones(32, 32))
    variant = make(METHOD, tiny_source(), statistics, sparsity=0.5, damping=damping)
    assert torch.isfinite(variant.weight).all() and variant.storage.kept == 128


def test_few_tokens_are_enough() -> None:
    statistics = tiny_statistics(48, tokens=8)
    variant = make(METHOD, tiny_source((8, 48)), statistics, sparsity=0.5)
    assert torch.isfinite(variant.weight).all()


def test_inputs_that_are_all_zero_are_an_error() -> None:
    statistics = InputStatistics(5, None, torch.zeros(32, 32))
    with pytest.raises(MethodError, match="inputs of layers.0.q_proj were zero"):
        make(METHOD, tiny_source(), statistics, sparsity=0.5)


def test_impossible_parameters_are_named() -> None:
    with pytest.raises(MethodError, match="alps takes either sparsity or pattern"):
        METHOD.check({})
