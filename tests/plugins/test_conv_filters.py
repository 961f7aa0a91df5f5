"""Filters go by their norms, by the norm behind them, or by what the loss says."""

from dataclasses import replace

import pytest
import torch
from autoprune_plugins.conv_filters import Filters, StreamFilters, TaylorFilters
from torch import Tensor

from autoprune.compression.method import Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.gradients import LayerGradients
from autoprune.models.structures import STREAM
from autoprune.policy import Layer
from autoprune.sites import Cut


def source_of(name: str, axis: str, weight: Tensor, *, unit: int = 1) -> Source:
    rows, columns = weight.shape
    units = (rows if axis == "rows" else columns) // unit
    cut = Cut("channels", axis, unit, units)
    norm = "norm" if axis == "rows" else None
    layer = Layer(
        name, (rows, columns), "float32", 0, name, name, cut=cut, norm=norm, kernel=unit
    )
    return Source(layer, Variant.dense(weight))


@pytest.fixture
def site() -> list[Source]:
    """Three filters, read by a layer with kernels of two places."""
    maker = torch.tensor([[3.0, -1.0], [2.0, 2.5], [0.0, -4.2]])
    taker = torch.arange(12.0).view(2, 6)
    made = source_of("maker", "rows", maker)
    made = replace(made, norm_scale=torch.tensor([0.5, -2.0, 1.0]))
    return [made, source_of("taker", "columns", taker, unit=2)]


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("l1", [4.0, 4.5, 4.2]),
        ("l2", [10**0.5, 10.25**0.5, 4.2]),
        ("norm_scale", [0.5, 2.0, 1.0]),
    ],
)
def test_scores_by_hand(site: list[Source], score: str, expected: list[float]) -> None:
    method = Filters()
    settings = method.check({"keep": 0.67, "score": score})
    found = method.scores(site, {}, settings)
    assert found.tolist() == pytest.approx(expected)


def test_a_filter_goes_with_the_columns_that_read_it(site: list[Source]) -> None:
    method = Filters()
    settings = method.check({"keep": 0.67})
    (maker,), (taker,) = method.compress_site(site, {}, [settings])
    assert maker.weight.tolist() == [[0.0, 0.0], [2.0, 2.5], [0.0, pytest.approx(-4.2)]]
    assert taker.weight.tolist() == [[0, 0, 2, 3, 4, 5], [0, 0, 8, 9, 10, 11]]
    for source, variant in zip(site, (maker, taker), strict=True):
        dense = Storage.dense(source.layer)
        assert variant.storage == method.storage(source.layer, dense, settings)
        assert variant.storage.units == 2


def test_a_taylor_score_is_of_the_whole_filter(site: list[Source]) -> None:
    gradient = torch.tensor([[1.0, 3.0], [1.0, 0.0], [7.0, 0.5]])
    maker = replace(site[0], gradient=LayerGradients(1, gradient))
    taker = replace(site[1], gradient=LayerGradients(1, torch.ones(2, 6)))
    found = TaylorFilters().scores([maker, taker], {}, {"keep": 0.5})
    assert found.tolist() == pytest.approx([0.0, 4.0, 4.41])


def test_without_a_known_norm_its_scale_is_refused(site: list[Source]) -> None:
    method, layer = Filters(), replace(site[0].layer, norm=None)
    settings = method.check({"keep": 0.67, "score": "norm_scale"})
    reason = method.refuses(layer, Storage.dense(layer), settings)
    assert reason == "no norm is known that scales its outputs: take score=l1"
    taker = site[1].layer
    assert method.refuses(taker, Storage.dense(taker), settings) is None
    with pytest.raises(MethodError, match="norm behind maker was not given"):
        method.scores([replace(site[0], norm_scale=None), site[1]], {}, settings)


def in_stream(source: Source) -> Source:
    cut = source.layer.cut
    assert cut is not None
    layer = replace(source.layer, cut=None, hidden=replace(cut, kind=STREAM))
    return replace(source, layer=layer)


def test_a_channel_of_a_stream_counts_by_all_it_has(site: list[Source]) -> None:
    method, stream = StreamFilters(), [in_stream(source) for source in site]
    l1 = method.scores(site, {}, method.check({"keep": 0.67, "norm": "l1"}))
    assert l1.tolist() == pytest.approx([4 + 14, 4.5 + 22, 4.2 + 30])
    settings = method.check({"keep": 0.67})
    (maker,), (taker,) = method.compress_site(stream, {}, [settings])
    assert not maker.weight[0].any() and not taker.weight[:, :2].any()
    for source, variant in zip(stream, (maker, taker), strict=True):
        dense = Storage.dense(source.layer)
        assert variant.storage == method.storage(source.layer, dense, settings)
        assert variant.storage.units is None


def test_a_stream_method_refuses_what_is_in_no_stream(site: list[Source]) -> None:
    method, layer = StreamFilters(), site[0].layer
    settings = method.check({"keep": 0.5})
    reason = method.refuses(layer, Storage.dense(layer), settings)
    assert reason == "it is part of no such structure. Name sites such as *.stream"
    rotated = replace(layer, hidden=Cut("hidden", "rows", 1, 3))
    assert method.refuses(rotated, Storage.dense(layer), settings) == reason
