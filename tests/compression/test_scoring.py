"""A method that has only scores does all that pruning methods do."""

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.method import Parameter, Settings, Source
from autoprune.compression.scoring import BY_LAYER, BY_ROW, ScoringMethod
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS, InputStatistics
from autoprune.policy import Layer
from autoprune.testing import tiny_source

WEIGHT = torch.tensor([[1.0, -4.0, 2.0, -3.0], [-5.0, 6.0, 7.0, -8.0]])
LAYER = Layer("q", (2, 4), "float32", block=0, role="q", input="x")


class Signed(ScoringMethod):
    """Scores weights by themselves, to a power; tells for which it was asked."""

    name = "signed"
    reference = "none"
    parameters = (*BY_LAYER, Parameter("power", int, 1, "Power.", 1, 3))

    def __init__(self) -> None:
        self.powers: list[int] = []

    def scores(
        self, source: Source, statistics: InputStatistics, settings: Settings
    ) -> Float[Tensor, "out in"]:
        self.powers.append(settings["power"])
        return source.variant.weight.float() ** settings["power"]


def prune(**params: object) -> list[list[float]]:
    method = Signed()
    settings = [method.check(params)]  # type: ignore[arg-type]
    source = Source(LAYER, Variant.dense(WEIGHT))
    weight: list[list[float]] = method.compress([source], NO_STATISTICS, settings)[0][
        0
    ].weight.tolist()
    return weight


def test_signed_scores_by_hand() -> None:
    assert prune(sparsity=0.5) == [[1, 0, 2, 0], [0, 6, 7, 0]]
    assert prune(sparsity=0.25, per="row") == [[1, 0, 2, -3], [-5, 6, 7, 0]]
    assert prune(pattern="1:2") == [[1, 0, 2, 0], [0, 6, 7, 0]]
    assert prune(sparsity=0.5, power=2) == [[0, 0, 0, 0], [-5, 6, 7, -8]]
    # Vectors add up to -3, -1 and 1, -1: of equal ones the earlier goes.
    assert prune(sparsity=0.5, tile="1x2") == [[0, 0, 0, 0], [-5, 6, 7, -8]]
    assert prune(sparsity=0.5, tile="row") == [[0, 0, 0, 0], [-5, 6, 7, -8]]


def test_settings_that_only_count_share_scores() -> None:
    method = Signed()
    settings = [
        method.check({"sparsity": 0.5}),
        method.check({"sparsity": 0.25, "per": "row"}),
        method.check({"pattern": "2:4"}),
        method.check({"sparsity": 0.5, "tile": "column"}),
        method.check({"sparsity": 0.5, "power": 3}),
    ]
    made = method.compress([tiny_source(), tiny_source()], NO_STATISTICS, settings)
    assert [len(variants) for variants in made] == [5, 5]
    assert method.powers == [1, 3, 1, 3]


def test_what_it_refuses() -> None:
    method = Signed()
    settings = method.check({"sparsity": 0.5})
    pruned = Storage.dense(LAYER).masked(4, "bitmap")
    assert "already pruned" in str(method.refuses(LAYER, pruned, settings))
    assert method.refuses(LAYER, Storage.dense(LAYER), settings) is None
    outside = Layer("embed", (2, 4), "float32", block=None, role="e", input=None)
    dense = Storage.dense(outside)
    assert method.refuses(outside, dense, settings) is None
    method.needs = frozenset({"gradient"})  # type: ignore[misc]
    assert "no inputs" in str(method.refuses(outside, dense, settings))
    with pytest.raises(MethodError, match="signed takes either sparsity or pattern"):
        method.check({})
    with pytest.raises(
        MethodError, match=r"per=.* unknown word 'head'\. Known: layer, row"
    ):
        method.check({"sparsity": 0.5, "per": "head"})


def test_the_defaults_differ_in_what_competes() -> None:
    assert [parameter.name for parameter in BY_ROW] == [p.name for p in BY_LAYER]
    assert [p.default for p in BY_ROW if p.name == "per"] == ["row"]
    assert [p.default for p in BY_LAYER if p.name == "per"] == ["layer"]
