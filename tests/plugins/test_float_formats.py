"""FP8, NF4, MXFP4, NVFP4 and INT8: the contract, sizes, and pruned layers."""

from collections.abc import Mapping

import pytest
import torch
from autoprune_plugins import fp8, int8_dynamic, microscaling, nf4
from autoprune_plugins.rtn import RoundToNearest

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Layer, Value
from autoprune.testing import MethodContract, tiny_source

FP8, INT8, NF4 = fp8.Fp8(), int8_dynamic.Int8Dynamic(), nf4.Nf4()
MXFP4, NVFP4 = microscaling.Mxfp4(), microscaling.Nvfp4()
Case = tuple[CompressionMethod, dict[str, Value]]
CASES: list[Case] = [
    (FP8, {}),
    (FP8, {"group": 8}),
    (FP8, {"per": "tensor"}),
    (INT8, {}),
    (NF4, {"group": 16}),
    (MXFP4, {}),
    (NVFP4, {}),
]


class TestContract(MethodContract):
    @pytest.fixture(params=CASES, ids=[f"{m.name}-{p}" for m, p in CASES])
    def case(self, request: pytest.FixtureRequest) -> Case:
        case: Case = request.param
        return case

    @pytest.fixture
    def method(self, case: Case) -> CompressionMethod:
        return case[0]

    @pytest.fixture
    def params(self, case: Case) -> Mapping[str, Value]:
        return case[1]


def make(method: CompressionMethod, source: Source, **params: Value) -> Variant:
    return method.compress([source], NO_STATISTICS, [method.check(params)])[0][0]


def test_they_are_registered() -> None:
    modules = (fp8, int8_dynamic, microscaling, nf4)
    names = [method.name for one in modules for method in one.register_methods()]
    assert names == ["fp8", "int8_dynamic", "mxfp4", "nvfp4", "nf4"]


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (MXFP4, 4.25),
        (NVFP4, 4.5 + 32 / (64 * 256)),
        (NF4, 4.25),
        (INT8, 8 + 16 / 256),
        (FP8, 8 + 16 / 256),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_bits_a_weight(method: CompressionMethod, bits: float) -> None:
    storage = make(method, tiny_source((64, 256))).storage
    assert storage.nbytes * 8 / storage.numel == bits


def test_int8_is_plain_rounding_by_another_name() -> None:
    source = tiny_source()
    plain = make(RoundToNearest(), source, bits=8, symmetric=True)
    ours = make(INT8, source)
    assert torch.equal(ours.weight, plain.weight) and ours.storage == plain.storage


def test_fp8_is_torchs_cast_of_the_scaled_weight() -> None:
    source = tiny_source(dtype=torch.float32)
    weight = source.variant.weight
    for params, largest in (
        ({}, weight.abs().amax(1, keepdim=True)),
        ({"per": "tensor"}, weight.abs().amax()),
    ):
        scale = (largest / 448).float()
        variant = make(FP8, source, **params)
        by_torch = (weight / scale).to(torch.float8_e4m3fn)
        step = scale * 2**-2  # rounding scales up may turn a few by one code
        assert variant.codes is not None
        same = variant.codes == by_torch.view(torch.uint8)
        assert same.float().mean() > 0.98
        off = (variant.weight - by_torch.float() * scale).abs()
        assert (off <= step * weight.abs().div(scale).clamp(min=1)).all()


def test_a_scale_of_the_tensor_is_float32() -> None:
    storage = make(FP8, tiny_source(), per="tensor").storage
    assert storage.nbytes == 8 * 32 + 4


def test_nf4_keeps_zeros_and_the_largest() -> None:
    weight = torch.zeros(2, 64)
    weight[0, 5], weight[1, 9] = -3.0, 2.0
    source = Source(tiny_source((2, 64)).layer, Variant.dense(weight))
    found = make(NF4, source).weight
    assert torch.equal(found != 0, weight != 0)
    torch.testing.assert_close(found, weight)


@pytest.mark.parametrize("method", [FP8, INT8, NF4, MXFP4, NVFP4], ids=lambda m: m.name)
@pytest.mark.parametrize("pattern", ["2:4", None], ids=["2:4", "bitmap"])
def test_pruned_layers_keep_their_zeros_and_store_no_code_for_them(
    method: CompressionMethod, pattern: str | None
) -> None:
    source = tiny_source((16, 64))
    kept = torch.arange(64).remainder(4).lt(2).expand(16, 64).contiguous()
    pruned = source.variant.pruned(source.variant.weight, kept, pattern=pattern)
    whole, variant = (
        make(method, one) for one in (source, Source(source.layer, pruned))
    )
    assert not variant.weight[~kept].any()
    assert variant.weight[kept].any()
    codes = whole.storage.parts["codes"].nbytes
    assert variant.storage.parts["codes"].nbytes * 2 == codes


@pytest.mark.parametrize(
    ("method", "group"), [(MXFP4, 32), (NVFP4, 16), (NF4, 64)], ids=["mx", "nv", "nf"]
)
def test_groups_that_do_not_divide_are_refused(
    method: CompressionMethod, group: int
) -> None:
    layer = Layer("q", (2, 24), "bfloat16", block=0, role="q", input=None)
    reason = method.refuses(layer, Storage.dense(layer), method.check({}))
    assert reason == f"group {group} does not divide its 24 inputs"


@pytest.mark.parametrize("method", [FP8, INT8, NF4, MXFP4, NVFP4], ids=lambda m: m.name)
def test_a_second_quantization_is_refused(method: CompressionMethod) -> None:
    layer = Layer("q", (2, 64), "bfloat16", block=0, role="q", input=None)
    quantized = Storage.dense(layer).coded("nf4", 64)
    reason = method.refuses(layer, quantized, method.check({}))
    assert reason == "already quantized to 4 bits: quantize once"


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"per": "column"}, r"fp8\(per=.* word 'column'\. Known: row, tensor"),
        ({"per": "tensor", "group": 8}, "found group=8 and per=tensor"),
    ],
)
def test_impossible_parameters_are_named(params: dict[str, Value], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        FP8.check(params)
