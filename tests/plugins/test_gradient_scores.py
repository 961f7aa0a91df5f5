"""Scores from gradients: by hand, by their definitions, and made by a bank."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.gradient_scores import register_methods
from autoprune_plugins.tasks import CausalLM
from autoprune_plugins.wanda import Wanda
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.gradients import LayerGradients, TaskLoss
from autoprune.models.layers import inventory
from autoprune.models.statistics import NO_STATISTICS, InputStatistics
from autoprune.models.text import TokenWindows
from autoprune.policy import Action, Layer, Value
from autoprune.testing import MethodContract, tiny_source, tiny_statistics

METHODS = {method.name: method for method in register_methods()}
LAYER = Layer("q", (2, 4), "float32", block=0, role="q", input="x")
WEIGHT = torch.tensor([[1.0, -4.0, 2.0, -3.0], [-5.0, 6.0, 7.0, -8.0]])
GRADIENT = LayerGradients(
    windows=4,
    mean=torch.tensor([[4.0, -1.0, 1.0, 1.0], [0.5, 1.0, -2.0, 0.0]]),
    square_sum=torch.tensor([[0.0, 16.0, 4.0, 4.0], [4.0, 0.0, 16.0, 1.0]]),
    hessian_gradient=torch.tensor([[-1.0, -1.0, 1.0, 0.0], [2.0, 1.0, -1.0, 1.0]]),
    flow=torch.tensor([[9.0, 1.0, 1.0, 2.0], [1.0, 1.0, 2.0, 1.0]]),
)
# Over four windows the norms of the inputs are 5, 0.5, 1.5 and 0.5 a window.
STATISTICS = InputStatistics(9, torch.tensor([100.0, 1.0, 9.0, 1.0]))
BY_HAND = {
    "gradient": [[4, 1, 1, 1], [0.5, 1, 2, 0]],
    "taylor": [[4, 4, 2, 3], [2.5, 6, 14, 0]],
    "fisher": [[0, 32, 2, 4.5], [12.5, 0, 98, 8]],  # roots 0 2 1 1 and 1 0 2 0.5
    "gblm": [[5, 18, 7, 7.5], [35, 3, 38.5, 12]],  # with a scale of 2
    "grasp": [[-1, 4, 2, 0], [-10, 6, -7, -8]],
    "synflow": [[9, 4, 2, 6], [5, 6, 14, 8]],
}


def source() -> Source:
    return Source(LAYER, Variant.dense(WEIGHT), WEIGHT, GRADIENT)


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_by_hand(name: str) -> None:
    method, params = METHODS[name], {"sparsity": 0.5}
    settings = method.check(params | ({"scale": 2.0} if name == "gblm" else {}))
    found = method.scores(source(), STATISTICS, settings)  # type: ignore[attr-defined]
    assert found.tolist() == BY_HAND[name]


def test_every_method_has_its_scores_by_hand() -> None:
    assert list(METHODS) == list(BY_HAND)


def prune(name: str, **params: Value) -> list[list[float]]:
    method = METHODS[name]
    made = method.compress([source()], STATISTICS, [method.check(params)])
    weight: list[list[float]] = made[0][0].weight.tolist()
    return weight


def test_layers_rows_patterns_and_tiles_by_hand() -> None:
    assert prune("taylor", sparsity=0.5) == [[1, -4, 0, 0], [0, 6, 7, 0]]
    assert prune("taylor", sparsity=0.5, per="row") == [[1, -4, 0, 0], [0, 6, 7, 0]]
    assert prune("synflow", pattern="1:2") == [[1, 0, 0, -3], [0, 6, 7, 0]]
    assert prune("synflow", sparsity=0.5, tile="row") == [[0] * 4, [-5, 6, 7, -8]]
    # Of negative scores the lowest go: what the gradient's norm grows without.
    assert prune("grasp", sparsity=0.5) == [[0, -4, 2, -3], [0, 6, 0, 0]]
    # Columns add up to -11, 10, -5 and -8.
    assert prune("grasp", sparsity=0.5, tile="column") == [
        [0, -4, 2, 0],
        [0, 6, 7, 0],
    ]


def test_gblm_competes_in_rows_and_the_others_in_layers() -> None:
    defaults = {
        name: method.check({"sparsity": 0.5})["per"] for name, method in METHODS.items()
    }
    assert defaults.pop("gblm") == "row"
    assert set(defaults.values()) == {"layer"}


@pytest.mark.parametrize("params", [{"sparsity": 0.4}, {"pattern": "2:4"}], ids=str)
def test_gblm_without_gradients_is_wanda(params: dict[str, Value]) -> None:
    given, statistics, gblm = tiny_source(), tiny_statistics(), METHODS["gblm"]
    settings = gblm.check({**params, "scale": 0.0})
    found = gblm.compress([given], statistics, [settings])[0][0]
    wanda = Wanda().compress([given], statistics, [Wanda().check(params)])[0][0]
    assert torch.equal(found.weight, wanda.weight)
    settings = gblm.check({**params, "scale": 1e9})  # then it is the gradient's alone
    found = gblm.compress([given], statistics, [settings])[0][0]
    fisher = METHODS["fisher"]
    alone = fisher.check({**params, "per": "row"})
    expected = fisher.compress([given], statistics, [alone])[0][0]
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("name", METHODS)
def test_unusable_gradients_are_named(name: str) -> None:
    method, given = METHODS[name], source()
    settings = [method.check({"sparsity": 0.5})]
    with pytest.raises(MethodError, match=r"gradient \(.*\) of q was not gathered"):
        method.compress([replace(given, gradient=None)], STATISTICS, settings)
    empty = replace(given, gradient=LayerGradients(4))
    with pytest.raises(MethodError, match="of q was not gathered"):
        method.compress([empty], STATISTICS, settings)
    nan = torch.full((2, 4), torch.nan)
    broken = replace(given, gradient=LayerGradients(4, nan, nan, nan, nan))
    with pytest.raises(MethodError, match="of q holds NaN or infinity in 8 of 8"):
        method.compress([broken], STATISTICS, settings)
    small = torch.ones(2, 3)
    other = replace(given, gradient=LayerGradients(4, small, small, small, small))
    with pytest.raises(MethodError, match=r"has shape \(2, 3\), but q \(2, 4\)"):
        method.compress([other], STATISTICS, settings)


def windows() -> TokenWindows:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (3, 12), generator=generator)
    return TokenWindows(ids, "statistics", "test", "0" * 16)


@pytest.fixture
def bank(tiny_model: LlamaForCausalLM, tmp_path: Path) -> VariantBank:
    found = inventory(tiny_model, register_architectures())
    return VariantBank(
        StitchedModel(tiny_model, found.layers),
        found,
        Actions(METHODS),
        VariantStore(tmp_path, 10**9),
        windows(),
        "r1",
        loss=TaskLoss(CausalLM(), None),
    )


def gradient_of(model: LlamaForCausalLM, name: str, ids: Tensor) -> Tensor:
    parameter = model.get_parameter(f"{name}.weight").requires_grad_()
    with torch.enable_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits, ids[:, 1:].flatten())
        (found,) = torch.autograd.grad(loss, [parameter])
    parameter.requires_grad_(False)
    return found


def test_a_bank_makes_what_the_definitions_say(
    bank: VariantBank, tiny_model: LlamaForCausalLM
) -> None:
    layer = next(la for la in bank.inventory.layers if la.role == "o_proj")
    ids = bank.tokens.ids
    each = torch.stack([gradient_of(tiny_model, layer.name, w) for w in ids.split(1)])
    seen: list[Tensor] = []
    handle = tiny_model.get_submodule(layer.name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, -2))
    )
    tiny_model(ids)
    handle.remove()
    weight = bank.stitched.dense_weight(layer).clone()
    mean, root = each.mean(0), each.square().mean(0).sqrt()
    inputs = seen[0].norm(dim=0) / 3**0.5
    expected = {
        "gradient": mean.abs(),
        "taylor": (weight * mean).abs(),
        "fisher": weight.square() * root.square(),
        "gblm": weight.abs() * (inputs + 1000 * root),
    }
    actions = {n: Action.parse(f"{n}(sparsity=0.5, per=row)") for n in METHODS}
    every = [la for la in bank.inventory.layers if la.block is not None]
    pairs = [(la, action) for la in every for action in actions.values()]
    assert bank.make(pairs) == len(pairs)
    for name, scores in expected.items():
        variant = bank.get(layer, actions[name])
        assert variant.mask is not None
        kept = scores.argsort(1).argsort(1) >= scores.shape[1] // 2
        assert float((variant.mask == kept).float().mean()) > 0.995, name
        assert torch.equal(variant.weight, weight * variant.mask)


class TestContract(MethodContract):
    @pytest.fixture(params=METHODS)
    def method(self, request: pytest.FixtureRequest) -> CompressionMethod:
        return METHODS[request.param]

    @pytest.fixture(
        params=[
            {"sparsity": 0.5},
            {"sparsity": 0.29, "per": "row"},
            {"pattern": "4:8"},
            {"sparsity": 0.5, "tile": "4x4"},
            {"sparsity": 0.4, "tile": "column"},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> Mapping[str, Value]:
        params: Mapping[str, Value] = request.param
        return params


def test_methods_without_input_statistics_do_not_read_them() -> None:
    for name, method in METHODS.items():
        if "input_norm" not in method.needs:
            settings = [method.check({"sparsity": 0.5})]
            made = method.compress([source()], NO_STATISTICS, settings)
            assert made[0][0].mask is not None, name
