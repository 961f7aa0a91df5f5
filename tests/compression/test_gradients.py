"""A bank gives methods the gradients of the dense model, in one go and when needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.gradient_scores import register_methods
from autoprune_plugins.tasks import CausalLM, MaskedLM
from autoprune_plugins.taylor_units import TaylorChannels
from tiny_models import tiny
from torch import Tensor, nn
from toy_methods import toys

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.gradients import measure_gradients
from autoprune.compression.needs import gradient_needs
from autoprune.compression.store import VariantStore
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.gradients import TaskLoss
from autoprune.models.layers import inventory
from autoprune.models.text import TokenWindows
from autoprune.models.weights import read_weight
from autoprune.policy import DENSE, Action, Layer

TAYLOR, GBLM, SYNFLOW = map(
    Action.parse,
    ("taylor(sparsity=0.5)", "gblm(sparsity=0.5)", "synflow(sparsity=0.5)"),
)
EARLY, CHANNELS = map(Action.parse, ("early(keep=8)", "taylor_channels(keep=0.5)"))


@dataclass(frozen=True, eq=False)
class Counted(TaskLoss):
    """Tells what each pass saw of the model: the sum of its first weights' sizes."""

    passes: list[float] = field(default_factory=list)

    def backward(self, model: nn.Module, ids: Tensor, **options: Any) -> None:
        self.passes.append(float(model.get_parameter(FIRST).detach().abs().sum()))
        super().backward(model, ids, **options)


FIRST = "model.layers.0.self_attn.q_proj.weight"


class Bench:
    """Opens banks of one model and one folder."""

    def __init__(self, folder: Path, kind: str = "llama") -> None:
        self.model = tiny(kind)
        self.found = inventory(self.model, register_architectures())
        self.layers = [layer for layer in self.found.layers if layer.block is not None]
        self.stitched = StitchedModel(self.model, self.found.layers)
        self.store = VariantStore(folder, 10**9)
        self.loss = Counted(CausalLM(), None)
        gradients = [*register_methods(), TaylorChannels()]
        self.actions = Actions({**toys(), **{m.name: m for m in gradients}})

    def bank(
        self,
        reference: Mapping[Layer, Action] | None = None,
        *,
        seed: int = 0,
        revision: str = "r1",
        loss: TaskLoss | None = None,
    ) -> VariantBank:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 60, (3, 12), generator=generator)
        return VariantBank(
            self.stitched,
            self.found,
            self.actions,
            self.store,
            TokenWindows(ids, "statistics", "test", f"{seed:016x}"),
            revision,
            reference or {},
            batch=2,
            loss=loss or self.loss,
        )

    def make(self, bank: VariantBank, *actions: Action) -> list[Variant]:
        bank.make([(la, action) for la in self.layers for action in actions])
        return [bank.get(la, action) for la in self.layers for action in actions]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def weights(variants: Sequence[Variant]) -> Tensor:
    return torch.cat([variant.weight.flatten() for variant in variants])


def test_one_call_of_make_takes_one_pass_a_window(bench: Bench) -> None:
    bench.make(bench.bank(), TAYLOR, GBLM, EARLY)
    assert len(bench.loss.passes) == 3
    bench.make(bench.bank(), TAYLOR, GBLM, EARLY)  # all is in the store
    assert len(bench.loss.passes) == 3


def test_without_such_methods_there_is_no_pass(bench: Bench) -> None:
    bench.make(bench.bank(), EARLY, Action.parse("norm(keep=8)"))
    assert bench.loss.passes == []
    bench.make(bench.bank(), SYNFLOW)  # it needs no loss
    assert bench.loss.passes == []


def test_gradients_are_those_of_the_dense_model(bench: Bench) -> None:
    bank, first = bench.bank(), bench.layers[0]
    dense = float(read_weight(bench.model, first).abs().sum())
    alone = bench.make(bank, TAYLOR)
    other = Bench(bench.store.folder / "other")
    bank = other.bank()
    bank.put({first: EARLY, other.layers[9]: EARLY})
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    found = other.make(bank, TAYLOR)
    assert torch.equal(weights(found), weights(alone))
    assert set(bench.loss.passes + other.loss.passes) == {dense}
    after = other.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert other.stitched.actions[first] == EARLY


