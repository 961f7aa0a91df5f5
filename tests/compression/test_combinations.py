"""Every method after every other: made exactly as declared, or refused with a reason.

Variants come from a bank of a tiny model, as in a search, so whatever methods need is
there. Methods are those that are registered, each with the example that it declares.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.tasks import CausalLM
from jaxtyping import Float
from tiny_models import tiny
from torch import Tensor

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.examples import (
    example_action,
    example_layer,
    example_step,
    example_steps,
)
from autoprune.compression.store import VariantStore
from autoprune.compression.structured import StructuredMethod
from autoprune.compression.variant import Variant
from autoprune.models.blocks import BlockRunner
from autoprune.models.gradients import TaskLoss
from autoprune.models.layers import inventory
from autoprune.models.statistics import Gathering
from autoprune.models.text import TokenWindows
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer, Step

pytestmark = [pytest.mark.slow, pytest.mark.ci]

OF_CONVOLUTIONS = ("kernel_patterns", "stream_filters")
"""They treat nothing of a transformer; ``tests/plugins/test_conv_*`` has them."""

METHODS = {
    name: method
    for name, method in load_plugins().methods.items()
    if name not in OF_CONVOLUTIONS
}
ACTIONS = Actions(METHODS)
ALONE = {name: example_action(method, METHODS) for name, method in METHODS.items()}

QUANTIZERS = ("rtn", "gptq", "awq", "fp8", "int8_dynamic", "smoothquant")
"""What has to follow any pruning and any structure."""

COMPENSATIONS = ("eora", "slim_lora")
"""What has to follow any of them."""

ADVICE = re.compile(
    r"comes first|stands alone|"
    r"([:.,] )(prune|quantize|put|use|name|write|take|leave|move)\b",
    re.IGNORECASE,
)
"""How a reason says what to do."""


@dataclass(frozen=True)
class Site:
    """Layers of a block that share an action, with the Hessians of their inputs."""

    layers: tuple[Layer, ...]
    hessians: dict[str, Float[Tensor, "in in"]]
    bank: VariantBank

    def error(self, layer: Layer, weight: Float[Tensor, "out in"]) -> float:
        """Give the squared error of the outputs of a layer: ``tr(D H Dᵀ)``."""
        dense = self.bank.get(layer, Action()).weight
        change = (dense.float() - weight.float()).double()
        hessian = self.hessians[str(layer.input)].double()
        return float(((change @ hessian) * change).sum())


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> VariantBank:
    """Open a bank of a model in bfloat16 whose sides suit every example."""
    model = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    model = model.to(torch.bfloat16)
    found = inventory(model, register_architectures())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (16, 24), generator=generator)
    return VariantBank(
        StitchedModel(model, found.layers),
        found,
        ACTIONS,
        VariantStore(tmp_path_factory.mktemp("store"), 10**9),
        TokenWindows(ids, "statistics", "test", f"{0:016x}"),
        "r1",
        loss=TaskLoss(CausalLM(), None),
    )


@pytest.fixture(scope="module")
def hessians(bank: VariantBank) -> dict[str, Float[Tensor, "in in"]]:
    inside = [layer for layer in bank.inventory.layers if layer.block == 0]
    sums = {str(la.input): Gathering({"hessian"}, la.shape[1]) for la in inside}
    runner = BlockRunner(
        bank.stitched.model, bank.inventory, bank.tokens.ids, batch=bank.batch
    )
    runner.collect(
        0, runner.start(), lambda name, inputs: sums[name].add(inputs), inputs=sums
    )
    found = {}
    for name, gathering in sums.items():
        hessian = gathering.result().hessian
        assert hessian is not None
        found[name] = hessian
    return found


def site_of(
    name: str, bank: VariantBank, hessians: dict[str, Float[Tensor, "in in"]]
) -> Site:
    """Give a layer that a method may treat, or all layers of a structure."""
    kinds = METHODS[name].kinds
    inside = [layer for layer in bank.inventory.layers if layer.block == 0]
    layers = tuple(layer for layer in inside if layer.role.endswith("down_proj"))
    if kinds & {"channels", "heads"}:
        groups = [g for g in bank.inventory.groups if g.kind in kinds]
        layers = groups[0].layers
    assert layers
    return Site(layers, hessians, bank)


def refusal(site: Site, action: Action) -> str | None:
    reasons = (ACTIONS.refuses(layer, action) for layer in site.layers)
    return next((reason for reason in reasons if reason), None)


def check(site: Site, layer: Layer, action: Action) -> None:
    """Hold a variant against what was declared, and against what came before."""
    where = f"{layer.name} under {action}"
    declared, variant = ACTIONS.storage(layer, action), site.bank.get(layer, action)
    assert variant.storage == declared, where
    packed = variant.pack()
    assert packed.keys() == declared.parts.keys(), where
    for name, part in declared.parts.items():
        found = packed[name]
        assert (str(found.dtype), tuple(found.shape)) == (
            f"torch.{part.dtype}",
            part.shape,
        ), f"{where}: {name}"
    weight = variant.weight
    assert torch.equal(Variant.unpack(declared, packed).weight, weight), where
    assert weight.dtype == torch.bfloat16 and weight.shape == layer.shape
    assert torch.isfinite(weight).all(), where
    lost, all_lost = site.error(layer, weight), site.error(layer, weight * 0)
    assert lost < all_lost or not declared.stored, f"{where}: {lost} of {all_lost}"
    zeros_stay(site, layer, action, variant)


def zeros_stay(site: Site, layer: Layer, action: Action, variant: Variant) -> None:
    """Zeros are ``+0.0``, those of the steps before too, but where a step moves them.

    Low-rank factors add to them, and leave what they add to as it is.
    """
    where = f"{layer.name} under {action}"
    for length in range(1, len(action.steps) + 1):
        before = site.bank.get(layer, Action(action.steps[:length])).mask
        rest = action.steps[length - 1 :][1:]
        moved = any(moves_zeros(layer, action, step) for step in rest)
        if before is None or moved:
            continue
        zeros = variant.base[~before]
        assert not zeros.any() and not zeros.signbit().any(), where


def moves_zeros(layer: Layer, action: Action, step: Step) -> bool:
    """A step that leaves what is stored as it was can only have moved zeros."""
    at = action.steps.index(step)
    before = ACTIONS.storage(layer, Action(action.steps[:at]))
    return ACTIONS.storage(layer, Action(action.steps[: at + 1])) == before


def make_and_check(site: Site, actions: Sequence[Action]) -> None:
    starts = [Action(a.steps[:n]) for a in actions for n in range(1, len(a.steps) + 1)]
    site.bank.make([(layer, one) for layer in site.layers for one in starts])
    for action in actions:
        for layer in site.layers:
            check(site, layer, action)


@pytest.mark.parametrize("first", sorted(METHODS))
def test_a_pair_is_made_as_declared_or_refused_with_a_reason(
    first: str, bank: VariantBank, hessians: dict[str, Tensor]
) -> None:
    site, taken = site_of(first, bank, hessians), []
    for second in sorted(METHODS):
        action = Action((*ALONE[first].steps, example_step(METHODS[second])))
        reason = refusal(site, action)
        if reason is None:
            taken.append(action)
            continue
        assert len(reason.split()) >= 5 and "\n" not in reason, f"{action}: {reason}"
        assert ADVICE.search(reason), f"{action}: says not what to do: {reason}"
    assert refusal(site, ALONE[first]) is None
    make_and_check(site, [ALONE[first], *taken])


def pruning_steps() -> list[Step]:
    """List what only prunes, in every pattern; and what removes units."""
    steps = []
    for name, method in sorted(METHODS.items()):
        for step in example_steps(method):
            takes_site = isinstance(method, StructuredMethod) or not method.kinds
            if not takes_site or len(ALONE[name].steps) > 1:
                continue
            layer = example_layer(method)
            if ACTIONS.refuses(layer, Action((step,))):
                continue
            if dict(step.params).get("score") == "norm_scale":  # of convolutions only
                continue
            stored = ACTIONS.storage(layer, Action((step,)))
            if stored.mask and stored.bits is None and stored.kept:
                steps.append(step)
    return steps


@pytest.mark.parametrize("first", pruning_steps(), ids=str)
def test_quantization_and_compensation_follow_any_pruning(
    first: Step, bank: VariantBank, hessians: dict[str, Tensor]
) -> None:
    site = site_of(first.method, bank, hessians)
    actions = []
    for quantizer in QUANTIZERS:
        both = first, example_step(METHODS[quantizer])
        actions.append(Action(both))
        if first == example_step(METHODS[first.method]):
            ends = [example_step(METHODS[name]) for name in COMPENSATIONS]
            actions += [Action((*both, end)) for end in ends]
    actions += [Action((first, example_step(METHODS[n]))) for n in COMPENSATIONS]
    assert [refusal(site, action) for action in actions] == [None] * len(actions)
    make_and_check(site, actions)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_compensation_follows_any_quantization(
    quantizer: str, bank: VariantBank, hessians: dict[str, Tensor]
) -> None:
    site, first = site_of(quantizer, bank, hessians), ALONE[quantizer].steps
    ends = [example_step(METHODS[name]) for name in COMPENSATIONS]
    actions = [Action((*first, end)) for end in ends]
    make_and_check(site, actions)
    for action in actions:
        (layer,) = site.layers
        plain = site.error(layer, bank.get(layer, Action(first)).weight)
        assert site.error(layer, bank.get(layer, action).weight) < plain, str(action)


def test_the_pruning_of_every_grain_is_there() -> None:
    found = {str(step) for step in pruning_steps()}
    assert found >= {
        "magnitude(sparsity=0.5)",
        "magnitude(pattern=2:4)",
        "magnitude(sparsity=0.5, tile=1x8)",
        "sparsegpt(pattern=2:4)",
        "channels(keep=0.5)",
        "heads(keep=0.5)",
        "ziplm(keep=0.5)",
    }
