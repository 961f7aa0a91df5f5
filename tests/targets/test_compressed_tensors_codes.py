"""Codes are packed as they are, read back as they were, and cut as they stand."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from torch import Tensor

from autoprune.compression.formats import FORMATS
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import ExportError
from autoprune.policy import Layer
from autoprune.sites import Cut
from autoprune.targets import compressed_tensors_codes
from autoprune.targets.compressed_tensors_codes import (
    code_numbers,
    cut_codes,
    library_scheme,
    packed,
    read_back,
)
from autoprune.targets.compressed_tensors_schemes import Scheme, scheme_of


def variant_of(
    code: str,
    *,
    rows: int = 4,
    columns: int = 64,
    bits: int = 4,
    group: int | None = 32,
    mask: bool = False,
    seed: int = 0,
) -> Variant:
    """Draw codes, scales and a mask of a format; every code that is a number."""
    rng = torch.Generator().manual_seed(seed)
    form = FORMATS[code]
    storage = Storage((rows, columns), "bfloat16", rows * columns)
    storage = storage.quantized(bits, group, True, code=code)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=rng).byte()
    if form.values:
        numbers = torch.tensor(form.values)[codes.long()]
        codes[numbers.isnan() | (numbers == 0)] = 0
    draw = torch.rand(rows, storage.groups, generator=rng) + 0.5
    scales: Tensor | None = {
        "layer": draw.bfloat16(),
        "e8m0": draw.log2().round().exp2(),
        "e4m3": draw.to(torch.float8_e4m3fn).float(),
        "none": None,
    }[form.scales]
    tensor = torch.rand(1, generator=rng) + 0.5 if form.tensor_scale else None
    kept = torch.rand(rows, columns, generator=rng) > 0.4 if mask else None
    if kept is not None:
        storage = replace(storage, kept=int(kept.sum()), mask="bitmap")
        codes = codes * kept
    fields = {"codes": codes, "scales": scales, "tensor_scale": tensor, "mask": kept}
    return Variant(storage, **fields)


FORMS = {
    **{f"int{b}": {"code": "int", "bits": b} for b in range(2, 9)},
    "int4 row": {"code": "int", "bits": 4, "group": None},
    "int8 row": {"code": "int", "bits": 8, "group": None},
    "fp8 row": {"code": "fp8_e4m3", "bits": 8, "group": None},
    "fp8 tensor": {"code": "fp8_e4m3_tensor", "bits": 8, "group": None},
    "nvfp4": {"code": "nvfp4", "group": 16},
    "mxfp4": {"code": "mxfp4", "group": 32},
}


def made_of(variant: Variant) -> tuple[Scheme, dict[str, Tensor]]:
    scheme = scheme_of(variant.storage)
    assert scheme is not None
    return scheme, packed(variant, scheme, "q_proj")


@pytest.mark.parametrize("mask", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_library_gives_back_what_it_is_said_to(form: dict, mask: bool) -> None:
    variant = variant_of(**form, mask=mask)
    scheme, made = made_of(variant)
    parts = scheme.parts(variant.storage)
    found = {name: (str(t.dtype), tuple(t.shape)) for name, t in made.items()}
    assert found == {n: (f"torch.{p.dtype}", p.shape) for n, p in parts.items()}
    # transformers gives every parameter but a global scale the layer's type.
    if scheme.strategy == "tensor":
        made["weight_scale"] = made["weight_scale"].bfloat16()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    read = compressor.decompress(made, library_scheme(scheme, []))["weight"]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, read_back(variant, scheme))
    if mask:
        assert variant.mask is not None
        assert (read[~variant.mask] == 0).all()
    if variant.tensor_scale is None:
        assert torch.equal(read, variant.weight)
    else:
        torch.testing.assert_close(read, variant.weight, rtol=2**-6, atol=0)


def test_words_by_hand() -> None:
    storage = Storage((1, 32), "bfloat16", 32).quantized(4, None, True)
    codes = torch.full((1, 32), 8, dtype=torch.uint8)  # zeros
    codes[0, :8] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 15])
    variant = Variant(storage, codes=codes, scales=torch.tensor([[0.5]]).bfloat16())
    _, made = made_of(variant)
    words = [int(word) & 0xFFFFFFFF for word in made["weight_packed"][0]]
    assert words == [0xF7654321, 0x88888888, 0x88888888, 0x88888888]
    assert variant.weight[0, :8].tolist() == [-3.5, -3, -2.5, -2, -1.5, -1, -0.5, 3.5]


def test_three_bits_straddle_words_by_hand() -> None:
    storage = Storage((1, 32), "bfloat16", 32).quantized(3, None, True)
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b101  # at bits 30 to 32
    variant = Variant(storage, codes=codes, scales=torch.ones(1, 1).bfloat16())
    _, made = made_of(variant)
    words = [int(word) & 0xFFFFFFFF for word in made["weight_packed"][0]]
    assert words == [0b01 << 30, 0b1, 0]


def test_bytes_of_floats_by_hand() -> None:
    storage = Storage((1, 32), "bfloat16", 32).coded("mxfp4", 32)
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([7, 9])  # 6 and -0.5
    variant = Variant(storage, codes=codes, scales=torch.tensor([[0.25]]))
    _, made = made_of(variant)
    assert made["weight_packed"][0, 0] == 0x97
    assert made["weight_scale"].tolist() == [[125]]
    assert read_back(variant, scheme_of(storage))[0, :2].tolist() == [1.5, -0.125]


def test_a_pruned_weight_is_the_code_of_zero() -> None:
    variant = variant_of("int", mask=True)
    assert variant.mask is not None
    numbers = code_numbers(variant)
    assert (numbers[~variant.mask] == 0).all()
    assert (numbers[variant.mask] + 8).byte().equal(variant.codes[variant.mask])


def test_a_library_that_changes_codes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = variant_of("int")
    changed = variant.codes.clone()
    changed[0, :3] ^= 1
    other = code_numbers(replace(variant, codes=changed))
    monkeypatch.setattr(compressed_tensors_codes, "_unpacked", lambda *_: other)
    with pytest.raises(ExportError, match=r"changed 3 codes or scales of q_proj"):
        made_of(variant)


def layer_of(shape: tuple[int, int], axis: str, unit: int) -> Layer:
    units = shape[0 if axis == "rows" else 1] // unit
    cut = Cut("heads", axis, unit, units)
    return Layer("o_proj", shape, "bfloat16", 0, "o", None, cut=cut)


@pytest.mark.parametrize(
    ("axis", "unit", "form"),
    [
        ("rows", 2, {"code": "int", "group": 32}),
        ("rows", 2, {"code": "fp8_e4m3_tensor", "bits": 8, "group": None}),
        ("columns", 32, {"code": "int", "group": 32}),
        ("columns", 32, {"code": "nvfp4", "group": 16}),
        ("columns", 1, {"code": "int", "group": None}),
    ],
)
@pytest.mark.parametrize("mask", [False, True], ids=["full", "masked"])
def test_a_cut_variant_weighs_what_stays(
    axis: str, unit: int, form: dict, mask: bool
) -> None:
    variant = variant_of(**form, rows=8, columns=128, mask=mask)
    layer = layer_of((8, 128), axis, unit)
    units = torch.tensor([0, 2, 3])
    lines = torch.cat([torch.arange(u * unit, (u + 1) * unit) for u in units])
    small = cut_codes(variant, layer, units)
    dim = 0 if axis == "rows" else 1
    assert torch.equal(small.weight, variant.weight.index_select(dim, lines))
    assert small.storage.shape == tuple(small.weight.shape)
    assert small.pack().keys() == variant.pack().keys()  # still a whole variant
    for name, tensor in small.pack().items():
        assert tuple(tensor.shape) == small.storage.parts[name].shape


def test_columns_that_part_a_group_are_refused() -> None:
    variant = variant_of("int", columns=128)
    layer = layer_of((4, 128), "columns", 16)
    with pytest.raises(ExportError, match="o_proj that stay are no whole groups of 32"):
        cut_codes(variant, layer, torch.tensor([0, 1, 3, 4]))
    with pytest.raises(ExportError, match="no whole groups of 32"):
        cut_codes(variant, layer, torch.tensor([0, 1, 2]))
