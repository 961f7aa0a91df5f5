import pytest
import torch
from autoprune_plugins.magnitude import (
    NORMS,
    Magnitude,
    register_methods,
    tile_norm,
)

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Layer, Value
from autoprune.testing import MethodContract, tiny_source

METHOD = Magnitude()
LAYER = Layer("q", (2, 4), "float32", block=0, role="q", input="x")
WEIGHT = torch.tensor([[1.0, -4.0, 2.0, -3.0], [-5.0, 6.0, 7.0, -8.0]])


def prune(**params: Value) -> list[list[float]]:
    source = Source(LAYER, Variant.dense(WEIGHT))
    made = METHOD.compress([source], NO_STATISTICS, [METHOD.check(params)])
    weight: list[list[float]] = made[0][0].weight.tolist()
    return weight


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["magnitude"]


def test_rows_worked_by_hand() -> None:
    assert prune(sparsity=0.5) == [[0, -4, 0, -3], [0, 0, 7, -8]]


def test_a_layer_worked_by_hand() -> None:
    assert prune(sparsity=0.5, per="layer") == [[0, 0, 0, 0], [-5, 6, 7, -8]]


def test_a_pattern_worked_by_hand() -> None:
    assert prune(pattern="1:2") == [[0, -4, 0, -3], [0, 6, 0, -8]]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({}, "either sparsity or pattern, found neither"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "found 0.5 and 2:4"),
        ({"sparsity": 1.2}, "between 0 and 1, found 1.2"),
        ({"sparsity": 0.0}, "between 0 and 1, found 0.0"),
        ({"sparsity": "half"}, "takes a number, found 'half'"),
        ({"pattern": "4:2"}, "found '4:2'"),
        ({"sparsity": 0.5, "per": "column"}, "word 'column'. Known: layer, row"),
        ({"sparsty": 0.5}, "'sparsty'. Did you mean 'sparsity'"),
        ({"sparsity": 0.5, "tile": "1*8"}, r"such as 1x8 or 16x16; found '1\*8'"),
        ({"sparsity": 0.5, "tile": "1x1"}, "of several weights .* found '1x1'"),
        ({"sparsity": 0.5, "tile": "01x8"}, "found '01x8'"),
        ({"sparsity": 0.5, "tile": "0x8"}, "found '0x8'"),
        ({"sparsity": 0.5, "tile": 8}, "takes a word, found 8"),
        ({"sparsity": 0.5, "per": "rwo"}, "'rwo'. Did you mean 'row'"),
        ({"sparsity": 0.5, "per": True}, r"per=.* takes one of row, layer, found True"),
        ({"pattern": "2:4", "tile": "1x8"}, "tile=1x8.*not with pattern, found 2:4"),
        ({"sparsity": 0.5, "tile": "row", "per": "row"}, "tile=row, per=row"),
        (
            {"sparsity": 0.5, "tile": "1x8", "norm": "l3"},
            r"magnitude\(norm=.*: unknown word 'l3'. Known: l1, l2, mean, variance. Si",
        ),
        ({"sparsity": 0.5, "norm": "l2"}, "norm=l2.* no effect without tile"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        METHOD.check(params)


@pytest.mark.parametrize(
    ("columns", "pattern", "reason"),
    [
        (4, "4:8", "its 4 inputs are fewer than the 8 of 4:8"),
        (18, "2:4", "4 of 2:4 does not divide its 18 inputs"),
        (16, "2:4", None),
    ],
)
def test_patterns_that_do_not_fit_are_refused(
    columns: int, pattern: str, reason: str | None
) -> None:
    layer = Layer("q", (2, columns), "float32", block=0, role="q", input=None)
    settings = METHOD.check({"pattern": pattern})
    assert METHOD.refuses(layer, Storage.dense(layer), settings) == reason


def test_a_second_pruning_is_refused() -> None:
    settings = METHOD.check({"sparsity": 0.5})
    dense = Storage.dense(LAYER)
    reason = METHOD.refuses(LAYER, dense.masked(4, "2:4"), settings)
    assert reason == "already pruned (2:4, 50% zeros): prune once, as far as wanted"
    reason = METHOD.refuses(LAYER, dense.quantized(4, None, symmetric=False), settings)
    assert reason == "already quantized to 4 bits: prune before quantizing"


def test_rows_columns_and_tiles_worked_by_hand() -> None:
    assert prune(sparsity=0.5, tile="row") == [[0, 0, 0, 0], [-5, 6, 7, -8]]
    # Columns sum up to 6, 10, 9, 11.
    assert prune(sparsity=0.5, tile="column") == [[0, -4, 0, -3], [0, 6, 0, -8]]
    # Vectors sum up to 5, 5 and 11, 15; of equals the earlier goes.
    assert prune(sparsity=0.5, tile="1x2") == [[0, 0, 2, -3], [0, 0, 7, -8]]
    by_layer = prune(sparsity=0.5, tile="1x2", per="layer")
    assert by_layer == [[0, 0, 0, 0], [-5, 6, 7, -8]]
    # Squares of 2x2 sum up to 16 and 20.
    assert prune(sparsity=0.5, tile="2x2") == [[0, 0, 2, -3], [0, 0, 7, -8]]


def test_norms_disagree_as_they_should() -> None:
    layer = Layer("q", (1, 6), "float32", block=0, role="q", input="x")
    # Sums of sizes 14, 10, 12; of squares 98, 100, 72; variances 0, 25, 36.
    weight = torch.tensor([[7.0, 7.0, 10.0, 0.0, -6.0, 6.0]])
    source = Source(layer, Variant.dense(weight))
    settings = [
        METHOD.check({"sparsity": 0.3, "tile": "1x2", "norm": norm}) for norm in NORMS
    ]
    removed = [
        int((~made.mask).nonzero()[0, 1]) // 2
        for made in METHOD.compress([source], NO_STATISTICS, settings)[0]
        if made.mask is not None
    ]
    assert removed == [1, 2, 1, 0]


def test_norms_equal_their_definitions(rng: torch.Generator) -> None:
    weight = torch.randn(6, 8, generator=rng)
    for high, wide in [(1, 8), (6, 1), (2, 4), (3, 2)]:
        found = {norm: tile_norm(weight, (high, wide), norm) for norm in NORMS}
        for row in range(6 // high):
            for column in range(8 // wide):
                tile = weight[row * high :, column * wide :][:high, :wide].double()
                expected = {
                    "l1": tile.abs().sum(),
                    "l2": torch.linalg.matrix_norm(tile),
                    "mean": tile.abs().mean(),
                    "variance": (tile - tile.mean()).square().mean(),
                }
                for norm, value in expected.items():
                    assert torch.isclose(found[norm][row, column], value), norm


def test_the_coarser_the_tiles_the_more_is_lost(rng: torch.Generator) -> None:
    # The plain weights that are kept have the largest sum of squares there is, and
    # every tile is made of smaller ones.
    weight = torch.randn(64, 64, generator=rng)
    source = Source(Layer("q", (64, 64), "float32", 0, "q", "x"), Variant.dense(weight))
    grains = [{"per": "layer"}] + [
        {"per": "layer", "tile": tile, "norm": "l2"}
        for tile in ("1x4", "1x16", "1x64", "4x64", "16x64")
    ]
    settings = [METHOD.check({"sparsity": 0.5, **grain}) for grain in grains]
    made = METHOD.compress([source], NO_STATISTICS, settings)[0]
    kept = [float(variant.weight.square().sum()) for variant in made]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept)
    assert all(variant.storage.sparsity == 0.5 for variant in made)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"tile": "1x5"}, "tiles of 1x5 do not divide its 8x32 weights"),
        ({"tile": "3x1"}, "tiles of 3x1 do not divide its 8x32 weights"),
        ({"tile": "16x16"}, "tiles of 16x16 do not divide its 8x32 weights"),
        (
            {"tile": "1x32"},
            "sparsity 0.5 removes 0 of the 1 tiles of 1x32 in a row: take smaller "
            "tiles or per=layer",
        ),
        ({"tile": "1x32", "per": "layer"}, None),
        ({"tile": "row"}, None),
        ({"tile": "column"}, None),
        (
            {"tile": "4x32", "per": "layer", "sparsity": 0.9},
            "sparsity 0.9 removes 2 of the 2 tiles of 4x32 in the layer: take smaller "
            "tiles",
        ),
        ({"tile": "1x16", "sparsity": 0.2}, "sparsity 0.2 removes 0 of the 2 tiles"),
    ],
    ids=str,
)
def test_tiles_that_do_not_fit_are_refused(
    params: dict[str, Value], reason: str | None
) -> None:
    layer = tiny_source().layer
    settings = METHOD.check({"sparsity": 0.5, **params})
    found = METHOD.refuses(layer, Storage.dense(layer), settings)
    assert found == reason or (reason and found and found.startswith(reason))


