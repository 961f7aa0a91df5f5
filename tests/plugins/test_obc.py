from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from autoprune_plugins.gptq import Gptq
from autoprune_plugins.obc import MOST_COLUMNS, Obc, register_methods
from autoprune_plugins.obd import Obd
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.sparsegpt import SparseGpt
from autoprune_plugins.wanda import Wanda
from torch import Tensor

from autoprune.compression.factor import factorise
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.obs import Rows, best_on_support, inverse_and_hessian
from autoprune.compression.storage import Storage
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

METHOD = Obc()
PRUNINGS = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}]


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"sparsity": 0.5},
            {"sparsity": 0.29, "per": "row", "damping": 0.1},
            {"pattern": "2:4"},
            {"pattern": "1:4", "bits": 4, "group": 16},
            {"sparsity": 0.5, "bits": 4},
            {"bits": 3, "group": 16, "symmetric": True},
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


def settle_in_order(
    weight: Tensor, statistics: InputStatistics, targets: Tensor | None = None
) -> tuple[Rows, Tensor]:
    """Settle columns from first to last, at given values or where they are."""
    assert statistics.hessian is not None
    factor = factorise(statistics.hessian, damping=0.01, act_order=False, names=["q"])
    inverse, hessian = inverse_and_hessian(factor)
    rows = Rows(weight, inverse)
    for column in range(weight.shape[1]):
        at = torch.full((len(weight),), column)
        value = rows.weights[:, column]
        if targets is not None:
            value = torch.where(targets[:, column] == 0, 0.0, value)
        rows.settle(at, value.clone())
    return rows, hessian


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["obc"]


def test_a_pattern_worked_by_hand() -> None:
    # As in SparseGPT's test, inputs 1 and 2 are almost the same; here either of a pair
    # takes over for the other, whichever of the two is cheaper to lose.
    weight = torch.tensor([[1.0, 4.0, 3.0, 5.0], [2.0, 3.0, 9.0, 1.0]])
    pair = torch.tensor([[1.0, 1.0], [1.0, 1.01]])
    layer = Layer("q", (2, 4), "float32", block=0, role="q", input="x")
    source = Source(layer, Variant.dense(weight))
    statistics = InputStatistics(4, None, torch.block_diag(pair, pair))
    variant = make(METHOD, source, statistics, pattern="1:2", damping=0.0)
    # Losing the first leaves w_2 + w_1 / 1.01, losing the second w_1 + w_2.
    expected = torch.tensor([[0.0, 4 + 1 / 1.01, 0.0, 5 + 3 / 1.01]])
    torch.testing.assert_close(variant.weight[:1], expected, rtol=1e-4, atol=0)
    expected = torch.tensor([[0.0, 3 + 2 / 1.01, 10.0, 0.0]])
    torch.testing.assert_close(variant.weight[1:], expected, rtol=1e-4, atol=0)


def test_sparsegpt_is_its_update_in_the_order_of_the_columns() -> None:
    source = tiny_source((16, 48), dtype=torch.float32)
    statistics = tiny_statistics(48)
    swept = make(SparseGpt(), source, statistics, pattern="2:4")
    assert swept.mask is not None
    rows, _ = settle_in_order(source.variant.weight, statistics, swept.mask.float())
    torch.testing.assert_close(rows.weights.float(), swept.weight, rtol=1e-3, atol=1e-4)


def test_gptq_is_its_update_in_the_order_of_the_columns() -> None:
    source = tiny_source((16, 48), dtype=torch.float32)
    statistics = tiny_statistics(48)
    swept = make(Gptq(), source, statistics, bits=4, act_order=False)
    assert swept.scales is not None and swept.zeros is not None
    factor = factorise(statistics.hessian, damping=0.01, act_order=False, names=["q"])
    rows = Rows(source.variant.weight, inverse_and_hessian(factor)[0])
    scale, zero = swept.scales[:, 0].double(), swept.zeros[:, 0].double()
    for column in range(48):
        steps = (rows.weights[:, column] / scale).round().clamp(-zero, 15 - zero)
        rows.settle(torch.full((16,), column), steps * scale)
    differ = (rows.weights.float() - swept.weight).abs() > 1e-4
    # In float32 a weight may lie on the other side of a border, and its row with it.
    assert differ.any(1).sum() <= 1


@pytest.mark.parametrize("params", PRUNINGS, ids=str)
def test_no_mask_of_sparsegpt_is_left_better(params: dict[str, Value]) -> None:
    source = tiny_source((16, 64), dtype=torch.float32)
    statistics = tiny_statistics(64)
    swept = make(SparseGpt(), source, statistics, **params)
    assert swept.mask is not None and statistics.hessian is not None
    weight = source.variant.weight
    best = best_on_support(weight, swept.mask, statistics.hessian.double())
    on_mask = source.variant.pruned(best, swept.mask, pattern=params.get("pattern"))
    errors = [output_error(source.variant, v, statistics) for v in (on_mask, swept)]
    assert errors[0] <= errors[1]


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
        for method in (METHOD, SparseGpt(), Wanda())
    ]
    assert errors == sorted(errors) and errors[0] < 0.8 * errors[1]


