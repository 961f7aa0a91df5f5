from collections.abc import Mapping
from dataclasses import replace
from math import inf

import pytest
import torch
from autoprune_plugins.jsq import (
    EXTREMES,
    WINDOW,
    Jsq,
    clipped,
    clipping_level,
    register_methods,
    sensitivity,
)
from autoprune_plugins.smoothquant import SmoothQuant
from autoprune_plugins.wanda import Wanda

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value
from autoprune.testing import MethodContract, tiny_source, tiny_statistics

METHOD = Jsq()
PLAIN: dict[str, Value] = {"rho": 0.0, "clip": 0.0}


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"sparsity": 0.5},
            {"pattern": "2:4"},
            {"sparsity": 0.7, "rho": 0, "clip": 0.1, "alpha": 0.8},
            {"pattern": "4:8", "bits": 4, "group": 16},
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


def statistics_of(rows: torch.Tensor) -> InputStatistics:
    return InputStatistics(
        len(rows),
        rows.square().sum(0),
        abs_max=rows.abs().amax(0),
        input_rows=rows,
    )


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["jsq"]


def test_sensitivity_by_hand() -> None:
    """One output ``2 x_0 - x_1`` over three tokens: 2, -1, 1."""
    weight, rows = torch.tensor([[2.0, -1]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    # Without the first weight: 0, -1, -1. Without the second: 2, 0, 2.
    assert sensitivity(weight, rows).tolist() == [[1.0, 2.0]]


def test_sensitivity_agrees_with_its_definition(rng: torch.Generator) -> None:
    """Every weight is taken out by itself, over no more tokens than are looked at."""
    weight = torch.randn(3, 5, generator=rng)
    rows = torch.randn(EXTREMES, 5, generator=rng)
    for row in range(3):
        for column in range(5):
            without = weight.clone()
            without[row, column] = 0
            outputs = rows @ without[row]
            found = sensitivity(weight, rows)[row, column]
            torch.testing.assert_close(found, outputs.max() - outputs.min())


def test_few_extremes_stand_for_many_tokens(rng: torch.Generator) -> None:
    weight = torch.randn(8, 64, generator=rng)
    rows = torch.randn(400, 64, generator=rng) * (1 + torch.arange(64) / 8)
    without = (rows @ weight.t())[:, :, None] - rows[:, None] * weight
    exact = without.amax(0) - without.amin(0)
    found = sensitivity(weight, rows)
    assert (found <= exact + 1e-3).all()  # the ends of a part of the tokens
    same = (found - exact).abs() < 1e-3
    assert same.double().mean() > 0.97 and (found > 0.9 * exact).all()


def test_clipping_by_hand() -> None:
    rows = torch.tensor([[1.0, -8.0], [2.0, 4.0]])
    assert clipping_level(rows, 0.25) == 8.0  # one of four reaches it
    assert clipping_level(rows, 0.5) == 4.0
    assert clipping_level(rows, 0.0) == clipping_level(rows, 0.1) == inf
    found = clipped([tiny_source((4, 2))], statistics_of(rows), 0.5)
    assert found.rows.tolist() == [[1.0, -4.0], [2.0, 4.0]]
    assert found.largest.tolist() == [2.0, 4.0]
    window = (WINDOW / 2) ** 0.5
    torch.testing.assert_close(found.norm, torch.tensor([5.0, 32.0]).sqrt() * window)


def test_norms_come_from_all_tokens_and_not_from_the_sample() -> None:
    known = statistics_of(torch.ones(4, 32))
    more = replace(known, tokens=16, square_sum=torch.full((32,), 64.0))
    found = clipped([tiny_source()], more, 0.0)
    torch.testing.assert_close(found.norm, torch.full((32,), 2.0 * WINDOW**0.5))


@pytest.mark.parametrize("params", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_without_sensitivity_and_clipping_it_is_wanda_then_smoothquant(
    params: dict[str, Value],
) -> None:
    source, known = tiny_source(), tiny_statistics()
    wanda, smooth = Wanda(), SmoothQuant()
    pruned = wanda.compress([source], known, [wanda.check(params)])[0][0]
    then = Source(source.layer, pruned)
    expected = smooth.compress([then], known, [smooth.check({})])[0][0]
    found = make(source, **PLAIN, **params)
    assert found.mask is not None and pruned.mask is not None
    assert torch.equal(found.mask, pruned.mask)
    assert torch.equal(found.weight, expected.weight)
    assert found.storage == expected.storage


def test_a_weight_that_holds_an_outlier_back_is_kept() -> None:
    """Both weights are equal to Wanda; without one of them the output would be wide."""
    layer = Layer("q", (1, 4), "float32", block=0, role="q", input="x")
    weight = torch.tensor([[1.0, 1.0, 0.3, 0.3]])
    source = Source(layer, Variant.dense(weight))
    # The first two inputs cancel: with one gone, outputs go from -9 to 9.
    rows = torch.tensor([[9.0, -9, 20, 1], [-9, 9, 20, 1]])
    known = statistics_of(rows)
    plain = make(source, known, **PLAIN, sparsity=0.5)
    assert plain.mask is not None and plain.mask.tolist() == [
        [True, True, False, False]
    ]
    scaled = statistics_of(rows * torch.tensor([1.0, 1, 10, 1]))
    plain = make(source, scaled, **PLAIN, sparsity=0.75)
    assert plain.mask is not None and plain.mask.tolist() == [
        [False, False, True, False]
    ]
    # Norms over a window are 32 times those of two tokens and a half.
    held = make(source, scaled, rho=1000, clip=0.0, sparsity=0.75)
    assert held.mask is not None and held.mask.tolist() == [[False, True, False, False]]


def test_rho_does_not_depend_on_how_much_text_there_is() -> None:
    source, known = tiny_source(), tiny_statistics()
    assert known.square_sum is not None and known.input_rows is not None
    twice = replace(
        known,
        tokens=2 * known.tokens,
        square_sum=2 * known.square_sum,
        input_rows=known.input_rows.repeat(2, 1),
    )
    # Every token twice is looked at half as far, which is far enough here.
    one, other = make(source, known, sparsity=0.5), make(source, twice, sparsity=0.5)
    assert one.mask is not None and other.mask is not None
    assert (one.mask == other.mask).double().mean() > 0.98


def test_an_expert_that_no_token_reached_is_pruned_by_position() -> None:
    nothing = InputStatistics(
        0, torch.zeros(32), abs_max=torch.zeros(32), input_rows=torch.zeros(0, 32)
    )
    weight = make(tiny_source(), nothing, sparsity=0.5).weight
    assert weight.isfinite().all() and int((weight != 0).sum()) <= 8 * 16


def test_a_byte_a_kept_weight_is_stored() -> None:
    storage = make(tiny_source((8, 32)), pattern="2:4").storage
    codes, mask, scales, inputs = 8 * 16, 8 * 16 * 2 // 8, 2 * 8, 2 * 32
    assert storage.nbytes == codes + mask + scales + inputs


def test_what_it_refuses() -> None:
    layer = tiny_source().layer
    dense, settings = Storage.dense(layer), METHOD.check({"sparsity": 0.5})
    pruned = METHOD.storage(layer, dense, settings)
    assert "already quantized to 8 bits" in str(METHOD.refuses(layer, pruned, settings))
    group = METHOD.check({"sparsity": 0.5, "group": 5})
    assert (
        METHOD.refuses(layer, dense, group) == "group 5 does not divide its 32 inputs"
    )
    everything = METHOD.check({"sparsity": 0.99})
    assert "nothing is left to quantize" in str(
        METHOD.refuses(layer, dense, everything)
    )


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({}, "jsq takes either sparsity or pattern, found neither"),
        ({"sparsity": 0.5, "rho": -1}, r"jsq\(rho=...\) lies from 0 to 1000, found -1"),
        ({"sparsity": 0.5, "clip": 0.9}, r"lies from 0 to 0.5, found 0.9"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        METHOD.check(params)


def test_a_sample_that_is_missing_is_named() -> None:
    known = replace(tiny_statistics(), input_rows=None)
    with pytest.raises(
        MethodError, match="the sample of tokens of the inputs of layer"
    ):
        make(tiny_source(), known, sparsity=0.5)
