import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from autoprune.compression import sweep as sweep_module
from autoprune.compression.factor import Factor, factorise
from autoprune.compression.grids import fit_grid, nearest_codes
from autoprune.compression.stack import Rule, Swept
from autoprune.compression.sweep import sweep
from autoprune.testing import tiny_statistics

PLAIN = Path(__file__).parents[2] / "results" / "methods" / "plain.py"


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    """The paper's algorithm, column by column: what a sweep has to equal."""
    spec = importlib.util.spec_from_file_location("plain", PLAIN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hessian(columns: int) -> torch.Tensor:
    found = tiny_statistics(columns, tokens=8 * columns).hessian
    assert found is not None
    return found


def factor(
    given: torch.Tensor, *, damping: float = 0.01, order: bool = False
) -> Factor:
    return factorise(given, damping=damping, act_order=order, names=["q"])


def one(weight: torch.Tensor, given: torch.Tensor, rule: Rule) -> Swept:
    return sweep([weight], factor(given), [rule])[0][0]


def dequantized(swept: Swept, bits: int) -> torch.Tensor:
    assert swept.codes is not None and swept.scales is not None
    codes = swept.codes.float().view(*swept.scales.shape, -1)
    zeros = 2 ** (bits - 1) if swept.zeros is None else swept.zeros[..., None]
    return ((codes - zeros) * swept.scales[..., None]).view(swept.codes.shape)


@pytest.mark.parametrize("shape", [(2, 4), (32, 20), (8, 128), (16, 300)], ids=str)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77, 0.9])
def test_unstructured_equals_the_plain_implementation(
    shape: tuple[int, int], sparsity: float, plain: ModuleType, rng: torch.Generator
) -> None:
    weight, given = torch.randn(shape, generator=rng), hessian(shape[1])
    expected = plain.sparsegpt(weight, given, sparsity=sparsity)
    swept = one(weight, given, Rule(sparsity=sparsity))
    torch.testing.assert_close(swept.weight, expected, rtol=1e-4, atol=1e-4)
    assert swept.kept is not None and torch.equal(swept.kept, expected != 0)
    assert int((~swept.kept).sum()) == round(sparsity * weight.numel())


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8", "8:16", "16:32"])
@pytest.mark.parametrize("columns", [32, 160, 288])
def test_patterns_equal_the_plain_implementation(
    pattern: str, columns: int, plain: ModuleType, rng: torch.Generator
) -> None:
    weight, given = torch.randn(16, columns, generator=rng), hessian(columns)
    keep, of = (int(number) for number in pattern.split(":"))
    expected = plain.sparsegpt(weight, given, keep=keep, of=of)
    swept = one(weight, given, Rule(pattern=pattern))
    torch.testing.assert_close(swept.weight, expected, rtol=1e-4, atol=1e-4)
    assert swept.kept is not None
    assert (swept.kept.view(16, -1, of).sum(2) == keep).all()


def test_a_pattern_may_straddle_tiles(rng: torch.Generator) -> None:
    swept = one(torch.randn(4, 144, generator=rng), hessian(144), Rule(pattern="5:9"))
    assert swept.kept is not None
    assert (swept.kept.view(4, 16, 9).sum(2) == 5).all()


def test_nothing_to_do_is_the_identity(rng: torch.Generator) -> None:
    weight = torch.randn(8, 40, generator=rng)
    swept = one(weight, hessian(40), Rule())
    assert swept.weight is not None and torch.equal(swept.weight, weight)
    assert swept.kept is None


def test_a_diagonal_hessian_scores_as_wanda_and_changes_no_kept_weight() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [8.0, 7.0, -6.0, 5.0]])
    diagonal = torch.diag(torch.tensor([25.0, 16.0, 1.0, 1.0]))
    # Wanda's |w| * norm: 5, 8, 3, 4 and 40, 28, 6, 5.
    free = factor(diagonal, damping=0.0)
    swept = sweep([weight], free, [Rule(sparsity=0.5)])[0][0]
    assert swept.weight is not None
    assert swept.weight.tolist() == [[0, -2, 0, 0], [8, 7, -6, 0]]
    swept = sweep([weight], free, [Rule(pattern="2:4")])[0][0]
    assert swept.weight is not None
    assert swept.weight.tolist() == [[1, -2, 0, 0], [8, 7, 0, 0]]


