"""What variants cost by themselves, against the plain formulas and plain runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.tasks import CausalLM
from tiny_models import tiny
from tiny_teachers import windows
from torch import Tensor

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.store import VariantStore
from autoprune.evaluation.fisher import output_squares, score_rows
from autoprune.evaluation.sensitivity import output_errors, replacement_costs
from autoprune.evaluation.slopes import measure_slopes
from autoprune.evaluation.teacher import Teacher
from autoprune.models.layers import inventory, read_weight
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Action, Layer

WANDA = Action.parse("wanda(sparsity=0.5)")
ROUND = Action.parse("rtn(bits=3, group=16)")
HALF = Action.parse("magnitude(sparsity=0.5)")


class Case:
    """A bank and a teacher of one tiny model."""

    def __init__(
        self, kind: str, folder: Path, *, text: int = 6, reference: bool = False
    ) -> None:
        self.model = tiny(kind)
        found = inventory(self.model, register_architectures())
        self.layers = found.layers
        self.inside = [la for la in found.layers if la.block is not None]
        self.outside = [la for la in found.layers if la.block is None]
        self.teacher = Teacher(CausalLM(), self.model, windows(text), tokenizer=None)
        self.bank = VariantBank(
            StitchedModel(self.model, found.layers),
            found,
            Actions(load_plugins().methods),
            VariantStore(folder / "variants", 10**9),
            windows(3),
            "r1",
            dict.fromkeys(self.inside, HALF) if reference else {},
            batch=2,
        )

    def wanted(self) -> dict[Layer, list[Action]]:
        return dict.fromkeys(self.inside, [WANDA, ROUND]) | dict.fromkeys(
            self.outside, [ROUND]
        )


def inputs_of(case: Case, layer: Layer) -> Tensor:
    """Catch what a layer reads in an ordinary pass over the bank's text."""
    seen: list[Tensor] = []
    module = case.model.get_submodule(layer.name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    case.model(case.bank.tokens.ids)
    handle.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("reference", [False, True], ids=["dense", "propagated"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_output_errors_are_those_of_outputs(
    kind: str, reference: bool, tmp_path: Path
) -> None:
    case = Case(kind, tmp_path, reference=reference)
    found = output_errors(case.bank, case.wanted())
    assert list(found) == list(case.wanted())
    dense = {la: case.bank.stitched.dense_weight(la).clone() for la in case.layers}
    for layer, actions in case.wanted().items():
        # A block's inputs come through the reference's blocks, and it is dense itself.
        before = {la: a for la, a in case.bank.reference.items() if la.block == 0}
        case.bank.put(before if layer.block == 1 else {})
        changes = [case.bank.weight(layer, a) - dense[layer] for a in actions]
        if layer.input is None:
            plain = [c.square().sum() / dense[layer].square().sum() for c in changes]
        else:
            read = inputs_of(case, layer)
            power = (read @ dense[layer].T).square().sum()
            plain = [(read @ change.T).square().sum() / power for change in changes]
        np.testing.assert_allclose(found[layer], plain, rtol=2e-4)


def test_experts_that_no_token_reaches_err_as_their_weights(tmp_path: Path) -> None:
    case = Case("mixtral", tmp_path)
    case.model.model.layers[0].mlp.gate.weight.zero_()  # all tokens go one way
    reached = torch.zeros(4).softmax(-1).topk(2).indices.tolist()
    experts = [la for la in case.inside if "[" in la.name and la.block == 0]
    found = output_errors(case.bank, dict.fromkeys(experts, [HALF]))
    values = np.array([float(found[layer][0]) for layer in experts])
    assert np.isfinite(values).all() and (values > 0).all()
    for layer in experts:
        weight = read_weight(case.model, layer)
        change = case.bank.weight(layer, HALF) - weight
        plain = float(change.square().sum() / weight.square().sum())
        alike = float(found[layer][0]) == pytest.approx(plain, rel=1e-4)
        assert alike == all(f"[{index}]" not in layer.name for index in reached)


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    case = Case("llama", tmp_path, reference=True)
    policy = dict.fromkeys(case.inside, ROUND)
    case.bank.put(policy)
    before = {name: p.clone() for name, p in case.model.named_parameters()}
    output_errors(case.bank, case.wanted())
    score_rows(case.bank, case.teacher, case.wanted(), [0, 1])
    assert all(torch.equal(p, before[n]) for n, p in case.model.named_parameters())
    assert case.bank.stitched.changes(policy) == {}


def test_scores_foretell_single_and_joint_changes(tmp_path: Path) -> None:
    """Small changes, whose KL is its second order: 8 bits."""
    case = Case("llama", tmp_path, text=40)
    fine = Action.parse("rtn(bits=6, group=16)")
    wanted = dict.fromkeys(case.inside, [fine])
    seen = range(40)
    rows = score_rows(case.bank, case.teacher, wanted, seen, draws=8)
    summed = np.zeros(320)
    for layer in case.inside:
        assert rows[layer].shape == (320, 1)
        summed += rows[layer][:, 0]
    case.bank.put(dict.fromkeys(case.inside, fine))
    actual = case.teacher.measure(case.model, seen).mean_kl
    assert np.square(summed).mean() / 2 == pytest.approx(actual, rel=0.25)


def test_columns_of_two_calls_belong_together(tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    both = score_rows(case.bank, case.teacher, case.wanted(), range(4), draws=2)
    for number, action in enumerate([WANDA, ROUND]):
        wanted = dict.fromkeys(case.inside, [action])
        alone = score_rows(case.bank, case.teacher, wanted, range(4), draws=2)
        for layer in case.inside:
            np.testing.assert_allclose(
                both[layer][:, number], alone[layer][:, 0], rtol=1e-4, atol=1e-6
            )


def test_output_squares_are_those_of_the_dense_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands on it, and in however many parts variants pass."""
    case = Case("llama", tmp_path)
    wanted = {**case.wanted(), case.inside[0]: []}
    case.bank.put({})
    variants = {
        layer: [case.bank.weight(layer, action) for action in actions]
        for layer, actions in wanted.items()
        if actions
    }
    plain = measure_slopes(
        case.model, case.teacher, variants, range(4), draws=2, apart=True
    )
    case.bank.put(dict.fromkeys(case.inside, HALF))
    monkeypatch.setattr("autoprune.evaluation.fisher.memory_bytes", lambda: 40_000)
    found = output_squares(case.bank, case.teacher, wanted, range(4), draws=2)
    assert found.keys() == wanted.keys() and found[case.inside[0]].shape == (0,)
    for layer, slopes in plain.items():
        np.testing.assert_allclose(found[layer], slopes.apart, rtol=1e-4)
        assert (found[layer] > 0).all()


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "incumbent"])
def test_replacements_cost_what_whole_runs_tell(
    compressed: bool, tmp_path: Path
) -> None:
    case = Case("llama", tmp_path)
    base = dict.fromkeys(case.inside, ROUND) if compressed else {}
    changes = [{layer: HALF} for layer in case.inside[::-1]]
    changes += [{layer: ROUND} for layer in case.outside]
    changes += [dict.fromkeys(case.inside[2:4], DENSE)]
    found = list(replacement_costs(case.bank, case.teacher, changes, [0, 3], base=base))
    case.bank.put(base)
    start = case.teacher.measure(case.model, [0, 3]).mean_kl
    for change, cost in zip(changes, found, strict=True):
        case.bank.put(base | change)
        whole = case.teacher.measure(case.model, [0, 3]).mean_kl
        assert cost == whole - start
    assert (max(found) > 1e-3) and (compressed or min(found) > -1e-6)


def test_a_bias_is_part_of_what_a_layer_gives(tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    both = [Action.parse(f"flap(keep=0.5, bias={b})") for b in ("true", "false")]
    takers = [la for la in case.inside if la.role in ("o_proj", "down_proj")]
    found = output_errors(case.bank, dict.fromkeys(takers, both))
    for layer in takers:
        case.bank.put({})
        weight = read_weight(case.model, layer).clone()
        read = inputs_of(case, layer)
        for action, error in zip(both, found[layer], strict=True):
            variant = case.bank.get(layer, action)
            left = read @ (variant.weight - weight).T
            left = left if variant.bias is None else left + variant.bias
            plain = left.square().sum() / (read @ weight.T).square().sum()
            assert error == pytest.approx(float(plain), rel=1e-3)
        assert found[layer][0] < found[layer][1]
