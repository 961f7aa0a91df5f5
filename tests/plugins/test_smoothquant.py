from collections.abc import Mapping

import pytest
import torch
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.smoothquant import SmoothQuant, register_methods, smoothing

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import Gathering, InputStatistics
from autoprune.policy import Value
from autoprune.testing import MethodContract, tiny_source, tiny_statistics

METHOD = SmoothQuant()


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {},
            {"alpha": 0.85},
            {"alpha": 1, "bits": 4, "group": 16, "symmetric": False},
            {"alpha": 0.0, "bits": 2},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> Mapping[str, Value]:
        params: Mapping[str, Value] = request.param
        return params


def make(
    source: Source, statistics: InputStatistics | None = None, **params: Value
) -> Variant:
    statistics = statistics or tiny_statistics()
    return METHOD.compress([source], statistics, [METHOD.check(params)])[0][0]


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["smoothquant"]


def test_equation_four_worked_by_hand() -> None:
    inputs, weights = torch.tensor([16.0, 1.0, 0.0, 9.0]), torch.tensor([4.0, 4, 2, 0])
    assert smoothing(inputs, weights, 0.5).tolist() == [2.0, 0.5, 1.0, 1.0]
    assert smoothing(inputs, weights, 1.0).tolist() == [16.0, 1.0, 1.0, 1.0]
    assert smoothing(inputs, weights, 0.0).tolist() == [0.25, 0.25, 1.0, 1.0]


def test_half_makes_inputs_and_weights_equally_hard() -> None:
    """With alpha 0.5, ``max|x_j| / s_j`` is ``max|w_j| s_j`` (Sec. 4)."""
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.rand(2, 20, generator=generator) + 0.01
    scales = smoothing(inputs, weights, 0.5)
    torch.testing.assert_close(inputs / scales, weights * scales)


def test_runtime_and_stored_weight_agree() -> None:
    """Codes times inputs over ``s`` are what the stored weight gives, in float32."""
    source = tiny_source(dtype=torch.float32)
    variant = make(source)
    assert variant.channel_scales is not None and variant.codes is not None
    assert variant.scales is not None
    inputs = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    folded = (variant.codes.float() - 128) * variant.scales
    at_run_time = (inputs / variant.channel_scales) @ folded.t()
    torch.testing.assert_close(at_run_time, inputs @ variant.weight.t())


def test_powers_of_two_cost_a_uniform_row_nothing() -> None:
    """Where all scales are equal, codes are those of plain rounding."""
    source = tiny_source(dtype=torch.float32)
    size = source.variant.weight.abs().amax(0)
    statistics = InputStatistics(8, abs_max=16 / size)
    ours = make(source, statistics, alpha=0.5)  # s = 4 / size: weights become +-4
    assert ours.channel_scales is not None
    scaled = source.variant.weight * ours.channel_scales
    torch.testing.assert_close(scaled.abs().amax(0), torch.full((32,), 4.0))
    plain = RoundToNearest()
    settings = plain.check({"bits": 8, "symmetric": True})
    rounded = plain.compress(
        [Source(source.layer, Variant.dense(scaled))], statistics, [settings]
    )[0][0]
    assert ours.codes is not None and rounded.codes is not None
    assert torch.equal(ours.codes, rounded.codes)


def test_eight_bits_cost_little() -> None:
    source = tiny_source((8, 32), dtype=torch.float32)
    off = make(source).weight - source.variant.weight
    assert float(off.norm() / source.variant.weight.norm()) < 0.02


def test_a_row_and_its_inputs_are_counted() -> None:
    storage = make(tiny_source((8, 32))).storage
    assert storage.nbytes == 8 * 32 + 2 * 8 + 2 * 32


def test_columns_without_weights_stay_zeros() -> None:
    source = tiny_source()
    kept = torch.ones(8, 32, dtype=torch.bool)
    kept[:, 3] = False
    pruned = source.variant.pruned(source.variant.weight, kept)
    weight = make(Source(source.layer, pruned)).weight
    assert weight.isfinite().all() and not weight[:, 3].any()


def test_the_largest_size_of_inputs_is_gathered(rng: torch.Generator) -> None:
    gathering = Gathering({"input_max"}, 4)
    batches = [torch.randn(n, 4, generator=rng) for n in (3, 0, 5)]
    for batch in batches:
        gathering.add(batch)
    found = gathering.result()
    assert found.abs_max is not None and found.abs_sum is None
    assert torch.equal(found.abs_max, torch.cat(batches).abs().amax(0))


def test_a_statistic_that_is_missing_is_named() -> None:
    with pytest.raises(MethodError, match="the largest size of the inputs of layers.0"):
        make(tiny_source(), InputStatistics(8))
