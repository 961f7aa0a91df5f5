from collections.abc import Mapping
from itertools import combinations

import pytest
import torch
from autoprune_plugins.dsnot import register_methods as register_dsnot
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.ria import (
    Ria,
    allocated,
    best_order,
    register_methods,
    relative_importance,
)
from autoprune_plugins.wanda import Wanda

from autoprune.compression.masks import kept_by_pattern
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value
from autoprune.sites import Cut
from autoprune.testing import (
    MethodContract,
    output_error,
    tiny_source,
    tiny_statistics,
)

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
            {"pattern": "2:4", "permute": True},
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
    with pytest.raises(
        MethodError, match=r"per=.* unknown word 'head'\. Known: layer, row"
    ):
        METHOD.check({"sparsity": 0.5, "per": "head"})


def kept_sum(scores: torch.Tensor, pattern: str) -> float:
    return float(scores[kept_by_pattern(scores, pattern)].double().sum())


def best_by_force(scores: torch.Tensor, columns: tuple[int, ...]) -> float:
    """Try every way to cut columns into groups of four."""
    if not columns:
        return 0.0
    first, rest = columns[0], columns[1:]
    found = 0.0
    for others in combinations(rest, 3):
        left = tuple(column for column in rest if column not in others)
        group = scores[:, [first, *others]]
        kept = float(group.double().topk(2, dim=1).values.sum())
        found = max(found, kept + best_by_force(scores, left))
    return found


def test_an_order_worked_by_hand() -> None:
    # Both large columns of a row stand in a group with small ones of 0.
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 1.0]])
    assert kept_sum(scores, "2:4") == 19
    order = best_order(scores, "2:4")
    assert kept_sum(scores[:, order], "2:4") == 30
    groups = [set(group.tolist()) & {0, 1, 2, 3} for group in order.view(2, 4)]
    assert [len(group) for group in groups] == [2, 2]


def test_columns_are_dealt_like_a_snake() -> None:
    sums = torch.tensor([[1.0, 8.0, 3.0, 6.0, 5.0, 4.0, 7.0, 2.0]])
    # In ranks 8 7 | 6 5 | 4 3 | 2 1, every other class backwards.
    dealt = sums[0, allocated(sums, 4)].view(2, 4).tolist()
    assert dealt == [[8.0, 5.0, 4.0, 1.0], [7.0, 6.0, 3.0, 2.0]]


def test_most_of_what_the_best_grouping_gains_is_gained() -> None:
    gains = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(3, 8, generator=generator).square()
        order = best_order(scores, "2:4")
        own, found = kept_sum(scores, "2:4"), kept_sum(scores[:, order], "2:4")
        best = best_by_force(scores, tuple(range(8)))
        assert own <= found <= best + 1e-6
        gains.append((found - own, best - own))
    shares = torch.tensor(gains).sum(0)
    assert shares[0] >= 0.8 * shares[1]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "8:16"])
def test_the_mask_follows_its_pattern_in_the_order(pattern: str) -> None:
    source, settings = (
        tiny_source(),
        METHOD.check({"pattern": pattern, "permute": True}),
    )
    variant = METHOD.compress([source], tiny_statistics(), [settings])[0][0]
    assert variant.order is not None and variant.mask is not None
    assert variant.order.sort().values.tolist() == list(range(32))
    keep, of = map(int, pattern.split(":"))
    assert (variant.mask[:, variant.order].view(-1, of).sum(1) == keep).all()
    dense = source.variant.weight
    assert torch.equal(variant.weight, torch.where(variant.mask, dense, 0.0))
    groups = variant.order.view(-1, of)
    assert torch.equal(groups, groups.sort(1).values)
    assert torch.equal(groups[:, 0], groups[:, 0].sort().values)


def test_more_is_kept_and_less_is_lost() -> None:
    """Columns of unlike size side by side: permuting helps on nearly all layers."""
    better = 0
    settings = [METHOD.check({"pattern": "2:4", "permute": p}) for p in (False, True)]
    for seed in range(10):
        source, statistics = tiny_source((16, 64), seed=seed), tiny_statistics(64)
        plain, permuted = METHOD.compress([source], statistics, settings)[0]
        scores = METHOD.scores(source, statistics, settings[0])
        assert plain.mask is not None and permuted.mask is not None
        assert scores[permuted.mask].sum() >= scores[plain.mask].sum()
        errors = [
            output_error(source.variant, variant, statistics)
            for variant in (plain, permuted)
        ]
        better += errors[1] < errors[0]
    assert better >= 8


def test_only_what_may_be_permuted_is() -> None:
    def layer(name: str, cut: Cut | None) -> Layer:
        return Layer(name, (8, 16), "float32", 0, name, name, cut=cut)

    settings = METHOD.check({"pattern": "2:4", "permute": True})
    plain = METHOD.check({"pattern": "2:4"})
    cases = {
        "down": (Cut("channels", "columns", 1, 16), None),
        "up": (Cut("channels", "rows", 1, 8), "no channels of an MLP"),
        "o": (Cut("heads", "columns", 8, 2), "belong to heads"),
        "q": (Cut("heads", "rows", 4, 2), "no channels of an MLP"),
        "other": (None, "no channels of an MLP"),
    }
    for name, (cut, told) in cases.items():
        one = layer(name, cut)
        assert METHOD.refuses(one, Storage.dense(one), plain) is None
        reason = METHOD.refuses(one, Storage.dense(one), settings)
        assert (reason is None) if told is None else (told in str(reason))
    with pytest.raises(
        MethodError, match=r"permute=true\) needs a pattern, found none"
    ):
        METHOD.check({"sparsity": 0.5, "permute": True})


def test_weights_do_not_move_in_a_permuted_pattern() -> None:
    layer = tiny_source().layer
    settings = METHOD.check({"pattern": "2:4", "permute": True})
    stored = METHOD.storage(layer, Storage.dense(layer), settings)
    (dsnot,) = register_dsnot()
    told = dsnot.refuses(layer, stored, dsnot.check({}))
    assert str(told).startswith("its 2:4 holds in another order of the columns")