def test_a_key_depends_on_text_and_task_and_not_on_the_reference(bench: Bench) -> None:
    layer, bank = bench.layers[-1], bench.bank()
    others = {
        "text": bench.bank(seed=1),
        "revision": bench.bank(revision="r2"),
        "task": bench.bank(loss=TaskLoss(MaskedLM(), None)),
    }
    for name, other in others.items():
        for action in (TAYLOR, GBLM, CHANNELS):
            assert other.key(layer, action) != bank.key(layer, action), name
    assert others["task"].key(layer, EARLY) == bank.key(layer, EARLY)
    assert others["task"].name == bank.name
    propagated = bench.bank(dict.fromkeys(bench.layers, EARLY))
    assert propagated.key(layer, TAYLOR) == bank.key(layer, TAYLOR)
    assert propagated.key(layer, GBLM) != bank.key(layer, GBLM)  # it reads inputs too


def test_the_type_of_computation_counts(bench: Bench, tmp_path: Path) -> None:
    half = Bench(tmp_path)
    half.stitched = StitchedModel(
        half.model, half.found.layers, compute_dtype=torch.bfloat16
    )
    layer = bench.layers[0]
    assert half.bank().key(layer, TAYLOR) != bench.bank().key(layer, TAYLOR)


def test_gradients_do_not_depend_on_the_reference_that_gives_inputs(
    bench: Bench,
) -> None:
    """Also where the reference's own variants have to be made on the way."""
    reference = dict.fromkeys(bench.layers, TAYLOR)
    bank = bench.bank(reference)
    last = [la for la in bench.layers if la.role == "down_proj"][-1]
    made = bank.get(last, GBLM)
    assert len(bench.loss.passes) == 3
    expected = Bench(bench.store.folder / "other")
    plain = expected.make(expected.bank(), TAYLOR)
    found = [bank.get(layer, TAYLOR) for layer in bench.layers]
    assert torch.equal(weights(found), weights(plain))
    assert not torch.equal(made.weight, expected.bank().get(last, GBLM).weight)


def test_a_structured_step_gets_the_gradients_of_its_site(bench: Bench) -> None:
    group = next(g for g in bench.found.groups if g.kind == "channels")
    layer = group.layers[0]
    needs = gradient_needs(bench.actions, bench.found, [(layer, CHANNELS)])
    assert needs.keys() == set(group.layers)
    kept = [bench.bank().get(one, CHANNELS).weight for one in group.layers]
    lines = [kept[0].any(1), kept[1].any(1), kept[2].any(0)]
    assert all(torch.equal(line, lines[0]) for line in lines)
    assert int(lines[0].sum()) == len(lines[0]) // 2


def test_what_layers_need_is_told(bench: Bench) -> None:
    first, second, third = bench.layers[:3]
    pairs = [
        (first, TAYLOR),
        (first, SYNFLOW),
        (second, GBLM),
        (second, EARLY),
        (third, EARLY),
        (third, DENSE),
    ]
    assert gradient_needs(bench.actions, bench.found, pairs) == {
        first: {"gradient", "synaptic_flow"},
        second: {"gradient_square"},
    }


def test_everything_is_measured_together(bench: Bench) -> None:
    bank, (first, second) = bench.bank(), bench.layers[:2]
    needs = {
        first: {"gradient", "hessian_gradient", "synaptic_flow"},
        second: {"gradient_square", "hessian_gradient"},
    }
    found = measure_gradients(
        bench.model, bench.found, bench.loss, bank.tokens.ids, needs
    )
    one, other = found[first], found[second]
    given = [one.mean, one.hessian_gradient, one.flow]
    given += [other.square_sum, other.hessian_gradient]
    assert all(part is not None and part.any() for part in given)
    assert (one.square_sum, other.mean, other.flow) == (None, None, None)
    assert len(bench.loss.passes) == 3 + 9  # one and three passes a window


def test_a_bank_without_a_loss_says_so(bench: Bench) -> None:
    bank = bench.bank()
    bank.loss = None
    message = r"q_proj needs gradient, but this bank has no loss.*loss=\.\.\."
    with pytest.raises(MethodError, match=message):
        bank.get(bench.layers[0], TAYLOR)
    bank.get(bench.layers[0], EARLY)


def test_an_embedding_is_refused_before_anything_runs(bench: Bench) -> None:
    embedding = bench.found.layers[0]
    for action in (TAYLOR, GBLM, SYNFLOW):
        with pytest.raises(MethodError, match="embed_tokens is in none"):
            bench.bank().get(embedding, action)
    assert bench.loss.passes == []


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_transposed_weights_and_experts_have_gradients(
    kind: str, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, kind)
    bench.loss = TaskLoss(CausalLM(), None)  # type: ignore[assignment]
    made = bench.make(bench.bank(), TAYLOR, SYNFLOW)
    for variant in made:
        assert variant.mask is not None
        assert int(variant.mask.sum()) == variant.mask.numel() // 2
