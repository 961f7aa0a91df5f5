"""What methods do with numbers that they cannot use.

Each ends in a variant as good as any, or in an error that names layer and action. The
methods are those that are registered, each with the example that it declares; what they
need tells what can be broken.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.actions import Actions
from autoprune.compression.examples import (
    example_action,
)
from autoprune.compression.making import Making
from autoprune.compression.method import Source
from autoprune.compression.structured import StructuredMethod
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.gradients import GRADIENTS, LayerGradients
from autoprune.models.hidden import HIDDEN
from autoprune.models.statistics import Gathering, InputStatistics
from autoprune.models.structures import STREAM
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Step
from autoprune.sites import Cut
from autoprune.testing import tiny_source

# One that acts on the hidden state takes statistics of a whole model: see its own test.
METHODS = {
    name: method
    for name, method in load_plugins().methods.items()
    if not method.kinds & {HIDDEN, STREAM}
    and name != "kernel_patterns"  # treats convolutions alone
}
ACTIONS = Actions(METHODS)
ALONE = {name: example_action(method, METHODS) for name, method in METHODS.items()}
OF_INPUTS = sorted(name for name, one in METHODS.items() if one.needs - GRADIENTS)
OF_GRADIENTS = sorted(name for name, one in METHODS.items() if one.needs & GRADIENTS)
LEAST_DAMPING = {
    name: parameter.low or 0.0
    for name in OF_INPUTS
    for parameter in METHODS[name].parameters
    if parameter.name == "damping"
}
SIDE = 64

FIELDS = {
    "hessian": "hessian",
    "input_abs_mean": "abs_sum",
    "input_max": "abs_max",
    "input_norm": "square_sum",
    "input_rows": "input_rows",
    "input_sum": "input_sum",
    "gradient": "mean",
    "gradient_square": "square_sum",
    "hessian_gradient": "hessian_gradient",
    "synaptic_flow": "flow",
}
"""Where what a method needs stands in its statistics or gradients."""

Inputs = Float[Tensor, "tokens in"]


def tokens(count: int = 256) -> Inputs:
    """Make activations that depend on each other, with columns of different sizes."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(SIDE) + torch.randn(SIDE, SIDE, generator=generator) / 16
    sizes = 0.1 + torch.rand(SIDE, generator=generator)
    return torch.randn(count, SIDE, generator=generator) @ mixing * sizes


def gathered(inputs: Inputs) -> InputStatistics:
    """Gather all that a method may need, as a bank does."""
    sums = Gathering(FIELDS.keys() - GRADIENTS, SIDE)
    sums.add(inputs)
    return sums.result()


