"""For authors of plugins: tests that every compression method has to pass.

Subclass the contract with two fixtures and pytest runs it::

    class TestMine(MethodContract):
        @pytest.fixture
        def method(self):
            return MyMethod()

        @pytest.fixture(params=[{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
        def params(self, request):
            return request.param
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import ClassVar

import torch

from autoprune.compression.examples import accepts
from autoprune.compression.method import CompressionMethod, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.gradients import GRADIENTS, LayerGradients
from autoprune.models.statistics import STATISTICS, InputStatistics
from autoprune.policy import Layer, Value


def tiny_source(
    shape: tuple[int, int] = (8, 32),
    *,
    name: str = "layers.0.q_proj",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Source:
    """Make a dense layer with random weights and gradients."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    mean, noise, product, flow = torch.randn(4, *shape, generator=generator)
    gradient = LayerGradients(8, mean, 8 * (mean + noise).square(), product, flow.abs())
    kind = str(dtype).removeprefix("torch.")
    layer = Layer(name, shape, kind, block=0, role="q_proj", input="layers.0.attn")
    return Source(layer, Variant.dense(weight), weight, gradient)


def tiny_statistics(
    columns: int = 32, *, tokens: int = 256, seed: int = 0, dead: Sequence[int] = ()
) -> InputStatistics:
    """Make the statistics of random inputs that depend on each other.

    Args:
        columns: Number of inputs.
        tokens: Number of tokens.
        seed: Of the inputs.
        dead: Inputs that are zero for every token.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = 0.1 + torch.rand(columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs = inputs @ (mixing + torch.eye(columns)) * size
    inputs[:, list(dead)] = 0.0
    return InputStatistics(
        tokens,
        inputs.square().sum(0),
        inputs.t() @ inputs,
        abs_sum=inputs.abs().sum(0),
        abs_max=inputs.abs().amax(0),
        input_sum=inputs.sum(0),
        input_rows=inputs,
    )


def output_error(before: Variant, after: Variant, statistics: InputStatistics) -> float:
    """Give the squared error of a layer's outputs over all tokens: ``tr(D H Dᵀ)``."""
    assert statistics.hessian is not None
    change = (before.weight - after.weight).double()
    return float(((change @ statistics.hessian.double()) * change).sum())


