"""Formats of codes agree with their standards, without torch's own types."""

from math import isnan

import pytest
import torch

from autoprune.compression.formats import FORMATS, float_values, normal_quantiles
from autoprune.compression.storage import Part, Storage
from autoprune.policy import Layer

LAYER = Layer("q", (64, 256), "bfloat16", block=0, role="q", input="x")
DENSE = Storage.dense(LAYER)


def test_e2m1_has_its_eight_sizes() -> None:
    sizes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for name in ("mxfp4", "nvfp4"):
        assert FORMATS[name].values == (*sizes, *(-size for size in sizes))
        assert FORMATS[name].levels == tuple(sizes)


def test_e4m3_is_what_torch_says() -> None:
    codes = torch.arange(256).byte().view(torch.float8_e4m3fn).float()
    ours = torch.tensor(FORMATS["fp8_e4m3"].values)
    assert torch.equal(torch.nan_to_num(codes, 1e9), torch.nan_to_num(ours, 1e9))
    assert [index for index, value in enumerate(ours) if isnan(value)] == [127, 255]
    assert FORMATS["fp8_e4m3"].top == 448


def test_other_small_floats_follow_from_the_same_rule() -> None:
    assert float_values(2, 3, bias=1)[-1] == -7.5  # E2M3 of the MX formats
    assert float_values(3, 2, bias=3)[31] == 28  # E3M2
    assert float_values(3, 2, bias=3)[1] == 0.0625


def test_nf4_has_the_quantiles_of_the_paper() -> None:
    found = torch.tensor(normal_quantiles())
    paper = [
        *(-1.0, -0.69619280, -0.52507305, -0.39491749),
        *(-0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.07958030, 0.16093020, 0.24611230, 0.33791524),
        *(0.44070983, 0.56261700, 0.72295684, 1.0),
    ]
    torch.testing.assert_close(found, torch.tensor(paper), rtol=0, atol=1e-6)
    assert found[7] == 0
    # The outermost probabilities, straight from the distribution.
    outer = 1 - (1 / 30 + 1 / 32) / 2
    normal = torch.special.ndtri(
        torch.tensor([outer, 0.5 + (outer - 0.5) / 8]).double()
    )
    assert float(normal[1] / normal[0]) == pytest.approx(float(found[8]), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "group", "bits"),
    [("mxfp4", 32, 4.25), ("nvfp4", 16, 4.5), ("nf4", 64, 4.25), ("fp8_e4m3", None, 8)],
)
def test_bits_a_weight(name: str, group: int | None, bits: float) -> None:
    storage = DENSE.coded(name, group)
    size = storage.nbytes
    if name == "nvfp4":
        size -= 4  # the one scale of the tensor
    if name == "fp8_e4m3":
        size -= 2 * 64  # a scale a row in the layer's type
    assert size * 8 / storage.numel == bits


def test_parts_are_named_with_their_types() -> None:
    assert DENSE.coded("nvfp4", 16).parts == {
        "codes": Part("uint8", (8192,)),
        "scales": Part("uint8", (64, 16)),
        "tensor_scale": Part("float32", (1,)),
    }
    assert DENSE.coded("fp8_e4m3_tensor", None).parts == {
        "codes": Part("uint8", (16384,)),
        "tensor_scale": Part("float32", (1,)),
    }
    whole = DENSE.quantized(4, None, symmetric=True, code="int_tensor")
    assert whole.parts == {
        "codes": Part("uint8", (8192,)),
        "tensor_scale": Part("float32", (1,)),
    }
    floats = DENSE.quantized(4, 64, symmetric=False, code="int_float_zero")
    assert floats.parts["zeros"] == Part("bfloat16", (64, 4))
    scaled = DENSE.quantized(4, 64, symmetric=True, channel_scales=True)
    plain = DENSE.quantized(4, 64, symmetric=True)
    assert scaled.parts["channel_scales"] == Part("bfloat16", (256,))
    assert scaled.nbytes == plain.nbytes + 2 * 256


def test_what_was_declared_before_there_were_formats_is_the_same() -> None:
    old = Storage((4, 8), "bfloat16", 32, None, 4, 4, False)
    assert old == Storage.dense(
        Layer("q", (4, 8), "bfloat16", block=0, role="q", input=None)
    ).quantized(4, 4, symmetric=False)
    assert list(old.parts) == ["codes", "scales", "zeros"]