def test_rows_compete_over_the_layer_and_say_so() -> None:
    settings = METHOD.check({"sparsity": 0.5, "tile": "row"})
    assert settings["per"] == "layer"
    given = {name: value for name, value in settings.items() if value is not None}
    assert METHOD.check(given) == settings


def test_the_mask_names_the_tile() -> None:
    masks = {"row": "1x32", "column": "8x1", "2x4": "2x4", None: "bitmap"}
    dense = Storage.dense(tiny_source().layer)
    for tile, mask in masks.items():
        named = {} if tile is None else {"tile": tile}
        settings = METHOD.check({"sparsity": 0.5, **named})
        storage = METHOD.storage(tiny_source().layer, dense, settings)
        assert (storage.mask, storage.sparsity) == (mask, 0.5)


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"pattern": "1:4"},
            {"pattern": "2:4"},
            {"pattern": "4:8"},
            {"sparsity": 0.5, "tile": "1x8"},
            {"sparsity": 0.3, "tile": "1x4", "per": "layer", "norm": "l2"},
            {"sparsity": 0.4, "tile": "row", "norm": "mean"},
            {"sparsity": 0.29, "tile": "column", "norm": "variance"},
            {"sparsity": 0.7, "tile": "4x4", "per": "layer"},
            {"sparsity": 0.5, "tile": "2x8"},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> dict[str, Value]:
        params: dict[str, Value] = request.param
        return params
