import pytest
import torch
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.sparsegpt import SparseGpt, register_methods
from autoprune_plugins.wanda import Wanda

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value
from autoprune.testing import output_error, tiny_source, tiny_statistics

METHOD = SparseGpt()


def make(
    method: CompressionMethod,
    source: Source,
    statistics: InputStatistics,
    **params: Value,
) -> Variant:
    return method.compress([source], statistics, [method.check(params)])[0][0]


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["sparsegpt"]


def test_a_pattern_worked_by_hand() -> None:
    # Inputs 1 and 2 are almost the same, 3 and 4 as well: what one loses, the later of
    # the pair takes over; the last has nobody left to take over from it.
    weight = torch.tensor([[1.0, 4.0, 3.0, 5.0], [2.0, 3.0, 9.0, 1.0]])
    pair = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-6]])
    hessian = torch.block_diag(pair, pair)
    layer = Layer("q", (2, 4), "float32", block=0, role="q", input="x")
    source = Source(layer, Variant.dense(weight))
    statistics = InputStatistics(4, None, hessian)
    variant = make(METHOD, source, statistics, pattern="1:2", damping=0.0)
    expected = torch.tensor([[0.0, 5.0, 0.0, 8.0], [0.0, 5.0, 0.0, 10.0]])
    torch.testing.assert_close(variant.weight, expected, rtol=0, atol=1e-2)


def test_an_undamped_diagonal_hessian_scores_as_wanda_does() -> None:
    source = tiny_source(dtype=torch.float32)
    square_sum = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1
    statistics = InputStatistics(1, square_sum, torch.diag(square_sum))
    found = make(METHOD, source, statistics, pattern="2:4", damping=0.0)
    expected = make(Wanda(), source, statistics, pattern="2:4")
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("params", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_outputs_err_less_than_wandas_and_those_less_than_magnitudes(
    params: dict[str, Value],
) -> None:
    source, statistics = tiny_source((64, 160)), tiny_statistics(160, tokens=1024)
    errors = [
        output_error(
            source.variant, make(method, source, statistics, **params), statistics
        )
        for method in (METHOD, Wanda(), Magnitude())
    ]
    assert errors == sorted(errors) and errors[0] < 0.9 * errors[1] < errors[2]


@pytest.mark.parametrize("params", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
@pytest.mark.parametrize("bits", [3, 4])
def test_one_sweep_beats_pruning_and_then_rounding(
    params: dict[str, Value], bits: int
) -> None:
    source, statistics = tiny_source((64, 160)), tiny_statistics(160, tokens=1024)
    joint = make(METHOD, source, statistics, **params, bits=bits, group=32)
    pruned = Source(source.layer, make(METHOD, source, statistics, **params))
    then = make(RoundToNearest(), pruned, statistics, bits=bits, group=32)
    errors = [output_error(source.variant, v, statistics) for v in (joint, then)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("level", range(1, 10))
def test_kept_counts_are_exact(level: int) -> None:
    source, statistics = tiny_source((7, 150)), tiny_statistics(150)
    variant = make(METHOD, source, statistics, sparsity=level / 10)
    assert variant.storage.kept == 1050 - round(level / 10 * 1050)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8", "16:32"])
def test_patterns_hold_in_every_group(pattern: str) -> None:
    keep, of = (int(number) for number in pattern.split(":"))
    variant = make(METHOD, tiny_source((9, 160)), tiny_statistics(160), pattern=pattern)
    assert variant.mask is not None
    assert (variant.mask.view(-1, of).sum(1) == keep).all()


def test_few_tokens_are_enough_with_damping() -> None:
    statistics = tiny_statistics(96, tokens=8)
    variant = make(METHOD, tiny_source((16, 96)), statistics, sparsity=0.5)
    assert torch.isfinite(variant.weight).all()


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({}, "sparsegpt takes either sparsity or pattern, found neither"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "found 0.5 and 2:4"),
        ({"sparsity": 1.2}, "between 0 and 1, found 1.2"),
        ({"sparsity": 0.5, "bits": 1}, "found 1"),
        ({"sparsity": 0.5, "group": 64}, r"group=64\) has no effect without bits"),
        ({"pattern": "2:4", "symmetric": True}, "symmetric=True.* without bits"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        METHOD.check(params)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"pattern": "2:5"}, "5 of 2:5 does not divide its 32 inputs"),
        ({"sparsity": 0.5, "bits": 4, "group": 24}, "group 24 does not divide its 32"),
        ({"pattern": "2:4", "bits": 4, "group": 16}, None),
    ],
    ids=str,
)
def test_what_does_not_divide_is_refused(
    params: dict[str, Value], reason: str | None
) -> None:
    layer = tiny_source().layer
    found = METHOD.refuses(layer, Storage.dense(layer), METHOD.check(params))
    assert (found or "").startswith(reason or "") and bool(found) == bool(reason)


def test_pruning_twice_is_refused() -> None:
    layer = tiny_source().layer
    settings = METHOD.check({"sparsity": 0.5})
    reason = METHOD.refuses(layer, Storage.dense(layer).masked(64, "bitmap"), settings)
    assert reason is not None and reason.startswith(
        "already pruned (bitmap, 75% zeros)"
    )
