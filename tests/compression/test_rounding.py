"""Variants of every format survive packing, the store, and an earlier mask."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from autoprune.compression.masks import kept_by_pattern, kept_by_sparsity
from autoprune.compression.rounding import round_to_codebook, round_to_grid
from autoprune.compression.storage import Storage
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant

Form = Callable[[Variant], Variant]


def book(name: str, group: int | None) -> Form:
    def form(variant: Variant) -> Variant:
        return round_to_codebook(variant, variant.weight.float(), name, group=group)

    return form


def scaled(variant: Variant) -> Variant:
    scales = torch.exp2(torch.arange(64.0) % 3)
    return round_to_grid(
        variant,
        variant.weight.float() * scales,
        bits=3,
        group=16,
        symmetric=False,
        channel_scales=scales,
    )


def float_zeros(variant: Variant) -> Variant:
    codes = (variant.weight.float().abs() * 4).clamp(0, 15).byte()
    scales = torch.linspace(0.5, 1, 16).view(8, 2)
    zeros = (scales * 7.3).to(variant.weight.dtype)
    return variant.quantized(
        codes, scales, zeros, bits=4, group=32, code="int_float_zero"
    )


FORMS: dict[str, Form] = {
    "fp8": book("fp8_e4m3", None),
    "fp8-groups": book("fp8_e4m3", 16),
    "fp8-tensor": book("fp8_e4m3_tensor", None),
    "nf4": book("nf4", 16),
    "mxfp4": book("mxfp4", 32),
    "nvfp4": book("nvfp4", 16),
    "channel-scales": scaled,
    "float-zeros": float_zeros,
}


def before(kind: str, dtype: torch.dtype, rng: torch.Generator) -> Variant:
    variant = Variant.dense(torch.randn(8, 64, generator=rng).to(dtype))
    scores = variant.weight.float().abs()
    if kind == "dense":
        return variant
    if kind == "2:4":
        kept = kept_by_pattern(scores, kind)
        return variant.pruned(variant.weight, kept, pattern=kind)
    kept = kept_by_sparsity(scores, 0.37, per="row")
    return variant.pruned(variant.weight, kept)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)
@pytest.mark.parametrize("kind", ["dense", "2:4", "bitmap"])
@pytest.mark.parametrize("form", FORMS)
def test_packing_and_the_store_bring_it_back(
    form: str, kind: str, dtype: torch.dtype, rng: torch.Generator, tmp_path: Path
) -> None:
    variant = FORMS[form](before(kind, dtype, rng))
    packed, declared = variant.pack(), variant.storage.parts
    assert {name: tuple(part.shape) for name, part in packed.items()} == {
        name: part.shape for name, part in declared.items()
    }
    assert sum(part.nbytes for part in packed.values()) == variant.storage.nbytes
    store = VariantStore(tmp_path / "variants", 10**9)
    store.put("ab", variant)
    for again in (Variant.unpack(variant.storage, packed), store.get("ab")):
        assert again is not None and again.storage == variant.storage
        assert torch.equal(again.weight, variant.weight)
        assert again.weight.dtype == dtype
        assert all(torch.equal(packed[n], part) for n, part in again.pack().items())


@pytest.mark.parametrize("form", FORMS)
def test_a_storage_survives_json(form: str, rng: torch.Generator) -> None:
    storage = FORMS[form](before("2:4", torch.bfloat16, rng)).storage
    fields = json.loads(json.dumps(asdict(storage)))
    assert Storage(**fields | {"shape": tuple(fields["shape"])}) == storage


def test_what_was_stored_before_there_were_formats_is_read(
    rng: torch.Generator,
) -> None:
    old = {"shape": (4, 8), "dtype": "float32", "kept": 32, "mask": None}
    storage = Storage(**old, bits=8, group=None, symmetric=True)
    parts = {
        "codes": torch.randint(256, (32,), generator=rng).byte(),
        "scales": torch.full((4, 1), 0.5),
    }
    weight = Variant.unpack(storage, parts).weight
    assert torch.equal(weight, (parts["codes"].view(4, 8).float() - 128) * 0.5)


@pytest.mark.parametrize("kind", ["2:4", "bitmap"])
@pytest.mark.parametrize("form", FORMS)
def test_pruned_weights_stay_positive_zeros(
    form: str, kind: str, rng: torch.Generator
) -> None:
    earlier = before(kind, torch.bfloat16, rng)
    weight = FORMS[form](earlier).weight
    assert earlier.mask is not None
    assert not weight[~earlier.mask].any()
    assert not weight[~earlier.mask].signbit().any()


@pytest.mark.parametrize("form", [name for name in FORMS if name != "float-zeros"])
def test_zeros_that_no_mask_tells_stay_as_well(form: str, rng: torch.Generator) -> None:
    weight = torch.randn(8, 64, generator=rng) * (torch.arange(64) % 3 > 0)
    found = FORMS[form](Variant.dense(weight)).weight
    assert not found[:, ::3].any()


def test_channel_scales_divide_what_codes_give() -> None:
    variant = Variant.dense(torch.zeros(1, 4)).quantized(
        torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8),
        torch.tensor([[0.5]]),
        None,
        bits=2,
        group=None,
        channel_scales=torch.tensor([1.0, 2.0, 1.0, 0.25]),
    )
    assert variant.weight.tolist() == [[-1.0, -0.25, 0.0, 2.0]]


def test_zero_points_need_not_be_whole() -> None:
    variant = Variant.dense(torch.zeros(1, 4)).quantized(
        torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8),
        torch.tensor([[2.0]]),
        torch.tensor([[1.25]]),
        bits=2,
        group=None,
        code="int_float_zero",
    )
    assert variant.weight.tolist() == [[-2.5, -0.5, 1.5, 3.5]]


@pytest.mark.parametrize(
    ("name", "worst"), [("fp8_e4m3", 2**-4), ("fp8_e4m3_tensor", 2**-4)]
)
def test_fp8_errs_by_at_most_half_of_its_last_bit(
    name: str, worst: float, rng: torch.Generator
) -> None:
    weight = torch.randn(8, 64, generator=rng)
    found = round_to_codebook(Variant.dense(weight), weight, name, group=None).weight
    normal = weight.abs() > weight.abs().max() / 448 / 64
    assert ((found - weight).abs() <= weight.abs() * worst * 1.001)[normal].all()


def test_finer_formats_err_less(rng: torch.Generator) -> None:
    weight = torch.randn(32, 256, generator=rng)
    groups = {"fp8_e4m3": None, "nf4": 64, "nvfp4": 16, "mxfp4": 32}
    errors = []
    for name, group in groups.items():
        found = round_to_codebook(Variant.dense(weight), weight, name, group=group)
        errors.append(float((found.weight - weight).square().mean()))
    assert errors == sorted(errors)
