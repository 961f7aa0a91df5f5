from collections.abc import Mapping

import pytest
import torch
from autoprune_plugins.low_rank import SlimLora
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.slim_quant import (
    BINS,
    SlimQuant,
    best_scales,
    density,
    expected_error,
    register_methods,
)
from autoprune_plugins.wanda import Wanda

from autoprune.compression.actions import Actions
from autoprune.compression.making import Making
from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.policy import Action, Layer, Value
from autoprune.testing import (
    MethodContract,
    output_error,
    tiny_source,
    tiny_statistics,
)

METHOD = SlimQuant()


class TestContract(MethodContract):
    @pytest.fixture
    def method(self) -> CompressionMethod:
        return METHOD

    @pytest.fixture(
        params=[
            {"bits": 4},
            {"bits": 2},
            {"bits": 8},
            {"bits": 4, "group": 16},
            {"bits": 3, "group": 32},
        ],
        ids=str,
    )
    def params(self, request: pytest.FixtureRequest) -> Mapping[str, Value]:
        params: Mapping[str, Value] = request.param
        return params


def source_of(weight: torch.Tensor) -> Source:
    rows, columns = weight.shape
    layer = Layer("q", (rows, columns), "float32", block=0, role="q", input="x")
    return Source(layer, Variant.dense(weight))


def heavy(rng: torch.Generator, shape: tuple[int, int] = (64, 256)) -> torch.Tensor:
    """Weights with the tails of a Student's t of 3 degrees of freedom."""
    normal = torch.randn(4, *shape, generator=rng)
    return normal[0] / (normal[1:].square().mean(0)).sqrt()


def make(source: Source, **params: Value) -> Variant:
    return METHOD.compress([source], tiny_statistics(), [METHOD.check(params)])[0][0]


def mse(source: Source, variant: Variant) -> float:
    change = source.variant.weight.double() - variant.weight.double()
    return float(change.square().mean())


def absmax(source: Source, **params: Value) -> Variant:
    method = RoundToNearest()
    settings = method.check({"symmetric": True, **params})
    return method.compress([source], tiny_statistics(), [settings])[0][0]


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["slim_quant"]


def test_the_error_by_hand() -> None:
    """Two bits are -2, -1, 0 and 1 steps: 3 is clipped to 1, -2.4 rounded to -2."""
    values = torch.tensor([[3.0, -2.4, 0.4, 1.0]])
    scale = torch.ones(1, 1)
    found = expected_error(values, None, scale, 2)
    torch.testing.assert_close(found, torch.tensor([[4 + 0.16 + 0.16]]))
    shares = torch.tensor([[1.0, 10.0, 0.0, 5.0]])
    found = expected_error(values, shares, scale, 2)
    torch.testing.assert_close(found, torch.tensor([[4 + 1.6]]))


