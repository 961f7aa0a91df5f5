import pytest
import torch
from autoprune_plugins.gptq import Gptq, register_methods
from autoprune_plugins.rtn import RoundToNearest

from autoprune.compression.method import Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS, InputStatistics
from autoprune.policy import Layer, Value
from autoprune.testing import output_error, tiny_source, tiny_statistics

METHOD = Gptq()


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["gptq"]


@pytest.mark.parametrize(
    ("act_order", "expected"),
    [
        # Grid -2, -1, 0, 1. First column: 0.4 becomes 0 and loses 0.4; the second input
        # is the same, so its weight -0.8 becomes -0.4, and then 0.
        (False, [[0.0, 0.0, 1.0, -2.0], [0.0, 0.0, 1.0, -2.0]]),
        # Second column first: -0.8 becomes -1 and loses 0.2; 0.4 becomes 0.6, then 1.
        (True, [[1.0, -1.0, 1.0, -2.0], [1.0, -1.0, 1.0, -2.0]]),
    ],
)
def test_two_bits_worked_by_hand(act_order: bool, expected: list[list[float]]) -> None:
    weight = torch.tensor([[0.4, -0.8, 1.0, -2.0]] * 2)
    hessian = torch.eye(4)
    hessian[:2, :2] = torch.tensor([[1.0, 1.0], [1.0, 1.001]])
    layer = Layer("q", (2, 4), "float32", block=0, role="q", input="x")
    settings = METHOD.check({"bits": 2, "act_order": act_order, "damping": 0.0})
    source = Source(layer, Variant.dense(weight))
    statistics = InputStatistics(4, None, hessian)
    variant = METHOD.compress([source], statistics, [settings])[0][0]
    assert variant.weight.tolist() == expected


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", range(2, 9))
def test_an_identity_hessian_gives_rounding_to_nearest(
    act_order: bool, group: int | None, bits: int
) -> None:
    params: dict[str, Value] = {"bits": bits}
    if group:
        params["group"] = group
    source, statistics = tiny_source(), InputStatistics(1, None, torch.eye(32))
    settings = METHOD.check({**params, "act_order": act_order})
    found = METHOD.compress([source], statistics, [settings])[0][0]
    rtn = RoundToNearest()
    expected = rtn.compress([source], NO_STATISTICS, [rtn.check(params)])[0][0]
    for name, part in expected.pack().items():
        assert torch.equal(found.pack()[name], part), name


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_err_less_than_with_rounding(bits: int) -> None:
    source, statistics = tiny_source((64, 96)), tiny_statistics(96, tokens=512)
    rtn = RoundToNearest()
    rounded = rtn.compress([source], NO_STATISTICS, [rtn.check({"bits": bits})])[0][0]
    for act_order in (False, True):
        settings = METHOD.check({"bits": bits, "act_order": act_order})
        found = METHOD.compress([source], statistics, [settings])[0][0]
        errors = [output_error(source.variant, v, statistics) for v in (found, rounded)]
        assert errors[0] < errors[1]


def test_settings_of_every_kind_come_back_in_order() -> None:
    source, statistics = tiny_source(), tiny_statistics()
    asked: list[dict[str, Value]] = [
        {"bits": 4, "group": 8},
        {"bits": 3},
        {"bits": 2, "group": 8, "act_order": False},
        {"bits": 8, "group": 8},
        {"bits": 3, "damping": 0.1},
    ]
    settings = [METHOD.check(params) for params in asked]
    made = METHOD.compress([source], statistics, settings)[0]
    for one, variant in zip(settings, made, strict=True):
        dense = source.variant.storage
        assert variant.storage == METHOD.storage(source.layer, dense, one)


def test_layers_of_two_types_keep_their_own() -> None:
    sources = [tiny_source(), tiny_source(name="other", dtype=torch.float32)]
    made = METHOD.compress(sources, tiny_statistics(), [METHOD.check({"bits": 4})])
    assert [variants[0].storage.dtype for variants in made] == ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"bits": 16}, "gptq.bits=.* found 16"),
        ({"damping": 2.0}, "from 0 .* 1, found 2.0"),
        ({"act_order": "yes"}, "takes true or false, found 'yes'"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        METHOD.check(params)


def test_refusals_say_why() -> None:
    layer = tiny_source().layer
    dense = Storage.dense(layer)
    reason = METHOD.refuses(layer, dense, METHOD.check({"bits": 4, "group": 24}))
    assert reason == "group 24 does not divide its 32 inputs"
    quantized = dense.quantized(4, None, symmetric=False)
    reason = METHOD.refuses(layer, quantized, METHOD.check({"bits": 4}))
    assert reason == "already quantized to 4 bits: quantize once"
    layer = Layer("embed", (8, 32), "float32", block=None, role="e", input=None)
    reason = METHOD.refuses(layer, dense, METHOD.check({"bits": 4}))
    assert reason == "it has no inputs to take statistics of: use magnitude or rtn"


@pytest.mark.parametrize(
    ("hessian", "match"),
    [
        (None, "Hessian of the inputs of layers.0.q_proj was not gathered"),
        (torch.eye(16), "Hessian has 16 inputs, but layers.0.q_proj has 32"),
        (torch.full((32, 32), float("nan")), "layers.0.q_proj holds NaN .* in 1024"),
        (torch.zeros(32, 32), "inputs of layers.0.q_proj were zero for every token"),
    ],
    ids=["missing", "size", "nan", "zero"],
)
def test_unusable_statistics_are_named(
    hessian: torch.Tensor | None, match: str
) -> None:
    statistics = InputStatistics(1, None, hessian)
    with pytest.raises(MethodError, match=match):
        METHOD.compress([tiny_source()], statistics, [METHOD.check({"bits": 4})])
