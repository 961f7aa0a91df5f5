"""What follows from the dense weight is left out of files, and comes back exactly."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from autoprune.compression.actions import Actions
from autoprune.compression.derived import derived_from
from autoprune.compression.grids import fit_grid, nearest_codes
from autoprune.compression.making import Making
from autoprune.compression.masks import kept_by_pattern
from autoprune.compression.method import Source
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.errors import StoreError
from autoprune.models.statistics import NO_STATISTICS
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer

KEY = "ab" + "0" * 14


def weight(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(6, 32, generator=generator).to(dtype)
    made[0, 0], made[0, 1] = 0.0, -0.0
    return made


@pytest.fixture
def store(tmp_path: Path) -> VariantStore:
    return VariantStore(tmp_path / "variants", 10**9)


def stored(store: VariantStore) -> set[str]:
    with safe_open(store.files.path(KEY), framework="pt") as file:
        return set(file.keys())


def halved(dense: Tensor) -> Tensor:
    return kept_by_pattern(dense.float().abs(), "2:4")


def pruned(dense: Tensor) -> Variant:
    return Variant.dense(dense).pruned(dense, halved(dense))


def patterned(dense: Tensor) -> Variant:
    return Variant.dense(dense).pruned(dense, halved(dense), pattern="2:4")


def reordered(dense: Tensor) -> Variant:
    order = torch.arange(32).flip(0)
    kept = halved(dense[:, order])[:, order.argsort()]
    return Variant.dense(dense).pruned(dense, kept, pattern="2:4", order=order)


def biased(dense: Tensor) -> Variant:
    return pruned(dense).biased(torch.ones(6))


def corrected(dense: Tensor) -> Variant:
    return pruned(dense).factored((torch.ones(6, 2), torch.ones(2, 32)))


def rounded(dense: Tensor, *, of: Variant | None = None, **how: bool) -> Variant:
    symmetric = how.get("symmetric", False)
    scales, zeros = fit_grid(
        dense.float(), bits=4, group=8, symmetric=symmetric, dtype=dense.dtype
    )
    codes = nearest_codes(dense.float(), scales, zeros, bits=4)
    given = None if symmetric else zeros.byte()
    return (of or Variant.dense(dense)).quantized(codes, scales, given, bits=4, group=8)


def both(dense: Tensor) -> Variant:
    return rounded(dense, of=patterned(dense))


CASES: dict[str, tuple[Callable[[Tensor], Variant], set[str]]] = {
    "pruned": (pruned, {"mask"}),
    "2:4": (patterned, {"mask"}),
    "in another order": (reordered, {"mask", "order"}),
    "with a bias": (biased, {"mask", "added_bias"}),
    "with factors": (corrected, {"mask", "low_rank_a", "low_rank_b"}),
    "rounded": (rounded, {"scales", "zeros"}),
    "symmetric": (lambda dense: rounded(dense, symmetric=True), {"scales"}),
    "pruned and rounded": (both, {"mask", "scales", "zeros"}),
    "dense": (Variant.dense, set()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("make", "parts"), CASES.values(), ids=CASES)
def test_a_recipe_gives_the_same_variant(
    make: Callable[[Tensor], Variant],
    parts: set[str],
    dtype: torch.dtype,
    store: VariantStore,
) -> None:
    dense = weight(dtype)
    variant = make(dense)
    store.put(KEY, variant, dense=dense)
    assert stored(store) == parts
    found = store.get(KEY, lambda: dense)
    assert found is not None
    assert found.storage == variant.storage  # what it costs is as it was
    packed, again = variant.pack(), found.pack()
    assert packed.keys() == again.keys()
    for name, part in packed.items():
        assert torch.equal(part.view(torch.uint8), again[name].view(torch.uint8)), name
    assert torch.equal(found.weight, variant.weight)


def test_a_recipe_does_not_share_the_models_weight(store: VariantStore) -> None:
    dense = weight()
    store.put(KEY, Variant.dense(dense), dense=dense)
    found = store.get(KEY, lambda: dense)
    before = dense.clone()
    dense.zero_()
    assert found is not None and torch.equal(found.weight, before)


def other_values(dense: Tensor) -> Variant:
    changed = dense.clone()
    changed[5, 31] += 1
    return Variant.dense(dense).pruned(changed, torch.ones_like(dense).bool())


def other_sign_of_zero(dense: Tensor) -> Variant:
    changed = dense.clone()
    changed[0, 1] = 0.0
    return Variant.dense(dense).pruned(changed, torch.ones_like(dense).bool())


def other_code(dense: Tensor) -> Variant:
    variant = rounded(dense)
    assert variant.codes is not None
    variant.codes[5, 31] ^= 1
    return variant


def other_shape(dense: Tensor) -> Variant:
    return Variant.dense(dense[:, :16].contiguous())


def other_type(dense: Tensor) -> Variant:
    return Variant.dense(dense.float())


OTHERS = [other_values, other_sign_of_zero, other_code, other_shape, other_type]


@pytest.mark.parametrize("make", OTHERS)
def test_what_does_not_follow_is_stored(
    make: Callable[[Tensor], Variant], store: VariantStore
) -> None:
    dense = weight()
    variant = make(dense)
    assert derived_from(variant, dense) is None
    store.put(KEY, variant, dense=dense)
    assert stored(store) == set(variant.storage.parts)
    found = store.get(KEY)
    assert found is not None and torch.equal(found.weight, variant.weight)


def test_rows_are_taken_some_at_a_time(
    store: VariantStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoprune.compression.derived._NUMBERS", 70)  # two rows
    dense = weight()
    for make in (both, pruned):
        store.put(KEY, make(dense), dense=dense)
        found = store.get(KEY, lambda: dense)
        assert found is not None and torch.equal(found.weight, make(dense).weight)
    assert derived_from(other_values(dense), dense) is None
    assert derived_from(other_code(dense), dense) is None


def test_a_recipe_that_gives_something_else_is_made_again(
    store: VariantStore, caplog: pytest.LogCaptureFixture
) -> None:
    dense = weight()
    store.put(KEY, pruned(dense), dense=dense)
    with caplog.at_level(logging.WARNING):
        assert store.get(KEY, lambda: dense * 2) is None
    assert "is damaged (it does not fit the dense weight)" in caplog.text
    assert KEY not in store


def test_a_recipe_without_its_weight_is_refused(store: VariantStore) -> None:
    dense = weight()
    store.put(KEY, pruned(dense), dense=dense)
    with pytest.raises(StoreError, match=f"{KEY}.* Give that weight to read it"):
        store.get(KEY)


METHODS = load_plugins().methods
FOLLOWING = [
    "magnitude(sparsity=0.5)",
    "magnitude(pattern=2:4)",
    "random(sparsity=0.3)",
    "rtn(bits=4, group=32)",
    "rtn(bits=3, symmetric=true)",
    "int8_dynamic",
    "magnitude(sparsity=0.5) + rtn(bits=4)",
    "drop",
]


@pytest.mark.parametrize("text", FOLLOWING)
def test_methods_that_only_choose_or_round_are_stored_as_recipes(text: str) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(64, 64, generator=generator).bfloat16()
    layer = Layer("l", (64, 64), "bfloat16", 0, "x", "l")
    actions = Actions(METHODS)
    action = actions.canonical(Action.parse(text))
    source = Source(layer, Variant.dense(dense), dense)
    tails = {action: action.steps}
    ((_, (variant,)),) = Making(actions).grow([source], tails, NO_STATISTICS)
    derived = derived_from(variant, dense)
    assert derived is not None
    assert derived.name == ("codes" if variant.storage.bits else "values")
