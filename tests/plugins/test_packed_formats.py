"""The target ``packed`` stores every format of codes, and reads it back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoprune_plugins.packed import Packed
from tiny_exports import tiny_case
from torch import Tensor

from autoprune.compression.rounding import round_to_codebook, round_to_grid
from autoprune.compression.variant import Variant
from autoprune.models.layers import read_weight, write_weight

PACKED = Packed()
Form = Callable[[Tensor], Variant]


def book(name: str, group: int | None) -> Form:
    def form(weight: Tensor) -> Variant:
        dense = Variant.dense(weight)
        if group and weight.shape[1] % group:
            return dense  # as a space would leave it
        return round_to_codebook(dense, weight.float(), name, group=group)

    return form


def channel_scales(weight: Tensor) -> Variant:
    scales = 1 + torch.arange(weight.shape[1]) % 3 / 2
    return round_to_grid(
        Variant.dense(weight),
        weight * scales,
        bits=4,
        group=8,
        symmetric=False,
        channel_scales=scales,
    )


def float_zeros(weight: Tensor) -> Variant:
    codes = (weight.abs() * 100).clamp(0, 15).byte()
    scales, zeros = torch.full((2, len(weight), 1), 0.3)
    return Variant.dense(weight).quantized(
        codes, scales, zeros * 7, bits=4, group=None, code="int_float_zero"
    )


def one_scale(weight: Tensor) -> Variant:
    scale = weight.float().abs().max().view(1) / 8
    codes = ((weight.float() / scale).round() + 8).clamp(0, 15).byte()
    return Variant.dense(weight).quantized(
        codes, None, None, bits=4, group=None, code="int_tensor", tensor_scale=scale
    )


FORMS: dict[str, Form] = {
    "fp8": book("fp8_e4m3", None),
    "fp8-tensor": book("fp8_e4m3_tensor", None),
    "nf4": book("nf4", 8),
    "mxfp4": book("mxfp4", 32),
    "nvfp4": book("nvfp4", 16),
    "channel-scales": channel_scales,
    "float-zeros": float_zeros,
    "int-tensor": one_scale,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_format_comes_back_bit_for_bit(form: str, tmp_path: Path) -> None:
    case = tiny_case("llama", tmp_path / "dense", ["dense"])
    variants = {
        layer: FORMS[form](read_weight(case.dense, layer).clone())
        for layer in case.job.storages
    }
    for layer, variant in variants.items():
        write_weight(case.model, layer, variant.weight)
    storages = {layer: variant.storage for layer, variant in variants.items()}
    assert any(storage.bits for storage in storages.values())
    job = replace(case.job, storages=storages, variant=variants.__getitem__)
    (tmp_path / "export").mkdir()
    PACKED.write(tmp_path / "export", job)
    loaded = PACKED.load(tmp_path / "export")
    assert torch.equal(case.logits(loaded), case.logits())
    predicted = PACKED.size_bytes(storages, case.untouched)
    assert PACKED.written_bytes(tmp_path / "export") == predicted
