import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.gptq import Gptq
from autoprune_plugins.low_rank import (
    ActivationSvd,
    Eora,
    InputWeights,
    LowRank,
    SlimLora,
    TruncatedSvd,
    best_factors,
    register_methods,
)
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.rtn import RoundToNearest
from tiny_runs import config_of, write_text
from tiny_scenes import tiny_scene
from transformers import LlamaForCausalLM

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.evaluation.compute import GflopPerToken
from autoprune.evaluation.size import Sparsity
from autoprune.models.layers import inventory
from autoprune.models.statistics import InputStatistics
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer, Policy, Value
from autoprune.searching.plan import Plan
from autoprune.searching.prefilter import cheap_scores
from autoprune.searching.space import SearchSpace
from autoprune.testing import (
    MethodContract,
    output_error,
    tiny_source,
    tiny_statistics,
)

Params = dict[str, Value]
CASES: list[tuple[LowRank, Params]] = [
    (Eora(), {"rank": 3}),
    (Eora(), {"size": 0.4, "damping": 0.1}),
    (SlimLora(), {"rank": 2}),
    (TruncatedSvd(), {"rank": 4}),
    (TruncatedSvd(), {"size": 0.5}),
    (ActivationSvd(), {"rank": 1}),
]


class TestContract(MethodContract):
    @pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
    def case(self, request: pytest.FixtureRequest) -> tuple[LowRank, Params]:
        case: tuple[LowRank, Params] = request.param
        return case

    @pytest.fixture
    def method(self, case: tuple[LowRank, Params]) -> CompressionMethod:
        return case[0]

    @pytest.fixture
    def params(self, case: tuple[LowRank, Params]) -> Mapping[str, Value]:
        return case[1]


def make(
    method: CompressionMethod,
    source: Source,
    statistics: InputStatistics | None = None,
    **params: Value,
) -> Variant:
    statistics = statistics or tiny_statistics(source.layer.shape[1])
    return method.compress([source], statistics, [method.check(params)])[0][0]


def rounded(shape: tuple[int, int] = (8, 32)) -> Source:
    """A float32 layer rounded to 3 bits."""
    source = tiny_source(shape, dtype=torch.float32)
    return Source(source.layer, make(RoundToNearest(), source, bits=3), source.dense)


def change(source: Source, variant: Variant) -> torch.Tensor:
    assert source.dense is not None
    return source.dense.double() - variant.weight.double()