def test_a_density_holds_every_weight(rng: torch.Generator) -> None:
    weight = heavy(rng)
    centres, counts = density(weight)
    assert int(counts.sum()) == weight.numel() and centres[0, BINS // 2] == 0
    width = float(centres[0, 1] - centres[0, 0])
    assert float(weight.abs().max()) == pytest.approx(float(centres[0, -1]))
    spread = (counts * centres.square()).sum() / counts.sum()
    assert float(spread) == pytest.approx(float(weight.square().mean()), rel=1e-3)
    _, binned = density(torch.tensor([[0.0, 0.4 * width, 1.0], [-1.0, 0.0, 0.5]]))
    assert binned[0, BINS // 2] >= 2 and binned[0, 0] == 1 and binned[0, -1] == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_scale_is_that_of_a_fine_grid(bits: int, rng: torch.Generator) -> None:
    """Of 4000 scales, with the error of the weights themselves and no histogram."""
    weight = heavy(rng)
    top = float(weight.abs().max()) / (2 ** (bits - 1) - 0.5)
    flat = weight.double().view(1, -1)
    scales = torch.linspace(top / 4000, top, 4000, dtype=torch.float64)
    half = 2 ** (bits - 1)
    errors = torch.stack(
        [
            ((flat / s).round().clamp(-half, half - 1) * s - flat).square().sum()
            for s in scales
        ]
    )
    found = best_scales(*density(weight), bits=bits, dtype=torch.float32).double()
    reached = expected_error(flat, None, found, bits)
    assert float(reached) <= float(errors.min()) * 1.005
    assert float(found) == pytest.approx(float(scales[errors.argmin()]), rel=0.1)


@pytest.mark.parametrize(
    ("bits", "step", "least"), [(4, 0.3352, 0.01154), (5, 0.1881, 0.003495)]
)
def test_a_normal_density_has_nearly_the_known_best_steps(
    bits: int, step: float, least: float
) -> None:
    """Max 1960, Quantizing for minimum distortion, Table II: 16 and 32 even steps.

    His grids lie half a step off zero, and no grid of evenly spaced numbers is better.
    """
    places = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    source = source_of(torch.special.ndtri(places).float().view(1, -1))
    variant = make(source, bits=bits)
    assert variant.tensor_scale is not None
    assert float(variant.tensor_scale) == pytest.approx(step, rel=0.03)
    assert least < mse(source, variant) < 1.035 * least


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_heavy_tails_lose_less_than_with_the_absolute_maximum(
    bits: int, rng: torch.Generator
) -> None:
    source = source_of(heavy(rng))
    ours, whole = make(source, bits=bits), density(source.variant.weight)[0][0, -1]
    steps = (2**bits - 1) / 2
    widest = expected_error(
        source.variant.weight.view(1, -1), None, (whole / steps).view(1, 1), bits
    )
    assert mse(source, ours) < 0.5 * float(widest) / source.layer.numel
    rows, plain = make(source, bits=bits, group=256), absmax(source, bits=bits)
    assert mse(source, rows) < 0.8 * mse(source, plain)


def test_no_group_is_worse_than_with_its_absolute_maximum(rng: torch.Generator) -> None:
    source = source_of(heavy(rng))
    ours, plain = make(source, bits=4, group=32), absmax(source, bits=4, group=32)
    assert ours.storage == plain.storage
    weight = source.variant.weight
    errors = [
        (one.weight - weight).square().view(64, 8, 32).sum(2) for one in (ours, plain)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < 0.9 * errors[1].sum()


def test_groups_are_searched_alone(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(heavy(rng))
    together = make(source, bits=4, group=32)
    monkeypatch.setattr("autoprune_plugins.slim_quant.TOGETHER", 96)
    apart = make(source, bits=4, group=32)
    # Sums in another order may prefer one of two scales that are equally good.
    assert mse(source, apart) == pytest.approx(mse(source, together), rel=1e-5)


def test_even_steps_are_met_exactly() -> None:
    """Weights on a grid of their own lose nothing."""
    weight = torch.tensor([[-8.0, 7.0, 3.0, -1.0], [5.0, 0.0, -4.0, 2.0]]) / 16
    groups = make(source_of(weight), bits=4, group=4)
    assert groups.scales is not None
    plain = absmax(source_of(weight), bits=4, group=4)
    assert mse(source_of(weight), groups) < mse(source_of(weight), plain) / 5


def test_one_scale_is_stored_for_a_tensor() -> None:
    storage = make(tiny_source((8, 32)), bits=4).storage
    assert storage.nbytes == 8 * 32 // 2 + 4
    grouped = make(tiny_source((8, 32)), bits=4, group=16).storage
    assert grouped.nbytes == 8 * 32 // 2 + 2 * 16


def test_weights_of_zeros_have_a_scale() -> None:
    for params in ({"bits": 4}, {"bits": 4, "group": 16}):
        variant = make(source_of(torch.zeros(4, 32)), **params)
        assert not variant.weight.any()


def test_slim_is_a_mask_then_this_then_low_rank() -> None:
    methods: list[CompressionMethod] = [Wanda(), METHOD, SlimLora(), RoundToNearest()]
    actions = Actions({method.name: method for method in methods})
    texts = {
        "slim": "wanda(pattern=2:4) + slim_quant(bits=4) + slim_lora(rank=2)",
        "no-lora": "wanda(pattern=2:4) + slim_quant(bits=4)",
        "wanda": "wanda(pattern=2:4)",
    }
    source, known = tiny_source((16, 64)), tiny_statistics(64)
    parsed = {name: Action.parse(text) for name, text in texts.items()}
    tails = {action: action.steps for action in parsed.values()}
    made = dict(Making(actions).grow([source], tails, known))
    variants = {name: made[action][0] for name, action in parsed.items()}
    errors = {
        name: output_error(source.variant, variant, known)
        for name, variant in variants.items()
    }
    assert errors["slim"] < 0.9 * errors["no-lora"]
    assert errors["no-lora"] < 1.5 * errors["wanda"]  # most is lost by the mask
    slim = variants["slim"]
    assert slim.storage == actions.storage(source.layer, parsed["slim"])
    assert slim.mask is not None and int(slim.mask.sum()) == 16 * 32
    assert not slim.base[~slim.mask].any()
    assert torch.equal(Variant.unpack(slim.storage, slim.pack()).weight, slim.weight)


def test_impossible_bits_are_named() -> None:
    with pytest.raises(MethodError, match=r"slim_quant\(bits=...\) lies from 2 to 8"):
        METHOD.check({"bits": 1})
