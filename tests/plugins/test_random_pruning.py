import pytest
import torch
from autoprune_plugins.random_pruning import (
    RandomPruning,
    random_scores,
    register_methods,
)

from autoprune.compression.method import CompressionMethod
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Value
from autoprune.testing import MethodContract, tiny_source

METHOD = RandomPruning()


def made(name: str = "layers.0.q", **params: Value) -> Variant:
    source, settings = tiny_source(name=name), METHOD.check(params)
    return METHOD.compress([source], NO_STATISTICS, [settings])[0][0]


def mask(name: str = "layers.0.q", **params: Value) -> torch.Tensor:
    kept = made(name, **params).mask
    assert kept is not None
    return kept


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["random"]


def test_seed_and_name_decide() -> None:
    first = mask(sparsity=0.5)
    assert torch.equal(first, mask(sparsity=0.5, seed=0))
    assert not torch.equal(first, mask(sparsity=0.5, seed=1))
    assert not torch.equal(first, mask("layers.1.q", sparsity=0.5))


def test_the_common_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    mask(sparsity=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_same_numbers_on_every_machine() -> None:
    found = random_scores((1, 3), "layers.0.q", 7)[0]
    assert [round(float(score), 4) for score in found] == [0.9826, 0.8635, 0.4651]


def test_a_higher_sparsity_removes_more_of_the_same() -> None:
    for params in ({}, {"per": "layer"}, {"tile": "1x4"}, {"tile": "column"}):
        few, many = mask(sparsity=0.3, **params), mask(sparsity=0.6, **params)
        assert not (many & ~few).any()


def test_kept_weights_are_untouched_and_large_ones_not_spared() -> None:
    variant, dense = made(sparsity=0.5), tiny_source().variant.weight
    kept = variant.mask
    assert kept is not None and torch.equal(variant.weight[kept], dense[kept])
    # Half of the sum of sizes stays, not the four fifths of magnitude pruning.
    sizes = dense.float().abs()
    assert 0.4 < float(sizes[kept].sum() / sizes.sum()) < 0.6


def test_every_place_is_as_likely_as_any_other() -> None:
    share = torch.stack([mask(sparsity=0.5, seed=seed) for seed in range(400)])
    share = share.float().mean(0)
    # Standard deviation 0.025; 256 places stay within 4.5 of them.
    assert float((share - 0.5).abs().max()) < 0.1125


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({}, "random takes either sparsity or pattern, found neither"),
        ({"sparsity": 0.5, "seed": -1}, "found -1"),
        ({"sparsity": 0.5, "seed": 0.5}, "takes a whole number, found 0.5"),
        ({"sparsity": 0.5, "tile": "rows"}, "found 'rows'"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        METHOD.check(params)


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"sparsity": 0.5},
            {"sparsity": 0.29, "per": "layer", "seed": 3},
            {"pattern": "1:4"},
            {"pattern": "2:4"},
            {"pattern": "4:8"},
            {"sparsity": 0.5, "tile": "1x8"},
            {"sparsity": 0.4, "tile": "row"},
            {"sparsity": 0.7, "tile": "column"},
            {"sparsity": 0.5, "tile": "4x4", "per": "layer"},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> dict[str, Value]:
        params: dict[str, Value] = request.param
        return params
