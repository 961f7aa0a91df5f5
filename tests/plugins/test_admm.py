from collections.abc import Mapping

import pytest
import torch
from autoprune_plugins.admm import Admm, register_methods
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.sparsegpt import SparseGpt
from autoprune_plugins.wanda import Wanda

from autoprune.compression.admm import keep_largest, scale_inputs
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.obs import best_on_support
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Value
from autoprune.testing import (
    MethodContract,
    output_error,
    tiny_source,
    tiny_statistics,
)

METHOD = Admm()
PRUNINGS = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}]


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"sparsity": 0.5},
            {"sparsity": 0.77, "damping": 0.01},
            {"pattern": "2:4"},
            {"pattern": "1:8"},
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
    assert [method.name for method in register_methods()] == ["admm"]


def test_scaled_inputs_have_unit_norm_and_leave_outputs_alone() -> None:
    hessian = tiny_statistics(16, dead=(3,)).hessian
    assert hessian is not None
    inputs = scale_inputs(hessian, damping=0.0, names=["q"])
    assert torch.equal(inputs.hessian.diagonal(), torch.ones(16))
    weight = tiny_source((4, 16), dtype=torch.float32).variant.weight
    entered = inputs.enter(weight)
    assert not entered[:, 3].any()
    before = ((weight @ hessian) * weight).sum(1)
    after = ((entered @ inputs.hessian) * entered).sum(1)
    torch.testing.assert_close(before, after)
    alive = weight.clone()
    alive[:, 3] = 0.0
    torch.testing.assert_close(inputs.leave(entered), alive)


def test_what_is_kept_falls_along_the_ramp() -> None:
    weight = torch.arange(1.0, 17).view(2, 8)
    settings = {"sparsity": 0.5, "pattern": None}
    counts = [
        int(keep_largest(weight, settings, part=part).sum()) for part in (0.0, 0.5, 1.0)
    ]
    assert counts == [16, 12, 8]
    settings = {"sparsity": None, "pattern": "1:4"}
    counts = [
        int(keep_largest(weight, settings, part=part).sum()) for part in (0.1, 0.5, 1.0)
    ]
    assert counts == [16, 8, 4]


@pytest.mark.parametrize("pattern", ["2:4", None])
def test_without_dependence_it_is_wanda(pattern: str | None) -> None:
    source = tiny_source(dtype=torch.float32)
    square_sum = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1
    statistics = InputStatistics(1, square_sum, torch.diag(square_sum))
    params: dict[str, Value] = {"pattern": pattern} if pattern else {"sparsity": 0.4}
    per: dict[str, Value] = {} if pattern else {"per": "layer"}
    # With damping, a weight that is out gains a little on those that are in.
    found = make(METHOD, source, statistics, **params, damping=0.0)
    expected = make(Wanda(), source, statistics, **params, **per)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.weight, expected.weight)


@pytest.mark.parametrize("params", PRUNINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_outputs_err_less_than_sparsegpts(params: dict[str, Value], seed: int) -> None:
    source, statistics = (
        tiny_source((24, 96), seed=seed),
        tiny_statistics(96, seed=seed),
    )
    errors = [
        output_error(
            source.variant, make(method, source, statistics, **params), statistics
        )
        for method in (METHOD, SparseGpt(), Wanda(), Magnitude())
    ]
    assert errors == sorted(errors)


def test_weights_are_near_the_best_on_their_mask() -> None:
    source = tiny_source((24, 96), dtype=torch.float32)
    statistics = tiny_statistics(96)
    variant = make(METHOD, source, statistics, sparsity=0.5)
    assert variant.mask is not None and statistics.hessian is not None
    best = best_on_support(
        source.variant.weight, variant.mask, statistics.hessian.double()
    )
    least = output_error(
        source.variant, source.variant.pruned(best, variant.mask), statistics
    )
    error = output_error(source.variant, variant, statistics)
    assert least <= error < 1.6 * least


@pytest.mark.parametrize("level", range(1, 10))
def test_kept_counts_are_exact(level: int) -> None:
    source, statistics = tiny_source((7, 50)), tiny_statistics(50)
    variant = make(METHOD, source, statistics, sparsity=level / 10)
    assert variant.storage.kept == 350 - round(level / 10 * 350)


def test_dead_inputs_go_first() -> None:
    statistics = tiny_statistics(dead=range(8))
    variant = make(METHOD, tiny_source(), statistics, sparsity=0.25)
    assert variant.mask is not None
    assert variant.mask.tolist() == [[False] * 8 + [True] * 24] * 8


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_singular_hessian_needs_no_repair(damping: float) -> None:
    # The pull between weights and pruned weights makes every problem regular.
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
    with pytest.raises(MethodError, match="admm takes either sparsity or pattern"):
        METHOD.check({})
    with pytest.raises(MethodError, match="from 0 to 1, found 2"):
        METHOD.check({"sparsity": 0.5, "damping": 2.0})