class MethodContract:
    """What every compression method owes; needs fixtures ``method`` and ``params``.

    ``params`` are the parameters of one step, as in an action, that suit a layer of 8
    by 32 weights.

    Attributes:
        refines: True for a step that moves what a step before has pruned, as DSnoT.
    """

    refines: ClassVar[bool] = False

    def test_is_described(self, method: CompressionMethod) -> None:
        """Name, paper, statistics and every parameter are declared."""
        assert method.name == method.name.lower() and method.name.strip(), method.name
        assert method.reference, "reference is empty: name the paper or the source"
        known = STATISTICS | GRADIENTS
        assert method.needs <= known, f"unknown statistics: {method.needs - known}"
        names = [parameter.name for parameter in method.parameters]
        assert len(set(names)) == len(names), f"a parameter twice: {names}"
        assert all(parameter.help for parameter in method.parameters), "help is empty"
        for one in method.parameters:
            listed = not one.choices or one.default in (None, *one.choices)
            assert listed, f"{one.name}: {one.default!r} is none of {one.choices}"

    def test_check_completes(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """Checked settings name every parameter and keep what was asked."""
        settings = method.check(params)
        assert set(settings) == {parameter.name for parameter in method.parameters}
        assert all(settings[name] == value for name, value in params.items())

    def test_check_refuses_unknown_names(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """A parameter, or a choice of one, that does not exist is a clear error."""
        words = [one.name for one in method.parameters if one.choices]
        for name in ("no_such_name", *words):
            wrong = {**params, name: "no_such_name"}
            _expect_error("no_such_name", partial(method.check, wrong))

    def test_refuses_layers_without_input(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """Where statistics are needed, a layer that has none is refused beforehand."""
        layer = Layer(
            "embed", (8, 32), "bfloat16", block=None, role="embed", input=None
        )
        reason = method.refuses(layer, Storage.dense(layer), method.check(params))
        assert not method.needs or reason, "it accepts a layer without statistics"

    def test_storage_is_exact(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """What is declared is what is stored, to the byte, for every choice."""
        both = [self._found(dtype=one) for one in (torch.bfloat16, torch.float32)]
        for source, settings in product(both, _each_choice(method, params, both[0])):
            variant = _compress(method, [source], [settings])[0][0]
            declared = method.storage(source.layer, source.variant.storage, settings)
            packed = variant.pack()
            assert variant.storage == declared, f"{variant.storage} is not {declared}"
            assert set(packed) == set(declared.parts), f"parts: {sorted(packed)}"
            for name, part in declared.parts.items():
                found = packed[name]
                assert str(found.dtype) == f"torch.{part.dtype}", (
                    f"{name} {found.dtype}"
                )
                assert tuple(found.shape) == part.shape, f"{name} {tuple(found.shape)}"

    def test_survives_packing(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """A variant read back from its stored parts has the same weight."""
        variant = _compress(method, [self._found()], [method.check(params)])[0][0]
        again = Variant.unpack(variant.storage, variant.pack())
        assert torch.equal(again.weight, variant.weight), "the weight changed"

    def test_weight_keeps_shape_and_type(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """The weight has the layer's shape and type, exact zeros and no NaN."""
        source = self._found()
        variant = _compress(method, [source], [method.check(params)])[0][0]
        weight = variant.weight
        assert weight.shape == source.layer.shape and weight.dtype == torch.bfloat16
        assert torch.isfinite(weight).all(), "the weight holds NaN or infinity"
        if variant.mask is not None:
            pruned = variant.base[~variant.mask]
            assert not pruned.any(), "a pruned weight is not zero"
            assert not pruned.signbit().any(), "a pruned weight is -0.0"
            assert int(variant.mask.sum()) == variant.storage.kept

    def test_is_pure_and_deterministic(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """Nothing given is written to, and the same call gives the same bits."""
        source, statistics = self._found(), tiny_statistics()
        settings = method.check(params)
        assert statistics.hessian is not None and statistics.square_sum is not None
        gradient = source.gradient
        assert gradient is not None
        assert gradient.mean is not None and gradient.square_sum is not None
        before = (
            *(source.variant.weight, statistics.hessian, statistics.square_sum),
            *(gradient.mean, gradient.square_sum),
        )
        copies = [tensor.clone() for tensor in before]
        first = method.compress([source], statistics, [settings])[0][0]
        second = method.compress([source], statistics, [settings])[0][0]
        for tensor, copy in zip(before, copies, strict=True):
            assert torch.equal(tensor, copy), "an input was written to"
        parts, again = first.pack(), second.pack()
        assert all(torch.equal(parts[name], again[name]) for name in parts), (
            "not the same"
        )

    def test_serves_many_at_once(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """A variant does not depend on the layers and settings it was made with."""
        settings = method.check(params)
        other = self._found((4, 32), name="layers.0.k_proj", seed=1)
        sources = [self._found(), other]
        together = _compress(method, sources, [settings, settings])
        assert [len(variants) for variants in together] == [2, 2]
        for source, variants in zip(sources, together, strict=True):
            alone = _compress(method, [source], [settings])[0][0].weight.float()
            for variant in variants:
                off = (variant.weight.float() - alone).norm() / alone.norm()
                # Sums in another order may turn the rounding of a few weights.
                assert off < 0.2, f"{source.layer.name} is off by {float(off):.2%}"

    def test_dead_inputs_do_no_harm(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """Inputs that are always zero, as in a dead channel, give no NaN."""
        statistics = tiny_statistics(dead=(0, 7, 31))
        variant = method.compress([self._found()], statistics, [method.check(params)])
        assert torch.isfinite(variant[0][0].weight).all(), "the weight holds NaN"

    def test_names_a_layer_with_nan(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """Weights that are no numbers are an error that names the layer."""
        source, settings = self._found(name="layers.3.broken"), method.check(params)
        weight = source.variant.weight.clone()
        weight[2, 5] = float("nan")
        broken = replace(source, variant=replace(source.variant, values=weight))
        _expect_error(
            "layers.3.broken", lambda: _compress(method, [broken], [settings])
        )

    def test_sees_the_step_before(
        self, method: CompressionMethod, params: Mapping[str, Value]
    ) -> None:
        """After pruning, a method refuses, or leaves the mask and its zeros alone."""
        source, settings = _pruned(tiny_source()), method.check(params)
        earlier = source.variant
        if method.refuses(source.layer, earlier.storage, settings):
            return
        variant = _compress(method, [source], [settings])[0][0]
        declared = method.storage(source.layer, earlier.storage, settings)
        assert variant.storage == declared, f"{variant.storage} is not {declared}"
        if self.refines:
            return
        kept = earlier.mask
        assert kept is not None
        assert not variant.base[~kept].any(), "a weight pruned before is back"

    def _found(
        self,
        shape: tuple[int, int] = (8, 32),
        *,
        name: str = "layers.0.q_proj",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> Source:
        """Make a layer as the step finds it: pruned already if it refines a mask."""
        source = tiny_source(shape, name=name, dtype=dtype, seed=seed)
        return _pruned(source) if self.refines else source


def _pruned(source: Source) -> Source:
    weight = source.variant.weight
    kept = torch.arange(weight.shape[1]).remainder(4).lt(2)
    kept = kept.expand(weight.shape).contiguous()
    variant = source.variant.pruned(weight, kept, pattern="2:4")
    return replace(source, variant=variant)


def _each_choice(
    method: CompressionMethod, params: Mapping[str, Value], source: Source
) -> list[Settings]:
    """Complete parameters: as given, and with each word that they and a layer take."""
    words = [{one.name: word} for one in method.parameters for word in one.choices]
    tries = [params, *({**params, **word} for word in words)]
    settings = [method.check(one) for one in tries if accepts(method, one)]
    layer, before = source.layer, source.variant.storage
    return [one for one in settings if method.refuses(layer, before, one) is None]


def _compress(
    method: CompressionMethod, sources: Sequence[Source], settings: Sequence[Settings]
) -> list[list[Variant]]:
    return method.compress(sources, tiny_statistics(), settings)


def _expect_error(fragment: str, act: Callable[[], object]) -> None:
    try:
        act()
    except MethodError as error:
        assert fragment in str(error), f"the message lacks {fragment!r}: {error}"
    else:
        raise AssertionError(f"no MethodError that names {fragment!r}")