def test_a_later_column_makes_good_what_was_lost() -> None:
    # Inputs x and x: the second weight can do the work of the first.
    weight, given = torch.tensor([[1.0, 2.0]]), torch.ones(2, 2) + 1e-6 * torch.eye(2)
    swept = sweep([weight], factor(given, damping=0.0), [Rule(pattern="1:2")])[0][0]
    torch.testing.assert_close(
        swept.weight, torch.tensor([[0.0, 3.0]]), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group", [None, 16, 32])
@pytest.mark.parametrize("order", [False, True], ids=["in order", "by size"])
def test_an_identity_hessian_rounds_to_nearest(
    symmetric: bool, group: int | None, order: bool, rng: torch.Generator
) -> None:
    weight = torch.randn(8, 160, generator=rng)
    rule = Rule(bits=3, group=group, symmetric=symmetric)
    swept = sweep([weight], factor(torch.eye(160), order=order), [rule])[0][0]
    scales, zeros = fit_grid(
        weight, bits=3, group=group, symmetric=symmetric, dtype=torch.float32
    )
    assert swept.scales is not None and torch.equal(swept.scales, scales)
    assert (swept.zeros is None) == symmetric
    assert swept.codes is not None
    assert torch.equal(swept.codes, nearest_codes(weight, scales, zeros, bits=3))


@pytest.mark.parametrize("group", [None, 48, 192])
@pytest.mark.parametrize("order", [False, True], ids=["in order", "by size"])
def test_quantization_equals_rounding_column_by_column(
    group: int | None, order: bool, rng: torch.Generator
) -> None:
    weight, given = torch.randn(12, 192, generator=rng), hessian(192)
    rule = Rule(bits=4, group=group)
    swept = sweep([weight], factor(given, order=order), [rule])[0][0]
    expected = column_by_column(weight, given, group=group or 192, order=order)
    off = (dequantized(swept, 4) - expected).abs() > 1e-3
    # Where a weight lies between two codes, rounding of float32 decides.
    assert off.float().mean() < 0.01


def column_by_column(
    weight: torch.Tensor, given: torch.Tensor, *, group: int, order: bool
) -> torch.Tensor:
    """Quantize to 4 bits as the GPTQ paper says, all in float64."""
    rows, columns = weight.shape
    damped = given.double() + 0.01 * given.diagonal().mean() * torch.eye(columns)
    turn = torch.arange(columns)
    if order:
        turn = given.diagonal().argsort(descending=True, stable=True)
    inverse = torch.linalg.inv(damped[turn][:, turn])
    upper = torch.linalg.cholesky(inverse, upper=True)
    current = weight.double().clone()
    static = order or group == columns
    grids: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for at, column in enumerate(turn.tolist()):
        part = column // group
        if part not in grids:
            source = weight if static else current.float()
            found = source[:, part * group : (part + 1) * group].contiguous()
            grids[part] = fit_grid(
                found, bits=4, group=None, symmetric=False, dtype=torch.float32
            )
        scale, zero = (tensor[:, 0].double() for tensor in grids[part])
        value = current[:, column].clone()
        code = ((value / scale).round() + zero).clamp(0, 15)
        current[:, column] = (code - zero) * scale
        error = (value - current[:, column]) / upper[at, at]
        current[:, turn[at + 1 :]] -= torch.outer(error, upper[at, at + 1 :])
    return current.float()


def loss(weight: torch.Tensor, changed: torch.Tensor, given: torch.Tensor) -> float:
    change = weight - changed
    return float(((change @ given) * change).sum())


def test_an_earlier_mask_stays_and_the_rest_makes_up_for_it(
    rng: torch.Generator,
) -> None:
    weight, given = torch.randn(16, 160, generator=rng), hessian(160)
    kept = torch.rand(16, 160, generator=rng) < 0.5
    weight = torch.where(kept, weight, 0.0)
    swept = sweep([weight], factor(given), [Rule(bits=3)], kept=[kept])[0][0]
    result = dequantized(swept, 3)
    assert not result[~kept].any()
    assert swept.kept is not None and torch.equal(swept.kept, kept)
    scales, zeros = fit_grid(
        weight, bits=3, group=None, symmetric=False, dtype=torch.float32
    )
    codes = nearest_codes(weight, scales, zeros, bits=3)
    rounded = (codes - zeros) * scales
    assert loss(weight, result, given) < loss(weight, rounded, given)


def test_masked_and_unmasked_layers_share_a_sweep(rng: torch.Generator) -> None:
    weights = [torch.randn(4, 32, generator=rng) for _ in range(2)]
    kept = torch.rand(4, 32, generator=rng) < 0.5
    weights[0] = torch.where(kept, weights[0], 0.0)
    given = factor(hessian(32))
    both = sweep(weights, given, [Rule(bits=4)], kept=[kept, None])
    alone = sweep([weights[1]], given, [Rule(bits=4)])[0][0]
    assert both[1][0].codes is not None and alone.codes is not None
    assert torch.equal(both[1][0].codes, alone.codes)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_pruning_and_quantization_in_one_sweep(
    pattern: str | None, rng: torch.Generator
) -> None:
    weight, given = torch.randn(16, 192, generator=rng), hessian(192)
    sparsity = None if pattern else 0.5
    rule = Rule(sparsity=sparsity, pattern=pattern, bits=4, group=32)
    joint = one(weight, given, rule)
    assert joint.kept is not None
    result = dequantized(joint, 4)
    assert not result[~joint.kept].any()
    assert int(joint.kept.sum()) == weight.numel() // 2
    pruned = one(weight, given, Rule(sparsity=sparsity, pattern=pattern)).weight
    assert pruned is not None
    scales, zeros = fit_grid(
        pruned, bits=4, group=32, symmetric=False, dtype=torch.float32
    )
    codes = nearest_codes(pruned, scales, zeros, bits=4).view(16, 6, 32)
    then = ((codes - zeros[..., None]) * scales[..., None]).view(16, 192)
    assert loss(weight, result, given) < loss(weight, then, given)


@pytest.mark.parametrize(
    "rules",
    [
        [Rule(sparsity=level / 10) for level in range(1, 10)],
        [Rule(bits=bits, group=16, symmetric=bits == 4) for bits in (2, 3, 4, 8)],
        [Rule(sparsity=0.5, bits=4), Rule(sparsity=0.3, bits=6)],
        [Rule(pattern="2:4")],
    ],
    ids=["levels", "bits", "joint", "pattern"],
)
def test_stacked_rows_do_not_see_each_other(
    rules: list[Rule], rng: torch.Generator
) -> None:
    weights = [torch.randn(rows, 144, generator=rng) for rows in (6, 3, 9)]
    given = factor(hessian(144))
    together = sweep(weights, given, rules)
    for weight, results in zip(weights, together, strict=True):
        for rule, swept in zip(rules, results, strict=True):
            alone = sweep([weight], given, [rule])[0][0]
            for name in ("weight", "codes", "scales", "zeros", "kept"):
                found, expected = getattr(swept, name), getattr(alone, name)
                assert (found is None) == (expected is None), name
                if found is not None:
                    # The last bit of a sum depends on the number of rows (and on the
                    # processor), and may turn the rounding of a weight that lies
                    # between two codes. What follows from that stays in its own row.
                    off = (found.float() - expected.float()).abs() > 1e-4
                    assert off.flatten(1).any(1).float().mean() <= 1 / 3, name


def test_little_memory_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    weights = [torch.randn(rows, 48, generator=rng) for rows in (6, 3, 9)]
    rules = [Rule(sparsity=level) for level in (0.2, 0.5, 0.7)]
    given = factor(hessian(48))
    expected = sweep(weights, given, rules)
    monkeypatch.setattr(sweep_module, "CHUNK_BYTES", 9 * 48 * 4)
    monkeypatch.setattr(sweep_module, "ROWS_AT_ONCE", 2)
    found = sweep(weights, given, rules)
    assert [len(results) for results in found] == [3, 3, 3]
    for some, others in zip(found, expected, strict=True):
        for first, second in zip(some, others, strict=True):
            torch.testing.assert_close(first.weight, second.weight)


def test_of_equal_scores_the_earlier_in_a_row_are_pruned() -> None:
    swept = sweep([torch.ones(2, 4)], factor(torch.eye(4)), [Rule(sparsity=0.6)])[0][0]
    assert swept.kept is not None
    assert swept.kept.tolist() == [[False] * 4, [False, True, True, True]]


def test_dead_columns_become_zeros(rng: torch.Generator) -> None:
    given = hessian(16)
    given[[2, 9]], given[:, [2, 9]] = 0.0, 0.0
    weight = torch.randn(4, 16, generator=rng)
    for order in (False, True):
        swept = sweep([weight], factor(given, order=order), [Rule(bits=8)])[0][0]
        result = dequantized(swept, 8)
        assert torch.isfinite(result).all() and not result[:, [2, 9]].any()
    pruned = one(weight, given, Rule(sparsity=0.5)).weight
    assert pruned is not None and torch.isfinite(pruned).all()
    assert not pruned[:, [2, 9]].any()


def test_results_come_in_the_type_of_the_layer(rng: torch.Generator) -> None:
    weight, given = torch.randn(4, 32, generator=rng), factor(hessian(32))
    pruned = sweep([weight], given, [Rule(sparsity=0.5)], dtype=torch.bfloat16)[0][0]
    assert pruned.weight is not None and pruned.weight.dtype == torch.bfloat16
    rounded = sweep([weight], given, [Rule(bits=4)], dtype=torch.float16)[0][0]
    assert rounded.scales is not None and rounded.scales.dtype == torch.float16


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "rule", [Rule(sparsity=0.5), Rule(bits=4, group=8), Rule(bits=3)], ids=str
)
def test_weights_of_half_precision_equal_their_float32_copies(
    rule: Rule, dtype: torch.dtype, order: bool, rng: torch.Generator
) -> None:
    weights = [torch.randn(n, 40, generator=rng).to(dtype) for n in (6, 3)]
    kept = [None, torch.rand(3, 40, generator=rng) > 0.3]
    masks = kept if rule.bits else None
    free = factor(hessian(40), order=order)
    half = sweep(weights, free, [rule], kept=masks)
    full = sweep([weight.float() for weight in weights], free, [rule], kept=masks)
    for (one_half,), (one_full,) in zip(half, full, strict=True):
        for name in ("weight", "kept", "codes", "scales", "zeros"):
            found, expected = getattr(one_half, name), getattr(one_full, name)
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)