def best_by_cholesky(
    error: torch.Tensor, hessian: torch.Tensor, rank: int
) -> torch.Tensor:
    """Give the best approximation of a rank: truncate ``E L``, and go back."""
    lower = torch.linalg.cholesky(hessian.double())
    u, s, v = torch.linalg.svd(error.double() @ lower, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    return torch.linalg.solve_triangular(lower, best, upper=False, left=False)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("shape", [(8, 32), (48, 16), (16, 16)], ids=str)
def test_eora_is_the_best_of_its_rank_for_the_outputs(
    shape: tuple[int, int], rank: int
) -> None:
    source, statistics = rounded(shape), tiny_statistics(shape[1])
    variant = make(Eora(), source, statistics, rank=rank, damping=0.0)
    assert variant.low_rank is not None and statistics.hessian is not None
    left, right = variant.low_rank
    error = change(source, source.variant)
    expected = best_by_cholesky(error, statistics.hessian, rank)
    torch.testing.assert_close((left @ right).double(), expected, rtol=1e-4, atol=1e-5)


def test_no_random_factors_do_better_for_the_outputs() -> None:
    source, statistics = rounded(), tiny_statistics()
    hessian = statistics.hessian
    assert hessian is not None and source.dense is not None
    ours = make(Eora(), source, statistics, rank=2, damping=0.0)
    dense = Variant.dense(source.dense)
    generator = torch.Generator().manual_seed(3)
    assert ours.low_rank is not None
    for _ in range(50):
        left, right = (
            factor + 0.05 * torch.randn(factor.shape, generator=generator)
            for factor in ours.low_rank
        )
        other = source.variant.factored((left, right))
        assert output_error(dense, ours, statistics) < output_error(
            dense, other, statistics
        )


@pytest.mark.parametrize("method", [Eora(), SlimLora()], ids=lambda m: m.name)
@pytest.mark.parametrize("shape", [(8, 32), (40, 16)], ids=str)
def test_full_rank_gives_the_dense_weight_back(
    method: LowRank, shape: tuple[int, int]
) -> None:
    source = rounded(shape)
    variant = make(method, source, rank=min(shape))
    torch.testing.assert_close(variant.weight, source.dense, rtol=1e-4, atol=1e-5)
    alone = tiny_source(shape, dtype=torch.float32)
    for one in (TruncatedSvd(), ActivationSvd()):
        weight = make(one, alone, rank=min(shape)).weight
        torch.testing.assert_close(weight, alone.dense, rtol=1e-4, atol=1e-5)


def test_slim_weighs_inputs_by_their_size() -> None:
    """Worked by hand: of two errors the one at the louder input is made good."""
    layer = Layer("l", (2, 2), "float32", 0, "q", "in")
    dense = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    compressed = Variant.dense(torch.zeros(2, 2))
    source = Source(layer, compressed, dense)
    quiet = InputStatistics(1, torch.tensor([1.0, 1.0]))
    loud = InputStatistics(1, torch.tensor([1.0, 4.0]))
    first, second = (make(SlimLora(), source, s, rank=1).weight for s in (quiet, loud))
    torch.testing.assert_close(first, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(second, torch.tensor([[0.0, 0.0], [0.0, 2.0]]))


def test_equal_inputs_make_all_weighings_plain_decompositions() -> None:
    statistics = InputStatistics(32, torch.full((32,), 5.0), 5 * torch.eye(32))
    source = rounded()
    error = change(source, source.variant)
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    plain = (u[:, :3] * s[:3]) @ v[:3]
    for method in (Eora(), SlimLora()):
        factors = make(method, source, statistics, rank=3).low_rank
        assert factors is not None
        product = (factors[0] @ factors[1]).double()
        torch.testing.assert_close(product, plain, rtol=1e-4, atol=1e-5)
    dense = tiny_source(dtype=torch.float32)
    one = make(TruncatedSvd(), dense, statistics, rank=3).weight
    other = make(ActivationSvd(), dense, statistics, rank=3).weight
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_never_seen_are_left_to_the_weights() -> None:
    """A singular Hessian needs no inverse: factors of a sum stay finite and best."""
    statistics = tiny_statistics(tokens=5)
    variant = make(Eora(), rounded(), statistics, rank=6, damping=0.0)
    dense = rounded().dense
    assert dense is not None
    left = output_error(Variant.dense(dense), variant, statistics)
    assert variant.weight.isfinite().all() and left < 1e-3


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_factors_make_a_compressed_layer_better(rank: int) -> None:
    source, statistics = tiny_source(), tiny_statistics()
    pruned = make(Magnitude(), source, pattern="2:4")
    steps = Source(source.layer, pruned, source.dense)
    both = make(Gptq(), steps, statistics, bits=3, group=16)
    last = Source(source.layer, both, source.dense)
    better = make(Eora(), last, statistics, rank=rank)
    before = output_error(source.variant, both, statistics)
    after = output_error(source.variant, better, statistics)
    assert after < before * (1 - rank / 10)
    assert torch.equal(better.base, both.weight)  # the compressed part stays


def test_storage_counts_the_factors_to_the_byte() -> None:
    source = tiny_source()
    variant = make(Eora(), rounded(), rank=3)
    assert variant.storage.nbytes - rounded().variant.storage.nbytes == 4 * 3 * 40
    assert variant.storage.stored == 256 + 120
    alone = make(TruncatedSvd(), source, rank=3).storage
    assert alone.nbytes == 2 * 3 * 40
    assert list(alone.parts) == ["low_rank_a", "low_rank_b"]
    assert (alone.kept, alone.stored) == (0, 120)


def test_size_is_never_passed() -> None:
    source = tiny_source()
    assert make(TruncatedSvd(), source, size=0.5).storage.low_rank == 3  # 128 / 40
    assert make(TruncatedSvd(), source, size=0.01).storage.low_rank == 1


def test_several_ranks_share_a_decomposition_and_agree() -> None:
    method, source, statistics = Eora(), rounded(), tiny_statistics()
    params: list[Params] = [{"rank": 2}, {"rank": 5, "damping": 0.5}, {"rank": 4}]
    settings = [method.check(one) for one in params]
    together = method.compress([source], statistics, settings)[0]
    for one, variant in zip(params, together, strict=True):
        alone = make(method, source, statistics, **one)
        torch.testing.assert_close(variant.weight, alone.weight, rtol=1e-5, atol=1e-6)


def test_the_right_factor_makes_up_for_the_rounding_of_the_left() -> None:
    error = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).double()
    weights = InputWeights(torch.ones(32, dtype=torch.float64))
    (left, right), *_ = best_factors(error, weights, [8], torch.bfloat16)
    plain = left.double() @ (left.double().t() @ error).bfloat16().double()
    ours = left.double() @ right.double()
    assert (ours - error).norm() < 0.8 * (plain - error).norm()


def test_metrics_count_factors_as_what_is_stored() -> None:
    """Factors are no zeros: they cost bytes and products, alone or beside a layer."""
    scene = tiny_scene("llama")
    layer = next(la for la in scene.layers if la.block == 0)
    dense = scene.dense_storages[layer]
    pruned = dense.masked(layer.numel // 2, "2:4")
    numbers = 2 * sum(layer.shape)
    for storage, stored in (
        (dense.factored(2, alone=True), numbers),
        (pruned.factored(2), layer.numel // 2 + numbers),
    ):
        assert Sparsity().price(layer, storage, scene) == stored
        assert GflopPerToken().price(layer, storage, scene) == 2 * stored / 1e9
    assert pruned.factored(2).sparsity == 0.5  # of what the factors stand beside


def test_the_prefilter_foresees_what_factors_are_worth(
    tiny_model: LlamaForCausalLM,
) -> None:
    methods = [*register_methods(), RoundToNearest(), Magnitude()]
    actions = Actions({method.name: method for method in methods})
    found = inventory(tiny_model, register_architectures())
    stitched = StitchedModel(tiny_model, found.layers)
    texts = [
        "svd(rank=4)",
        "svd(rank=16)",
        "rtn(bits=2)",
        "rtn(bits=2) + eora(rank=4)",
        "rtn(bits=2) + eora(rank=16)",
    ]
    site = next(site for site in found.sites if site.layers[0].block == 0)
    space = SearchSpace((site,), {site.name: tuple(map(Action.parse, texts))})
    few, many, alone, little, more = cheap_scores(stitched, actions, space)[0]
    assert 0 < many < few
    assert 0 < more < little < alone


def test_a_bank_makes_stores_and_measures_them(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    texts = ["rtn(bits=2, group=16)", "rtn(bits=2, group=16) + eora(rank=8)"]
    texts += ["magnitude(pattern=2:4) + rtn(bits=4) + slim_lora(rank=4)"]
    texts += ["svd(size=0.5)", "activation_svd(size=0.5)"]
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        space=[{"actions": texts}],
        objective={"budgets": {"size_bytes": "90%"}},
        bank="dense",
    )
    plan = Plan.make(config, load_plugins(["autoprune_plugins.low_rank"]))
    kl = {}
    for action in map(Action.parse, texts):
        choices = plan.problem.space.choices
        policy = Policy({s: action if len(c) > 1 else c[0] for s, c in choices.items()})
        kl[str(action)] = plan.bench.measure(policy, plan.bank, "fitness").metrics["kl"]
        for layer, own in plan.bench.per_layer(policy).items():
            variant = plan.bank.get(layer, own)  # as the store gives it back
            assert variant.storage == plan.bench.actions.storage(layer, own)
            assert (variant.low_rank is None) == (variant.storage.low_rank is None)
    assert kl[texts[1]] < 0.5 * kl[texts[0]]
    assert kl[texts[4]] < kl[texts[3]]


REFUSED = {
    "eora(rank=2)": "it is dense: there is no error to make good",
    "rtn(bits=4) + svd(rank=2)": "svd stands alone: to make good an error, use eora",
    "svd(rank=2) + rtn(bits=4)": "low-rank factors: they are the last step",
    "svd(rank=2) + magnitude(sparsity=0.5)": "low-rank factors: they are the last step",
    "rtn(bits=4) + eora(rank=2) + eora(rank=2)": "they are the last step",
    "rtn(bits=4) + eora(rank=9)": "rank 9 is larger than the smaller side of 8 x 32",
    "svd(rank=7)": "rank 7 stores 280 numbers, dense 256",
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.items(), ids=list(REFUSED))
def test_steps_that_make_no_sense_are_refused(text: str, reason: str) -> None:
    methods = [*register_methods(), RoundToNearest(), Magnitude()]
    actions = Actions({method.name: method for method in methods})
    layer = tiny_source().layer
    assert reason in (actions.refuses(layer, Action.parse(text)) or "")


def test_factors_follow_pruning_and_quantization() -> None:
    methods = [*register_methods(), RoundToNearest(), Magnitude()]
    actions = Actions({method.name: method for method in methods})
    layer = tiny_source().layer
    action = Action.parse("magnitude(pattern=2:4) + rtn(bits=4) + eora(rank=2)")
    assert actions.storage(layer, action) == Storage(
        (8, 32), "bfloat16", 128, mask="2:4", bits=4, low_rank=2
    )


@pytest.mark.parametrize(
    ("params", "found"), [({}, "neither"), ({"rank": 4, "size": 0.5}, "4 and 0.5")]
)
def test_rank_or_size(params: Params, found: str) -> None:
    message = f"svd takes either rank or size, found {found}. Write svd(rank=16)"
    with pytest.raises(MethodError, match=re.escape(message)):
        TruncatedSvd().check(params)


def test_without_the_dense_weight_there_is_no_error_to_make_good() -> None:
    source = rounded()
    lost = Source(source.layer, source.variant)
    with pytest.raises(MethodError, match=r"eora needs the dense weight of layers\.0"):
        make(Eora(), lost, rank=2)


def test_they_are_registered() -> None:
    names = [method.name for method in register_methods()]
    assert names == ["eora", "slim_lora", "svd", "activation_svd"]
