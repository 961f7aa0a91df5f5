"""ZipLM: every removal against brute force, all widths of one sweep, dead inputs."""

from pathlib import Path

import pytest
import torch
from autoprune_plugins.structured_obs import (
    PANEL,
    Sweep,
    ZipLm,
    best_on_units,
    register_methods,
)
from autoprune_plugins.units import Channels
from tiny_runs import config_of, write_text
from torch import Tensor

from autoprune.compression.method import Source
from autoprune.compression.storage import Storage
from autoprune.compression.structured import in_units
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer
from autoprune.searching.plan import Plan
from autoprune.sites import Cut
from autoprune.testing import output_error, tiny_statistics

METHOD = ZipLm()
LEAST = 1e-6  # damping


def source_of(name: str, axis: str, weight: Tensor, unit: int) -> Source:
    rows, columns = weight.shape
    units = (rows if axis == "rows" else columns) // unit
    kind = "channels" if unit == 1 else "heads"
    cut, dtype = Cut(kind, axis, unit, units), str(weight.dtype).removeprefix("torch.")
    layer = Layer(name, (rows, columns), dtype, 0, name, name, cut=cut)
    return Source(layer, Variant.dense(weight))


def site_of(taker: Tensor, unit: int = 1) -> list[Source]:
    maker = torch.ones(taker.shape[1], 3, dtype=taker.dtype)
    made = source_of("v", "rows", maker, unit)
    return [made, source_of("o", "columns", taker, unit)]


