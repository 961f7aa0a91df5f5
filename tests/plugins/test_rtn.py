import pytest
import torch
from autoprune_plugins.rtn import RoundToNearest, register_methods

from autoprune.compression.method import Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Layer, Value
from autoprune.testing import tiny_source

METHOD = RoundToNearest()
LAYER = Layer("q", (2, 4), "float32", block=0, role="q", input=None)
WEIGHT = torch.tensor([[-1.0, 0.2, 0.6, 2.0], [0.0, 0.0, 0.0, 0.0]])


def quantize(source: Source, **params: Value) -> Variant:
    return METHOD.compress([source], NO_STATISTICS, [METHOD.check(params)])[0][0]


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["rtn"]


def test_two_bits_worked_by_hand() -> None:
    variant = quantize(Source(LAYER, Variant.dense(WEIGHT)), bits=2)
    assert variant.codes is not None and variant.codes[0].tolist() == [0, 1, 2, 3]
    assert variant.weight.tolist() == [[-1, 0, 1, 2], [0, 0, 0, 0]]


def test_groups_have_grids_of_their_own() -> None:
    variant = quantize(Source(LAYER, Variant.dense(WEIGHT)), bits=2, group=2)
    assert variant.scales is not None
    torch.testing.assert_close(variant.scales[0], torch.tensor([0.4, 2 / 3]))


def test_symmetric_grids_store_no_zero_points() -> None:
    weight = torch.tensor([[-1.5, 0.0, 0.6, 1.0], [0.0, 0.0, 0.0, 0.0]])
    variant = quantize(Source(LAYER, Variant.dense(weight)), bits=2, symmetric=True)
    assert variant.zeros is None
    # The step is 1.5 / 1.5; -1.5 lies between two codes and goes to the even one.
    assert variant.weight.tolist() == [[-2, 0, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_at_most_half_a_step(bits: int, dtype: torch.dtype) -> None:
    source = tiny_source((16, 64), dtype=dtype)
    variant = quantize(source, bits=bits, group=16)
    assert variant.scales is not None
    weight = source.variant.weight.float()
    off = (variant.weight.float() - weight).abs().view(16, 4, 16)
    # The product of code and scale is rounded to the layer's type once more.
    slack = weight.abs().max() * torch.finfo(dtype).eps
    assert (off <= variant.scales[..., None].float() / 2 + slack).all()


def test_zeros_of_an_earlier_step_stay_and_do_not_widen_the_grid() -> None:
    weight = torch.tensor([[4.0, 5.0, 6.0, 7.0], [1.0, 1.0, 1.0, 1.0]])
    kept = torch.tensor([[False, True, True, False], [True, True, False, False]])
    dense = Variant.dense(weight)
    source = Source(LAYER, dense.pruned(weight, kept, pattern="2:4"))
    variant = quantize(source, bits=2)
    assert variant.scales is not None and variant.scales[0].tolist() == [2.0]
    assert variant.weight.tolist() == [[0, 4, 6, 0], [1, 1, 0, 0]]
    assert variant.storage.mask == "2:4" and variant.storage.kept == 4


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"bits": 1}, "lies from 2 (and|to) 8, found 1"),
        ({"bits": 9}, "found 9"),
        ({"bits": 4.0}, "takes a whole number, found 4.0"),
        ({"group": 1}, "found 1"),
        ({"symmetric": 1}, "takes true or false, found 1"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        METHOD.check(params)


def test_groups_that_do_not_divide_are_refused() -> None:
    layer = Layer("q", (2, 576), "bfloat16", block=0, role="q", input=None)
    settings = METHOD.check({"bits": 4, "group": 128})
    reason = METHOD.refuses(layer, Storage.dense(layer), settings)
    assert reason == "group 128 does not divide its 576 inputs"
    assert (
        METHOD.refuses(layer, Storage.dense(layer), METHOD.check({"bits": 4})) is None
    )


def test_a_second_quantization_is_refused() -> None:
    quantized = Storage.dense(LAYER).quantized(3, None, symmetric=True)
    reason = METHOD.refuses(LAYER, quantized, METHOD.check({"bits": 4}))
    assert reason == "already quantized to 3 bits: quantize once"