@dataclass(frozen=True)
class Case:
    """One method at work on one layer, or on a maker and a taker of units."""

    name: str
    statistics: InputStatistics = field(default_factory=lambda: gathered(tokens()))
    spoil: Callable[[Source], Source] = lambda source: source
    action: Action | None = None
    at: int = -1  # which of the layers is spoilt

    @property
    def steps(self) -> tuple[Step, ...]:
        return (self.action or ALONE[self.name]).steps

    def sources(self) -> list[Source]:
        method = METHODS[self.name]
        kind = "heads" if method.kinds == {"heads"} else "channels"
        unit = 16 if kind == "heads" else 1
        structured = isinstance(method, StructuredMethod)
        found = []
        for axis in ("rows", "columns") if structured else ("columns",):
            plain = tiny_source((SIDE, SIDE), name=f"layers.3.{axis}")
            cut = Cut(kind, axis, unit, SIDE // unit)
            found.append(replace(plain, layer=replace(plain.layer, cut=cut)))
        found[self.at] = self.spoil(found[self.at])
        return found

    def make(self) -> list[Variant]:
        """Do the steps as a bank does them."""
        making, sources = Making(ACTIONS), self.sources()
        known = {str(source.layer.input): self.statistics for source in sources}
        if isinstance(METHODS[self.name], StructuredMethod):
            making.start(sources, self.steps[:1], known)
        action = Action(self.steps)
        made = making.grow(sources, {action: self.steps}, self.statistics)
        return dict(made)[action]

    def holds(self) -> None:
        """The variants are what was declared, and no worse than nothing."""
        for source, variant in zip(self.sources(), self.make(), strict=True):
            declared = ACTIONS.storage(source.layer, Action(self.steps))
            assert variant.storage == declared
            assert torch.isfinite(variant.weight).all()
            assert output_error(source, variant, self.statistics) <= 1.0

    def fails(self, *reasons: str) -> None:
        """An error names the layer and the step, and says why."""
        with pytest.raises(MethodError) as told:
            self.make()
        for part in ("layers.3.columns", str(self.steps[-1]), *reasons):
            assert part in str(told.value), f"{part!r} is not in: {told.value}"

    def holds_or_fails(self, *reasons: str) -> None:
        try:
            self.make()
        except MethodError:
            self.fails(*reasons)
        else:
            self.holds()


def output_error(
    source: Source, variant: Variant, statistics: InputStatistics
) -> float:
    """Give the squared error of the outputs, over that of a layer of zeros."""
    assert source.dense is not None and statistics.hessian is not None
    hessian, dense = statistics.hessian.double(), source.dense.double()
    change = dense - variant.weight.double()
    lost, whole = (float(((w @ hessian) * w).sum()) for w in (change, dense))
    return lost / whole


def repeated(inputs: Inputs) -> Inputs:
    """Let every second input repeat the one before it."""
    return inputs[:, torch.arange(SIDE) // 2 * 2]


def dead(inputs: Inputs) -> Inputs:
    """Let some inputs be zero for every token."""
    inputs[:, [0, 5, 6, 7, 63]] = 0.0
    return inputs


SINGULAR = {
    "columns repeat": lambda: repeated(tokens()),
    "fewer tokens than columns": lambda: tokens(5),
    "one token": lambda: tokens(1),
    "dead columns": lambda: dead(tokens()),
    "dead columns, few tokens": lambda: dead(tokens(3)),
    "constant": lambda: tokens(1).repeat(256, 1),
}


@pytest.mark.parametrize("inputs", SINGULAR.values(), ids=list(SINGULAR))
@pytest.mark.parametrize("name", OF_INPUTS)
def test_singular_statistics_are_repaired(
    name: str, inputs: Callable[[], Inputs]
) -> None:
    Case(name, gathered(inputs())).holds()


@pytest.mark.parametrize("inputs", SINGULAR.values(), ids=list(SINGULAR))
@pytest.mark.parametrize(("name", "least"), LEAST_DAMPING.items())
def test_without_damping_they_are_repaired_or_named(
    name: str, least: float, inputs: Callable[[], Inputs]
) -> None:
    *before, last = ALONE[name].steps
    params = dict(last.params) | {"damping": least}
    step = Step(last.method, tuple(sorted(params.items())))
    case = Case(name, gathered(inputs()), action=Action((*before, step)))
    case.holds_or_fails("is not positive definite")


UNSEEN = {"no tokens": torch.zeros(0, SIDE), "zero activations": torch.zeros(32, SIDE)}


@pytest.mark.parametrize("inputs", UNSEEN.values(), ids=list(UNSEEN))
@pytest.mark.parametrize("name", OF_INPUTS)
def test_inputs_that_were_never_seen_are_named_or_count_alike(
    name: str, inputs: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    case, needs = Case(name, gathered(inputs)), METHODS[name].needs
    if "hessian" in needs:
        case.fails("were zero for every token", f"(of {len(inputs)})")
        return
    for source, variant in zip(case.sources(), case.make(), strict=True):
        assert variant.storage == ACTIONS.storage(source.layer, ALONE[name])
        assert torch.isfinite(variant.weight).all()
    if "input_norm" in needs:  # else only the largest input, which smooths by one then
        assert "layers.3.columns were zero for every token: all count" in caplog.text


def test_of_inputs_that_were_never_seen_sizes_decide() -> None:
    unseen = gathered(torch.zeros(0, SIDE))
    for action in ("wanda(sparsity=0.5)", "gblm(sparsity=0.5, scale=0.0)"):
        step = Action.parse(action)
        (found,) = Case(step.steps[0].method, unseen, action=step).make()
        sizes = Action.parse("magnitude(sparsity=0.5)")
        (wanted,) = Case("magnitude", unseen, action=sizes).make()
        assert torch.equal(found.weight, wanted.weight), action


def broken(name: str, change: Callable[[Tensor], Tensor | None]) -> list[Case]:
    """Break all that a method needs at once, and each alone if it is of inputs.

    Of gradients a setting may leave out some.
    """

    def spoiled(needs: set[str]) -> Case:
        whole = gathered(tokens())
        of_inputs = [FIELDS[need] for need in needs - GRADIENTS]
        of_weights = [FIELDS[need] for need in needs & GRADIENTS]

        def spoil(source: Source) -> Source:
            found = source.gradient
            news = {at: change(getattr(found, at).clone()) for at in of_weights}
            assert found is not None
            return replace(source, gradient=replace(found, **news))

        news = {at: change(getattr(whole, at).clone()) for at in of_inputs}
        return Case(name, replace(whole, **news), spoil=spoil)

    needs = METHODS[name].needs
    alone = [spoiled({need}) for need in sorted(needs - GRADIENTS)]
    return [spoiled(set(needs)), *alone]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", sorted({*OF_INPUTS, *OF_GRADIENTS}))
def test_statistics_that_are_no_numbers_are_named(name: str, bad: float) -> None:
    at = torch.tensor([3])
    for case in broken(name, lambda numbers: numbers.index_fill(-1, at, bad)):
        case.fails("NaN or infinity")


@pytest.mark.parametrize("name", sorted({*OF_INPUTS, *OF_GRADIENTS}))
def test_statistics_that_were_not_gathered_are_named(name: str) -> None:
    for case in broken(name, lambda numbers: None):
        case.fails("was not gathered")


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_gradients_that_are_zero_everywhere_are_named(name: str) -> None:
    def spoil(source: Source) -> Source:
        zeros = torch.zeros(source.layer.shape)
        return replace(source, gradient=LayerGradients(8, zeros, zeros, zeros, zeros))

    Case(name, spoil=spoil).fails("is zero for every weight")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_weights_that_are_no_numbers_are_named(name: str, bad: float) -> None:
    def spoil(source: Source) -> Source:
        weight = source.variant.weight.clone()
        weight[2, 5] = bad
        return replace(source, variant=Variant.dense(weight), dense=weight)

    layers = [source.layer for source in Case(name).sources()]
    for at, layer in enumerate(layers):
        case = Case(name, spoil=spoil, at=at)
        if not ACTIONS.storage(
            layer, ALONE[name]
        ).stored:  # whatever it was, it is gone
            assert all(not variant.weight.any() for variant in case.make())
            continue
        with pytest.raises(MethodError, match="NaN or infinity") as told:
            case.make()
        assert layer.name in str(told.value)
        assert str(case.steps[0]) in str(told.value)  # the first that looks at them


def test_all_needs_are_known_here() -> None:
    needs: set[str] = set().union(*(method.needs for method in METHODS.values()))
    assert needs <= FIELDS.keys()
    known = {
        one.name for part in (InputStatistics, LayerGradients) for one in fields(part)
    }
    assert set(FIELDS.values()) <= known
