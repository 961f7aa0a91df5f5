from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from autoprune_plugins.awq import RATIOS, Awq, register_methods, scales_of
from autoprune_plugins.rtn import RoundToNearest

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import Gathering, InputStatistics
from autoprune.policy import Layer, Value
from autoprune.testing import (
    MethodContract,
    output_error,
    tiny_source,
    tiny_statistics,
)

METHOD = Awq()


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"bits": 4},
            {"bits": 3, "group": 16},
            {"bits": 2, "group": 8, "symmetric": True, "clip": False},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> Mapping[str, Value]:
        params: Mapping[str, Value] = request.param
        return params


def source_of(role: str = "down_proj", dtype: torch.dtype = torch.bfloat16) -> Source:
    source = tiny_source((16, 64), dtype=dtype)
    return Source(replace(source.layer, role=role), source.variant)


def outliers() -> InputStatistics:
    """Inputs of which a few are far larger, as in language models."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(512, 64, generator=generator)
    inputs[:, ::16] *= 30
    gathering = Gathering(METHOD.needs, 64)
    gathering.add(inputs)
    return gathering.result()


def make(
    method: CompressionMethod,
    source: Source,
    statistics: InputStatistics,
    **params: Value,
) -> Variant:
    return method.compress([source], statistics, [method.check(params)])[0][0]


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["awq"]


def test_there_are_twenty_ratios_from_zero() -> None:
    assert (len(RATIOS), RATIOS[0]) == (20, 0.0)
    assert RATIOS[-1] == pytest.approx(0.95)


def test_scales_worked_by_hand() -> None:
    found = scales_of(torch.tensor([1.0, 16.0, 4.0]), 0.5)
    assert found.tolist() == [0.5, 2.0, 1.0]
    assert scales_of(torch.tensor([1.0, 16.0, 4.0]), 0.0).tolist() == [1.0, 1.0, 1.0]
    assert scales_of(torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]
    assert scales_of(torch.tensor([0.0, 5.0]), 0.95).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("role", ["down_proj", "q_proj"])
def test_it_is_never_worse_than_rounding(
    bits: int, group: int | None, symmetric: bool, role: str
) -> None:
    grid: dict[str, Value] = {"bits": bits, "symmetric": symmetric}
    if group:
        grid["group"] = group
    for statistics in (tiny_statistics(64), outliers()):
        source = source_of(role)
        dense = source.variant
        ours = make(METHOD, source, statistics, **grid)
        unclipped = make(METHOD, source, statistics, **grid, clip=False)
        plain = make(RoundToNearest(), source, statistics, **grid)
        errors = [
            output_error(dense, variant, statistics)
            for variant in (ours, unclipped, plain)
        ]
        slack = 1 + 1e-4  # sums in float32 choose, sums in float64 judge
        assert errors[0] <= errors[1] * slack <= errors[2] * slack**2


def test_large_inputs_get_finer_weights() -> None:
    statistics, source = outliers(), source_of()
    ours = make(METHOD, source, statistics, bits=3, group=16)
    plain = make(RoundToNearest(), source, statistics, bits=3, group=16)
    dense = source.variant
    error = output_error(dense, ours, statistics)
    assert error < 0.7 * output_error(dense, plain, statistics)
    assert ours.channel_scales is not None
    assert ours.channel_scales[::16].min() > ours.channel_scales[1::16].max()


def test_equal_inputs_leave_rounding_as_it_is() -> None:
    statistics = InputStatistics(64, hessian=torch.eye(64), abs_sum=torch.ones(64))
    source = source_of()
    ours = make(METHOD, source, statistics, bits=3, group=16, clip=False)
    plain = make(RoundToNearest(), source, statistics, bits=3, group=16)
    assert torch.equal(ours.weight, plain.weight)
    assert ours.channel_scales is not None and (ours.channel_scales == 1).all()


def test_queries_and_keys_are_not_clipped() -> None:
    statistics = tiny_statistics(64)
    weights = {
        (role, clip): make(
            METHOD, source_of(role), statistics, bits=2, group=16, clip=clip
        ).weight
        for role in ("down_proj", "q_proj")
        for clip in (False, True)
    }
    assert torch.equal(weights["q_proj", True], weights["q_proj", False])
    assert not torch.equal(weights["down_proj", True], weights["down_proj", False])


def test_scales_of_inputs_are_stored_and_counted() -> None:
    source, statistics = source_of(), tiny_statistics(64)
    ours = make(METHOD, source, statistics, bits=4, group=16)
    plain = make(RoundToNearest(), source, statistics, bits=4, group=16)
    assert ours.storage.nbytes == plain.storage.nbytes + 2 * 64


def test_pruned_weights_stay_zeros() -> None:
    source, statistics = source_of(), outliers()
    kept = torch.arange(64).remainder(4).lt(2).expand(16, 64).contiguous()
    pruned = source.variant.pruned(source.variant.weight, kept, pattern="2:4")
    ours = make(METHOD, Source(source.layer, pruned), statistics, bits=3, group=16)
    assert ours.storage.mask == "2:4"
    assert not ours.weight[~kept].any()


def test_the_mean_size_of_inputs_is_gathered(rng: torch.Generator) -> None:
    gathering = Gathering({"input_abs_mean"}, 4)
    batches = [torch.randn(n, 4, generator=rng) for n in (3, 0, 5)]
    for batch in batches:
        gathering.add(batch)
    found = gathering.result()
    assert found.abs_sum is not None and found.abs_max is None
    torch.testing.assert_close(found.abs_sum, torch.cat(batches).abs().sum(0))


def test_a_statistic_that_is_missing_is_named() -> None:
    statistics = InputStatistics(8, hessian=torch.eye(64))
    with pytest.raises(MethodError, match="the sum of sizes of the inputs of layers.0"):
        make(METHOD, source_of(), statistics, bits=4)


def test_layers_without_inputs_are_refused() -> None:
    layer = Layer("embed", (8, 32), "bfloat16", block=None, role="embed", input=None)
    storage = source_of().variant.storage
    reason = METHOD.refuses(layer, storage, METHOD.check({"bits": 4}))
    assert reason is not None and "no inputs" in reason