def test_rows_of_a_layer_that_may_differ_err_less() -> None:
    source, statistics = tiny_source((24, 64)), tiny_statistics(64)
    loud = source.variant.weight * torch.linspace(0.2, 2, 24)[:, None].bfloat16()
    source = replace(source, variant=Variant.dense(loud))
    layer, row = (
        make(METHOD, source, statistics, sparsity=0.5, per=per)
        for per in ("layer", "row")
    )
    assert layer.storage.kept == row.storage.kept == 768
    assert layer.mask is not None and row.mask is not None
    assert set(row.mask.sum(1).tolist()) == {32}
    counts = layer.mask.sum(1)
    assert counts[:8].sum() < counts[-8:].sum()
    errors = [output_error(source.variant, v, statistics) for v in (layer, row)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("per", ["row", "layer"])
def test_without_dependence_it_is_obd(per: str) -> None:
    source = tiny_source(dtype=torch.float32)
    square_sum = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1
    statistics = InputStatistics(1, square_sum, torch.diag(square_sum))
    params: dict[str, Value] = {"sparsity": 0.4, "per": per}
    found = make(METHOD, source, statistics, **params, damping=0.0)
    expected = make(Obd(), source, statistics, **params)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.weight, expected.weight)


@pytest.mark.parametrize("level", range(1, 10))
def test_kept_counts_are_exact(level: int) -> None:
    source, statistics = tiny_source((7, 50)), tiny_statistics(50)
    variant = make(METHOD, source, statistics, sparsity=level / 10)
    assert variant.storage.kept == 350 - round(level / 10 * 350)


def test_one_run_serves_all_levels() -> None:
    source, statistics = tiny_source((8, 48)), tiny_statistics(48)
    levels: list[dict[str, Value]] = [
        {"sparsity": 0.3},
        {"sparsity": 0.6, "per": "row"},
        {"pattern": "2:4"},
        {"sparsity": 0.8, "damping": 0.1},
    ]
    settings = [METHOD.check(params) for params in levels]
    made = METHOD.compress([source], statistics, settings)[0]
    for params, variant in zip(levels, made, strict=True):
        assert torch.equal(
            variant.weight, make(METHOD, source, statistics, **params).weight
        )


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_the_survivors_beats_rounding_them_to_nearest(bits: int) -> None:
    source, statistics = tiny_source((24, 96)), tiny_statistics(96)
    both = make(METHOD, source, statistics, sparsity=0.5, bits=bits, group=32)
    pruned = replace(source, variant=make(METHOD, source, statistics, sparsity=0.5))
    then = make(RoundToNearest(), pruned, statistics, bits=bits, group=32)
    errors = [output_error(source.variant, v, statistics) for v in (both, then)]
    assert errors[0] < 0.95 * errors[1]
    assert torch.equal(both.mask, then.mask)


def test_bits_alone_beat_rounding_to_nearest() -> None:
    source, statistics = tiny_source((24, 96)), tiny_statistics(96)
    obq, nearest = (
        output_error(
            source.variant, make(method, source, statistics, bits=3), statistics
        )
        for method in (METHOD, RoundToNearest())
    )
    swept = make(Gptq(), source, statistics, bits=3, act_order=False)
    # The greedy order is worth about as much as any other order without regard to size.
    assert obq < 0.7 * nearest
    assert obq < 1.2 * output_error(source.variant, swept, statistics)


def test_bits_alone_keep_an_earlier_mask() -> None:
    source, statistics = tiny_source((24, 96)), tiny_statistics(96)
    pruned = replace(source, variant=make(Wanda(), source, statistics, sparsity=0.5))
    assert (
        METHOD.refuses(source.layer, pruned.variant.storage, METHOD.check({"bits": 3}))
        is None
    )
    variant = make(METHOD, pruned, statistics, bits=3)
    assert torch.equal(variant.mask, pruned.variant.mask)
    assert not variant.weight[~variant.mask].any()


def test_dead_inputs_go_first() -> None:
    statistics = tiny_statistics(dead=range(8))
    variant = make(METHOD, tiny_source(), statistics, sparsity=0.25, per="row")
    assert variant.mask is not None
    assert variant.mask.tolist() == [[False] * 8 + [True] * 24] * 8


def test_a_singular_hessian_is_damped_until_it_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hessian = torch.ones(32, 32)  # all inputs are the same one
    statistics = InputStatistics(1, None, hessian)
    source = tiny_source()
    variant = make(METHOD, source, statistics, sparsity=0.5, damping=0.0)
    assert torch.isfinite(variant.weight).all()
    assert (
        "damping raised from 0 to 0.01: the Hessian of layers.0.q_proj" in caplog.text
    )
    assert variant.storage.kept == 128


def test_few_tokens_are_enough_with_damping() -> None:
    statistics = tiny_statistics(48, tokens=8)
    variant = make(METHOD, tiny_source((8, 48)), statistics, sparsity=0.5, bits=4)
    assert torch.isfinite(variant.weight).all()


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({}, "obc takes either sparsity or pattern, found neither"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "found 0.5 and 2:4"),
        ({"sparsity": 0.5, "pattern": "2:4", "bits": 4}, "found 0.5 and 2:4"),
        (
            {"sparsity": 0.5, "per": "head"},
            "per=.* unknown word 'head'. Known: layer, row",
        ),
        ({"sparsity": 0.5, "group": 64}, r"obc\(group=64\) has no effect without bits"),
    ],
    ids=str,
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        METHOD.check(params)


@pytest.mark.parametrize(
    ("columns", "params", "reason"),
    [
        (MOST_COLUMNS, {"sparsity": 0.5}, None),
        (2048, {"sparsity": 0.5}, "its 2048 inputs are more than the 1536"),
        (30, {"pattern": "2:4"}, "4 of 2:4 does not divide its 30 inputs"),
        (32, {"bits": 4, "group": 24}, "group 24 does not divide its 32"),
    ],
    ids=str,
)
def test_layers_are_refused_with_a_reason(
    columns: int, params: dict[str, Value], reason: str | None
) -> None:
    layer = replace(tiny_source().layer, shape=(8, columns))
    found = METHOD.refuses(layer, Storage.dense(layer), METHOD.check(params))
    assert (found or "").startswith(reason or "") and bool(found) == bool(reason)
