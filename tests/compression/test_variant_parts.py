"""Biases and orders of columns are parts of variants: stored, read, carried along."""

from pathlib import Path
from typing import Any

import pytest
import torch

from autoprune.compression.masks import kept_by_pattern
from autoprune.compression.storage import Storage
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.models.biases import bias_of

ORDER = torch.tensor([7, 0, 2, 5, 1, 3, 4, 6])
BIAS = torch.tensor([1.0, -2.0, 0.5, 3.0])


def dense(rng: torch.Generator) -> Variant:
    return Variant.dense(torch.randn(4, 8, generator=rng).bfloat16())


def permuted(rng: torch.Generator) -> Variant:
    source = dense(rng)
    kept = kept_by_pattern(source.weight.float().abs()[:, ORDER], "2:4")
    kept = kept[:, ORDER.argsort()]
    return source.pruned(source.weight, kept, pattern="2:4", order=ORDER)


def rounded(variant: Variant, rng: torch.Generator) -> Variant:
    codes = torch.randint(1, 16, (4, 8), generator=rng).byte()
    return variant.quantized(codes, torch.rand(4, 2), None, bits=4, group=4)


def factored(variant: Variant, *, alone: bool = False) -> Variant:
    return variant.factored((torch.ones(4, 2), torch.ones(2, 8)), alone=alone)


MAKERS: dict[str, Any] = {
    "bias": lambda rng: dense(rng).biased(BIAS),
    "bias kept by a mask": lambda rng: (v := dense(rng).biased(BIAS)).pruned(
        v.weight, v.weight > 0
    ),
    "bias of codes": lambda rng: rounded(dense(rng).biased(BIAS), rng),
    "bias beside factors": lambda rng: factored(dense(rng).biased(BIAS)),
    "bias of factors alone": lambda rng: factored(dense(rng).biased(BIAS), alone=True),
    "order": permuted,
    "order of codes": lambda rng: rounded(permuted(rng), rng),
    "order and bias": lambda rng: permuted(rng).biased(BIAS),
}


@pytest.mark.parametrize("name", MAKERS)
def test_they_survive_disk_and_packing(
    name: str, rng: torch.Generator, tmp_path: Path
) -> None:
    variant: Variant = MAKERS[name](rng)
    packed, storage = variant.pack(), variant.storage
    assert storage.bias == ("bias" in name) and storage.permuted == ("order" in name)
    found = {n: (str(t.dtype)[6:], tuple(t.shape)) for n, t in packed.items()}
    assert found == {n: (p.dtype, p.shape) for n, p in storage.parts.items()}
    store = VariantStore(tmp_path, 10**9)
    store.put("ab" * 8, variant)
    for again in (Variant.unpack(storage, packed), store.get("ab" * 8)):
        assert again is not None and again.storage == storage
        assert torch.equal(again.weight, variant.weight)
        if storage.bias:
            bias = bias_of(again.weight)
            assert bias is not None and torch.equal(bias, BIAS.bfloat16())
        if storage.permuted:
            assert again.order is not None and torch.equal(again.order, ORDER)
            assert again.mask is not None and variant.mask is not None
            assert torch.equal(again.mask, variant.mask)


def test_what_they_cost(rng: torch.Generator) -> None:
    plain = dense(rng)
    assert plain.biased(BIAS).storage.nbytes == plain.storage.nbytes + 4 * 2
    variant = permuted(rng)
    unordered = Storage((4, 8), "bfloat16", 16, "2:4")
    assert variant.storage.nbytes == unordered.nbytes + 8 * 2  # int16
    wide = Storage((1, 40_000), "bfloat16", 20_000, "2:4", permuted=True)
    assert wide.parts["order"].nbytes == 40_000 * 4  # numbers above 32767


def test_stored_values_follow_the_pattern(rng: torch.Generator) -> None:
    variant = permuted(rng)
    assert variant.mask is not None
    assert (variant.mask[:, ORDER].view(-1, 4).sum(1) == 2).all()
    assert not (variant.mask.view(-1, 4).sum(1) == 2).all()
    groups = variant.weight[:, ORDER]
    assert torch.equal(variant.pack()["values"], groups[groups != 0])


def test_pruning_anew_forgets_the_order(rng: torch.Generator) -> None:
    variant = permuted(rng)
    again = variant.pruned(variant.weight, variant.weight > 0)
    assert again.order is None and not again.storage.permuted
