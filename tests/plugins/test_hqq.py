from collections.abc import Mapping

import pytest
import torch
from autoprune_plugins.hqq import NORM, Hqq, register_methods, shrink
from autoprune_plugins.rtn import RoundToNearest
from torch import Tensor

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Part
from autoprune.compression.variant import Variant
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Value
from autoprune.testing import MethodContract, tiny_source

METHOD = Hqq()
F32 = torch.float32


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[{"bits": 4}, {"bits": 2, "group": 16}, {"bits": 8, "group": 8}], ids=str
    )
    def params(self, request: pytest.FixtureRequest) -> Mapping[str, Value]:
        params: Mapping[str, Value] = request.param
        return params


def make(method: CompressionMethod, source: Source, **params: Value) -> Variant:
    return method.compress([source], NO_STATISTICS, [method.check(params)])[0][0]


def heavy(dtype: torch.dtype = torch.float32) -> Source:
    """Weights with outliers, which a norm below one forgives."""
    source = tiny_source((32, 128), dtype=torch.float32)
    weight = source.variant.weight
    weight = (0.02 * weight * (1 + weight.abs() ** 3)).to(dtype)
    return Source(source.layer, Variant.dense(weight))


def norms(source: Source, variant: Variant, group: int) -> Tensor:
    off = (variant.weight.float() - source.variant.weight.float()).abs()
    if variant.mask is not None:
        off = off * variant.mask
    return off.pow(NORM).view(len(off), -1, group).sum(2)


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["hqq"]


def test_shrinking_worked_by_hand() -> None:
    # |e|^(p-1) is 1 for e = 1, so that 1 shrinks by 1 / beta; small errors vanish.
    found = shrink(torch.tensor([1.0, -1.0, 1e-3, 0.0]).view(1, 1, 4), 10.0)
    assert found.flatten().tolist() == pytest.approx([0.9, -0.9, 0.0, 0.0])


def test_shrinking_solves_its_problem(rng: torch.Generator) -> None:
    """The threshold is a stationary point of ``|x|^p / p + beta / 2 (x - e)^2``.

    It is the first step of a fixed-point iteration from ``e``, exact as beta grows.
    """
    error = 1 + torch.rand(1, 1, 50, generator=rng)
    for beta in (1e2, 1e3):
        x = shrink(error, beta)
        slope = x.pow(NORM - 1) + beta * (x - error)
        assert float(slope.abs().max()) < 2 / beta


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [16, 64])
def test_the_norm_falls_below_that_of_rounding(bits: int, group: int) -> None:
    for source, part in ((heavy(), 1.0), (tiny_source((32, 128), dtype=F32), 0.96)):
        ours = norms(source, make(METHOD, source, bits=bits, group=group), group)
        plain = make(RoundToNearest(), source, bits=bits, group=group)
        theirs = norms(source, plain, group)
        assert (ours <= theirs * (1 + 1e-5)).all()  # no group is worse
        assert float(ours.sum()) < part * float(theirs.sum())


def test_the_scales_are_those_of_rounding() -> None:
    source = heavy(torch.bfloat16)
    ours = make(METHOD, source, bits=4, group=64)
    plain = make(RoundToNearest(), source, bits=4, group=64)
    assert ours.scales is not None and plain.scales is not None
    assert torch.equal(ours.scales, plain.scales)


def test_a_shifted_grid_is_found() -> None:
    """Weights on a grid that misses zero by a third of a step need that shift."""
    steps = torch.tensor([-1.0, 0.0, 1.0, 2.0]).repeat(1, 16)
    source = Source(tiny_source((1, 64)).layer, Variant.dense((steps + 1 / 3) * 0.3))
    plain = make(RoundToNearest(), source, bits=2)
    ours = make(METHOD, source, bits=2)
    assert ours.zeros is not None
    assert float(norms(source, ours, 64)) < 0.5 * float(norms(source, plain, 64))
    assert float(ours.zeros) % 1 != 0


def test_pruned_weights_stay_zeros_and_have_no_say() -> None:
    source = heavy(torch.bfloat16)
    kept = torch.arange(128).remainder(4).lt(2).expand(32, 128).contiguous()
    pruned = source.variant.pruned(source.variant.weight, kept, pattern="2:4")
    variant = make(METHOD, Source(source.layer, pruned), bits=3, group=32)
    assert not variant.weight[~kept].any()
    assert not variant.weight[~kept].signbit().any()
    plain = make(RoundToNearest(), Source(source.layer, pruned), bits=3, group=32)
    ours, theirs = (norms(source, v, 32).sum() for v in (variant, plain))
    assert ours < theirs


def test_zero_points_are_stored_in_the_layers_type() -> None:
    source = tiny_source((8, 32))
    variant = make(METHOD, source, bits=4, group=16)
    assert variant.storage.parts["zeros"] == Part("bfloat16", (8, 2))
    assert variant.storage.nbytes == 128 + 2 * 16 + 2 * 16
    empty = Source(source.layer, Variant.dense(torch.zeros(8, 32).bfloat16()))
    assert not make(METHOD, empty, bits=4, group=16).weight.any()
