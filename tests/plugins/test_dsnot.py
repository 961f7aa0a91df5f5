from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.dsnot import DynamicSparseNoTraining, register_methods
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.sparsegpt import SparseGpt
from autoprune_plugins.wanda import Wanda
from torch import Tensor
from transformers import LlamaForCausalLM

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Storage
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.layers import inventory
from autoprune.models.statistics import Gathering, InputStatistics
from autoprune.models.text import TokenWindows
from autoprune.policy import Action, Layer, Value
from autoprune.testing import MethodContract, tiny_source

METHOD = DynamicSparseNoTraining()
LAYER = Layer("q", (1, 4), "float32", block=0, role="q", input="x")


class TestContract(MethodContract):
    refines = True

    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[{}, {"cycles": 3, "threshold": 0.0}],
        ids=["defaults", "few"],
    )
    def params(self, request: pytest.FixtureRequest) -> Mapping[str, Value]:
        params: Mapping[str, Value] = request.param
        return params


def shifted_statistics(columns: int, seed: int = 0) -> InputStatistics:
    """Make the statistics of inputs whose means are not zero."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(256, columns, generator=generator)
    gathering = Gathering({"input_norm", "input_sum", "hessian"}, columns)
    gathering.add(inputs + torch.randn(columns, generator=generator))
    return gathering.result()


def pruned(
    source: Source,
    method: CompressionMethod,
    statistics: InputStatistics,
    **params: Value,
) -> Source:
    settings = [method.check(params)]
    return replace(
        source, variant=method.compress([source], statistics, settings)[0][0]
    )


def refine(source: Source, statistics: InputStatistics, **params: Value) -> Variant:
    return METHOD.compress([source], statistics, [METHOD.check(params)])[0][0]


def mean_errors(
    source: Source, variant: Variant, statistics: InputStatistics
) -> Tensor:
    assert statistics.input_sum is not None and source.dense is not None
    lost = source.dense.float() - variant.weight.float()
    return lost @ statistics.input_sum / statistics.tokens


def hand_made(weight: list[float], kept: list[bool]) -> Source:
    dense = torch.tensor([weight])
    variant = Variant.dense(dense).pruned(dense, torch.tensor([kept]))
    return Source(LAYER, variant, dense)


def moments(mean: list[float], variance: list[float]) -> InputStatistics:
    """Make statistics of one token with the means and variances."""
    first = torch.tensor(mean)
    return InputStatistics(1, first.square() + torch.tensor(variance), input_sum=first)


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["dsnot"]


def test_the_sum_of_inputs_is_gathered() -> None:
    inputs = torch.arange(12.0).view(4, 3)
    gathering = Gathering({"input_sum"}, 3)
    for part in inputs.split(3):
        gathering.add(part.bfloat16())
    assert gathering.result().input_sum.tolist() == [18.0, 22.0, 26.0]


def test_a_swap_worked_by_hand() -> None:
    # All means are 1. Pruned are 3 and 1: the row lacks 4 on average. Of the two, 3
    # has the larger gain, 3 / 1 against 1 / 1. Of the kept 5 and -2, losing -2 helps:
    # it lacks 4 - 3 - 2 = -1, the sign has changed, and the row is done.
    source = hand_made([3.0, 1.0, 5.0, -2.0], [False, False, True, True])
    ones = [1.0, 1.0, 1.0, 1.0]
    variant = refine(source, moments(ones, ones))
    assert variant.weight.tolist() == [[3.0, 0.0, 5.0, 0.0]]
    # If the first input varies ten times as much, the second comes back instead:
    # 0.3 against 1. It lacks 4 - 1 - 2 = 1, and no other weight may go.
    variant = refine(source, moments(ones, [10.0, 1.0, 1.0, 1.0]))
    assert variant.weight.tolist() == [[0.0, 1.0, 5.0, 0.0]]


def test_a_row_that_lacks_little_is_left() -> None:
    source = hand_made([3.0, 1.0, 5.0, -2.0], [False, False, True, True])
    ones = [1.0, 1.0, 1.0, 1.0]
    variant = refine(source, moments(ones, ones), threshold=4.0)
    assert torch.equal(variant.weight, source.variant.weight)


def test_a_swap_that_overshoots_is_not_done() -> None:
    # Lacks 2; bringing it back and losing -9 would leave -9.
    source = hand_made([2.0, 0.0, 5.0, -9.0], [False, False, True, True])
    ones = [1.0, 1.0, 1.0, 1.0]
    variant = refine(source, moments(ones, ones))
    assert torch.equal(variant.weight, source.variant.weight)


def test_a_pattern_swaps_inside_of_a_group() -> None:
    # The first group lacks 3 but has no kept weight whose loss helps; the second does.
    dense = torch.tensor([[3.0, 5.0, 1.0, -2.0]])
    kept = torch.tensor([[False, True, False, True]])
    variant = Variant.dense(dense).pruned(dense, kept, pattern="1:2")
    found = refine(Source(LAYER, variant, dense), moments([1.0] * 4, [1.0] * 4))
    assert found.weight.tolist() == [[0.0, 5.0, 1.0, 0.0]]
    assert found.storage == variant.storage


@pytest.mark.parametrize(
    "params", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"pattern": "1:8"}], ids=str
)
@pytest.mark.parametrize("method", [Wanda(), SparseGpt()], ids=["wanda", "sparsegpt"])
def test_mean_errors_never_grow_and_mostly_vanish(
    method: CompressionMethod, params: dict[str, Value]
) -> None:
    statistics = shifted_statistics(64)
    source = pruned(tiny_source((32, 64)), method, statistics, **params)
    variant = refine(source, statistics)
    before = mean_errors(source, source.variant, statistics).abs()
    after = mean_errors(source, variant, statistics).abs()
    assert (after <= before + 1e-4).all()
    assert after.mean() < 0.85 * before.mean()
    assert variant.storage == source.variant.storage


def test_rows_keep_their_counts_and_weights_their_values() -> None:
    statistics = shifted_statistics(64)
    source = pruned(tiny_source((32, 64)), Wanda(), statistics, sparsity=0.6)
    variant, dense = refine(source, statistics), source.dense
    before = source.variant.mask
    assert before is not None and variant.mask is not None and dense is not None
    assert torch.equal(before.sum(1), variant.mask.sum(1))
    assert not torch.equal(before, variant.mask)
    assert torch.equal(variant.weight, dense * variant.mask)


def test_patterns_hold_in_every_group() -> None:
    statistics = shifted_statistics(64)
    source = pruned(tiny_source((32, 64)), Wanda(), statistics, pattern="4:8")
    variant = refine(source, statistics)
    assert variant.mask is not None
    assert (variant.mask.view(-1, 8).sum(1) == 4).all()


def test_more_cycles_do_not_undo_what_fewer_did() -> None:
    statistics = shifted_statistics(64)
    source = pruned(tiny_source((32, 64)), Wanda(), statistics, sparsity=0.6)
    errors = [
        float(
            mean_errors(source, refine(source, statistics, cycles=n), statistics)
            .abs()
            .sum()
        )
        for n in (1, 2, 4, 50)
    ]
    assert errors == sorted(errors, reverse=True)


def test_inputs_without_a_mean_leave_nothing_to_do() -> None:
    statistics = InputStatistics(9, torch.ones(32), input_sum=torch.zeros(32))
    source = pruned(tiny_source(), Wanda(), statistics, sparsity=0.5)
    assert torch.equal(refine(source, statistics).weight, source.variant.weight)


def test_constant_inputs_give_no_nan() -> None:
    statistics = InputStatistics(
        9, torch.full((32,), 9.0), input_sum=torch.full((32,), 9.0)
    )
    source = pruned(tiny_source(), Wanda(), statistics, sparsity=0.5)
    assert torch.isfinite(refine(source, statistics).weight).all()


@pytest.mark.parametrize(
    ("previous", "reason"),
    [
        (Storage((8, 32), "bfloat16", 256), "nothing is pruned yet: write wanda"),
        (Storage((8, 32), "bfloat16", 128, mask="bitmap"), None),
        (Storage((8, 32), "bfloat16", 128, mask="2:4"), None),
        (
            Storage((8, 32), "bfloat16", 128, mask="1x8"),
            "single weights cannot move in",
        ),
        (
            Storage((8, 32), "bfloat16", 128, mask="2:4", bits=4),
            "already quantized to 4 bits: move the mask before",
        ),
    ],
    ids=["dense", "bitmap", "pattern", "tiles", "quantized"],
)
def test_it_follows_a_step_that_prunes_weights(
    previous: Storage, reason: str | None
) -> None:
    found = METHOD.refuses(tiny_source().layer, previous, METHOD.check({}))
    assert (found or "").startswith(reason or "") and bool(found) == bool(reason)


def test_without_the_dense_weight_it_says_so() -> None:
    statistics = shifted_statistics(32)
    source = replace(
        pruned(tiny_source(), Wanda(), statistics, sparsity=0.5), dense=None
    )
    with pytest.raises(MethodError, match="layers.0.q_proj without its dense weight"):
        refine(source, statistics)


def test_sums_that_were_not_gathered_are_named() -> None:
    statistics = InputStatistics(9, torch.ones(32))
    source = pruned(tiny_source(), Wanda(), statistics, sparsity=0.5)
    with pytest.raises(MethodError, match="the sum of the inputs of layers.0.q_proj"):
        refine(source, statistics)


def test_a_bank_gives_it_the_dense_weight(
    tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    found = inventory(tiny_model, register_architectures())
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    methods = {m.name: m for m in (Wanda(), METHOD, RoundToNearest())}
    bank = VariantBank(
        StitchedModel(tiny_model, found.layers),
        found,
        Actions(methods),
        VariantStore(tmp_path, 10**9),
        TokenWindows(ids, "statistics", "test", "0" * 16),
        "r1",
    )
    layer = next(layer for layer in found.layers if layer.block is not None)
    dense = bank.weight(layer, Action.parse("dense"))
    names = (
        "wanda(sparsity=0.6)",
        "wanda(sparsity=0.6) + dsnot(threshold=0.0)",
        "wanda(sparsity=0.6) + dsnot(threshold=0.0) + rtn(bits=8)",
    )
    plain, moved, rounded = (bank.get(layer, Action.parse(name)) for name in names)
    assert moved.mask is not None and not torch.equal(plain.mask, moved.mask)
    assert torch.equal(moved.weight, dense * moved.mask)
    assert torch.equal(moved.mask, rounded.mask)