def draw(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def statistics_of(inputs: Tensor) -> dict[str, InputStatistics]:
    full = inputs.double()
    hessian = (full.T @ full).float()
    return {"o": InputStatistics(len(inputs), hessian.diagonal().clone(), hessian)}


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Draw a weight and a Hessian of dependent inputs, in float64."""
    hessian = tiny_statistics(columns, seed=1).hessian
    assert hessian is not None
    full = hessian.double()
    full.diagonal().add_(0.01 * full.diagonal().mean())
    return draw(rows, columns).double(), full


def lost(weight: Tensor, hessian: Tensor, kept: Tensor) -> tuple[float, Tensor]:
    """Find by least squares what the columns that are kept can do at best."""
    root = torch.linalg.cholesky(hessian).T  # outputs are root @ weight.T
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.lstsq(root[:, kept], root @ weight.T).solution.T
    return float((root @ (weight - best).T).square().sum()), best


def test_it_is_registered() -> None:
    assert [method.name for method in register_methods()] == ["ziplm"]


@pytest.mark.parametrize(("rows", "unit"), [(5, 1), (5, 3), (20, 4)])
def test_every_removal_is_the_cheapest_one(rows: int, unit: int) -> None:
    weight, hessian = problem(rows, 12)
    units = 12 // unit
    sweep = Sweep(weight, torch.linalg.inv(hessian), unit)
    gone: list[int] = []
    before = 0.0
    for _ in range(units):
        costs = torch.full((units,), torch.inf, dtype=torch.double)
        for one in set(range(units)) - set(gone):
            kept = torch.ones(units, dtype=torch.bool)
            kept[[*gone, one]] = False
            kept = kept.repeat_interleave(unit)
            costs[one] = lost(weight, hessian, kept)[0] - before
        torch.testing.assert_close(sweep.costs(), costs)
        order, paid = sweep.remove(1)
        assert order.tolist() == [int(costs.argmin())]
        assert float(paid[0]) == pytest.approx(float(costs.min()))
        gone += order.tolist()
        before += float(paid[0])
    assert before == pytest.approx(float(((weight @ hessian) * weight).sum()))


@pytest.mark.parametrize("unit", [1, 2])
def test_panels_change_nothing(unit: int) -> None:
    """Follow the textbook's updates of ``W`` and ``C`` over several panels."""
    columns, units = 3 * PANEL, 3 * PANEL // unit
    weight, hessian = problem(7, columns)
    found, paid = Sweep(weight, torch.linalg.inv(hessian), unit).remove(units - 3)
    left, inverse = weight.clone(), torch.linalg.inv(hessian)
    open_ = torch.ones(units, dtype=torch.bool)
    for at, cost in zip(found.tolist(), paid.tolist(), strict=True):
        costs = torch.full((units,), torch.inf, dtype=torch.double)
        for one in open_.nonzero()[:, 0].tolist():
            b = slice(one * unit, (one + 1) * unit)
            part = left[:, b]
            solved = torch.linalg.solve(inverse[b, b], part.T)
            costs[one] = (part * solved.T).sum()
        assert at == int(costs.argmin())
        assert cost == pytest.approx(float(costs[at]))
        b = slice(at * unit, (at + 1) * unit)
        share = torch.linalg.solve(inverse[b, b], inverse[b])
        left -= left[:, b] @ share
        inverse -= inverse[:, b] @ share
        open_[at] = False
    best = best_on_units(weight, hessian, open_)
    left *= open_.repeat_interleave(unit)
    torch.testing.assert_close(best, left, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("unit", [1, 4])
def test_what_is_left_is_the_best_for_its_units(unit: int) -> None:
    statistics = tiny_statistics(32)
    site = site_of(draw(8, 32), unit)
    settings = METHOD.check({"keep": 0.5, "damping": 0.05})
    variant = METHOD.compress_site(site, {"o": statistics}, [settings])[1][0]
    assert variant.mask is not None and statistics.hessian is not None
    hessian = statistics.hessian.double()
    hessian.diagonal().add_(0.05 * hessian.diagonal().mean())
    kept = variant.mask.any(0)
    assert int(kept.sum()) == 16
    best = lost(site[1].variant.weight.double(), hessian, kept)[1]
    torch.testing.assert_close(variant.weight, best.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("unit", [1, 4])
def test_all_settings_of_a_sweep_equal_single_runs(unit: int) -> None:
    site, read = site_of(draw(8, 32).bfloat16(), unit), {"o": tiny_statistics(32)}
    asked = [(0.75, 0.01), (0.25, 0.01), (0.25, 0.2), (0.5, 0.01), (0.75, 0.01)]
    settings = [METHOD.check({"keep": k, "damping": d}) for k, d in asked]
    before = [source.variant.weight.clone() for source in site]
    together = METHOD.compress_site(site, read, settings)
    for at, one in enumerate(settings):
        alone = METHOD.compress_site(site, read, [one])
        for variants, (single,) in zip(together, alone, strict=True):
            assert torch.equal(variants[at].weight, single.weight)
    for source, weight in zip(site, before, strict=True):
        assert torch.equal(source.variant.weight, weight)


@pytest.mark.parametrize("unit", [1, 4])
def test_masks_agree_nest_and_are_stored_exactly(unit: int) -> None:
    site, read = site_of(draw(8, 32).bfloat16(), unit), {"o": tiny_statistics(32)}
    settings = [METHOD.check({"keep": keep}) for keep in (0.25, 0.5, 0.75)]
    made = METHOD.compress_site(site, read, settings)
    kept = []
    for source, variants in zip(site, made, strict=True):
        for one, variant in zip(settings, variants, strict=True):
            assert variant.mask is not None
            in_mask = in_units(source, variant.mask.float())
            assert torch.equal(in_mask.amin(1), in_mask.amax(1))
            kept.append(in_mask[:, 0].bool())
            stored = METHOD.storage(source.layer, Storage.dense(source.layer), one)
            assert variant.storage == stored
            parts = variant.pack()
            assert sum(part.nbytes for part in parts.values()) == stored.nbytes
            assert torch.equal(Variant.unpack(stored, parts).weight, variant.weight)
            removed = variant.weight[~variant.mask]
            assert not removed.any() and not removed.signbit().any()
    for maker, taker in zip(kept[:3], kept[3:], strict=True):
        assert torch.equal(maker, taker)
    assert not (kept[0] & ~kept[1]).any() and not (kept[1] & ~kept[2]).any()
    maker = made[0][1]
    assert torch.equal(maker.weight, maker.weight.new_ones(32, 3) * maker.mask)


def test_independent_inputs_are_compared_one_by_one() -> None:
    weight = torch.tensor([[3.0, 1.0, 2.0, 1.0], [4.0, 1.0, 0.0, -1.0]])
    inputs = torch.diag(torch.tensor([1.0, 3.0, 2.0, 4.0]))
    site, read = site_of(weight), statistics_of(inputs)
    settings = METHOD.check({"keep": 0.5, "damping": LEAST})
    scores = METHOD.scores(site, read, settings)
    assert scores.tolist() == pytest.approx([25.0, 18.0, 16.0, 32.0], rel=1e-4)
    variant = METHOD.compress_site(site, read, [settings])[1][0]
    wanted = torch.tensor([[3.0, 0.0, 0.0, 1.0], [4.0, 0.0, 0.0, -1.0]])
    torch.testing.assert_close(variant.weight, wanted)


@pytest.mark.parametrize("damping", [LEAST, 0.01])
def test_of_twins_one_goes_and_the_other_takes_over(damping: float) -> None:
    inputs = draw(64, 8, seed=3)
    inputs[:, 5] = inputs[:, 2]
    weight = draw(4, 8, seed=4)
    weight[:, 5] = 1 - weight[:, 2]  # together they are 1
    site, read = site_of(weight), statistics_of(inputs)
    settings = METHOD.check({"keep": 0.875, "damping": damping})
    variant = METHOD.compress_site(site, read, [settings])[1][0]
    assert variant.mask is not None
    gone = (~variant.mask[0]).nonzero()[:, 0].tolist()
    assert gone in ([2], [5])
    found = variant.weight[:, 7 - gone[0]]
    torch.testing.assert_close(
        found, torch.ones(4), rtol=0.0, atol=2.1 * damping + 1e-3
    )


@pytest.mark.parametrize("unit", [1, 4])
def test_dead_inputs_go_first(unit: int) -> None:
    inputs = draw(256, 16, seed=5)
    inputs[:, 4:8] = 0.0
    site = site_of(10 * draw(8, 16), unit)
    settings = METHOD.check({"keep": 0.75})
    variant = METHOD.compress_site(site, statistics_of(inputs), [settings])[1][0]
    assert variant.mask is not None
    wanted = torch.ones(8, 16, dtype=torch.bool)
    wanted[:, 4:8] = False
    assert torch.equal(variant.mask, wanted)
    dense = site[1].variant.weight * wanted
    torch.testing.assert_close(variant.weight, dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("damping", [LEAST, 0.01])
def test_fewer_tokens_than_inputs_do_no_harm(damping: float, unit: int) -> None:
    inputs = draw(10, 32, seed=6) @ draw(32, 32, seed=7)
    site, read = site_of(draw(8, 32), unit), statistics_of(inputs)
    settings = METHOD.check({"keep": 0.5, "damping": damping})
    variant = METHOD.compress_site(site, read, [settings])[1][0]
    assert torch.isfinite(variant.weight).all()
    dense = site[1].variant
    everything = output_error(dense, Variant.dense(torch.zeros(8, 32)), read["o"])
    # Sixteen inputs can say what ten tokens ask.
    assert output_error(dense, variant, read["o"]) < 0.02 * everything


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_it_errs_less_than_plain_channels(keep: float) -> None:
    read = {"o": tiny_statistics(64, tokens=512)}
    site = site_of(draw(16, 64))
    errors = []
    for method in (METHOD, Channels()):
        made = method.compress_site(site, read, [method.check({"keep": keep})])[1][0]
        errors.append(output_error(site[1].variant, made, read["o"]))
    assert errors[0] < 0.8 * errors[1]


CASES = [
    ("weight of v holds NaN", torch.nan, 1.0, tiny_statistics(8)),
    ("weight of o holds NaN", 1.0, torch.inf, tiny_statistics(8)),
    ("Hessian of the inputs of o was not", 1.0, 1.0, InputStatistics(1)),
    ("inputs of o were zero", 1.0, 1.0, tiny_statistics(8, dead=range(8))),
]


@pytest.mark.parametrize(("told", "maker", "taker", "read"), CASES)
def test_what_cannot_be_done_is_said(
    told: str, maker: float, taker: float, read: InputStatistics
) -> None:
    site = site_of(torch.full((4, 8), taker))
    site[0] = source_of("v", "rows", torch.full((8, 3), maker), 1)
    with pytest.raises(MethodError, match=told):
        METHOD.compress_site(site, {"o": read}, [METHOD.check({"keep": 0.5})])


def test_no_damping_at_all_is_refused() -> None:
    with pytest.raises(MethodError, match=r"ziplm\(damping=\.\.\.\) lies from 1e-06"):
        METHOD.check({"keep": 0.5, "damping": 0.0})


def test_a_bank_makes_it_with_the_step_after(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mlp, attention = "ziplm(keep=0.5) + gptq(bits=8, group=16)", "ziplm(keep=0.5)"
    texts = {"mlp": mlp, "attention": attention}
    config = config_of(
        tiny_checkpoint,
        write_text(tmp_path),
        space=[
            {"sites": f"blocks.*.{name}", "actions": [text, "dense"]}
            for name, text in texts.items()
        ],
        objective={"metric": "kl"},
    )
    plugins = load_plugins(["autoprune_plugins.structured_obs"])
    plan = Plan.make(config, plugins, cache=tmp_path)
    plan.bank.make(plan.pairs)
    groups = {group.name: group for group in plan.bench.inventory.groups}
    for name, text in texts.items():
        action = plan.bench.actions.canonical(Action.parse(text))
        layers = groups[f"blocks.1.{name}"].layers
        variants = [plan.bank.get(layer, action) for layer in layers]
        kept = [
            in_units(Source(layer, variant), variant.weight).any(1).tolist()
            for layer, variant in zip(layers, variants, strict=True)
        ]
        assert all(one == kept[0] for one in kept)
        assert sum(kept[0]) * 2 == len(kept[0])
