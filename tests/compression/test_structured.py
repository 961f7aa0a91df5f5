"""Structured methods: exact counts of units, the same ones in every layer of a site."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.method import Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.structured import (
    StructuredMethod,
    choose,
    in_units,
    kept_units,
)
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS, InputStatistics
from autoprune.policy import Layer
from autoprune.sites import Cut


class Ordered(StructuredMethod):
    """Keeps the last units."""

    name = "ordered"
    reference = "none"
    kinds: ClassVar[frozenset[str]] = frozenset({"heads"})

    def scores(
        self,
        sources: Sequence[Source],
        statistics: Mapping[str, InputStatistics],
        settings: Settings,
    ) -> Float[Tensor, " units"]:
        cut = sources[-1].layer.cut
        assert cut is not None
        return torch.arange(cut.units, dtype=torch.float32)


def source_of(axis: str, shape: tuple[int, int], unit: int, units: int) -> Source:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    cut = Cut("heads", axis, unit, units)
    layer = Layer(f"a.{axis}", shape, "bfloat16", 0, axis, f"a.{axis}", cut=cut)
    return Source(layer, Variant.dense(weight))


@pytest.fixture
def site() -> list[Source]:
    return [source_of("rows", (12, 8), 3, 4), source_of("columns", (5, 8), 2, 4)]


@pytest.mark.parametrize(
    ("units", "keep", "kept"),
    [
        (1536, 0.7, 1024),  # of 12 steps of 128 the nearest is the eighth
        (1536, 0.01, 128),
        (1536, 0.99, 1536),
        (48, 0.5, 24),  # steps of 4: 8 of them need 32
        (48, 0.3, 16),
        (7, 0.5, 4),
    ],
)
def test_widths_go_in_steps(units: int, keep: float, kept: int) -> None:
    assert kept_units(Cut("channels", "rows", 1, units), keep) == kept


@pytest.mark.parametrize(("keep", "kept"), [(0.1, 1), (0.5, 2), (0.7, 2), (0.9, 3)])
def test_heads_go_one_by_one(keep: float, kept: int) -> None:
    assert kept_units(Cut("heads", "rows", 64, 3), keep) == kept


def test_all_layers_lose_the_same_units_and_store_what_is_declared(
    site: list[Source],
) -> None:
    method = Ordered()
    settings = [method.check({"keep": keep}) for keep in (0.25, 0.75)]
    made = method.compress_site(site, {}, settings)
    for source, variants in zip(site, made, strict=True):
        dense = source.variant.weight
        for one, variant, kept in zip(settings, variants, (1, 3), strict=True):
            left = (in_units(source, variant.weight) != 0).all(1)
            assert left.tolist() == [False] * (4 - kept) + [True] * kept
            shown = in_units(source, variant.weight)[-kept:]
            assert torch.equal(shown, in_units(source, dense)[-kept:])
            stored = method.storage(source.layer, Storage.dense(source.layer), one)
            assert variant.storage == stored
            parts = variant.pack()
            assert sum(part.nbytes for part in parts.values()) == stored.nbytes
            again = Variant.unpack(stored, parts)
            assert torch.equal(again.weight, variant.weight)
    row, column = (variants[0].storage for variants in made)
    assert (row.nbytes, column.nbytes) == (3 * 8 * 2 + 1, 5 * 2 * 2 + 1)


def test_what_cannot_be_done_is_said(site: list[Source]) -> None:
    method, layer = Ordered(), site[0].layer
    half = method.check({"keep": 0.5})
    dense = Storage.dense(layer)
    assert method.refuses(layer, dense, half) is None
    alone = Layer("b", (4, 4), "bfloat16", 0, "b", "b")
    told = method.refuses(alone, Storage.dense(alone), half)
    assert told == (
        "it is part of no such structure. Name sites such as blocks.*.attention"
    )
    told = method.refuses(layer, dense.quantized(4, None, True), half)
    assert told == "ordered comes first: it removes units of dense layers"
    told = method.refuses(layer, dense, method.check({"keep": 0.9}))
    assert told == "keep=0.9 removes none of 4 units"
    with pytest.raises(MethodError, match=r"acts on whole sites, not on a\.rows alone"):
        method.compress(site[:1], NO_STATISTICS, [half])
    with pytest.raises(MethodError, match="ordered needs keep="):
        method.check({})


def test_a_score_that_is_no_number_is_named(site: list[Source]) -> None:
    scores = torch.tensor([1.0, float("nan"), 0.0, 0.0])
    with pytest.raises(MethodError, match=r"units of a\.columns have scores"):
        choose(site, scores, {"keep": 0.5})


def test_of_equal_units_the_earlier_go(site: list[Source]) -> None:
    kept = choose(site, torch.zeros(4), {"keep": 0.5})
    assert kept.tolist() == [False, False, True, True]
