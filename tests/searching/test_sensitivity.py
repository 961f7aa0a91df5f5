"""Sensitivities are laid out as the space is, and measured once."""

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import write_text
from toy_evaluators import ShuffledCrew

from autoprune.compression.store import VariantStore
from autoprune.config import TextConfig
from autoprune.errors import ConfigError, RunError, StoreError
from autoprune.evaluation.fisher import output_squares
from autoprune.evaluation.sensitivity import output_errors
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Action, Policy
from autoprune.searching.costings import Scores
from autoprune.searching.preparing import measure_together
from autoprune.searching.sensitivity import KINDS, FisherRows, Sensitivities
from autoprune.searching.space import SearchSpace, build_space
from autoprune.searching.trial import LocalEvaluator

WANDA = Action.parse("wanda(sparsity=0.5)")
ROUND = Action.parse("rtn(bits=6, group=16)")
COARSE = Action.parse("rtn(bits=3, group=16)")

PARTS = {"blend": ["fisher", "outputs"]}
"""What is measured for a kind that is made of others."""

SHARES = {"error": 2, "fisher": 4, "outputs": 6, "blend": 6, "measured": 3}
"""Blocks, windows or handfuls of choices that workers can share."""


@pytest.fixture(scope="module")
def bench(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench.open(
        load_plugins(),
        model=str(tiny_checkpoint),
        task="causal-lm",
        text=TextConfig(
            source=write_text(tmp_path_factory.mktemp("text")),
            window=32,
            statistics=4,
            fitness=6,
            choice=2,
            report=2,
        ),
        target="packed",
        seed=0,
        cache=tmp_path_factory.mktemp("cache"),
    )


def space_of(bench: Workbench, *actions: Action) -> SearchSpace:
    rules = [("*", (DENSE, ROUND)), ("blocks.*", actions)]
    return build_space(bench.inventory.sites, rules, bench.actions.refuses)


def sensitivities(bench: Workbench, folder: Path, *actions: Action) -> Sensitivities:
    """Open sensitivities whose memory is a folder of the test's own."""
    own = replace(bench, store=VariantStore(folder / "variants", 10**9))
    return Sensitivities(own, own.bank(), space_of(bench, *actions), windows=4)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_have_the_order_of_the_space(
    kind: str, bench: Workbench, tmp_path: Path
) -> None:
    found = sensitivities(bench, tmp_path, WANDA, DENSE, COARSE)
    costs = found.costs(kind)
    assert costs.shape == (9, 3)
    assert found.space.sites[0].name == "embedding"
    assert costs[0, 0] == 0 and costs[0, 1] > 0 and costs[0, 2] == np.inf
    assert (costs[1:, 1] == 0).all() and (costs[1:, [0, 2]] > 0).all()
    assert found.seconds.keys() == set(PARTS.get(kind, [kind]))
    # Read again, by another object, and not measured.
    again = sensitivities(bench, tmp_path, WANDA, DENSE, COARSE)
    assert np.array_equal(again.costs(kind), costs)
    assert again.seconds == {}


@pytest.mark.parametrize("kind", KINDS)
def test_one_more_action_measures_only_that(
    kind: str, bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = sensitivities(bench, tmp_path, WANDA, COARSE).costs(kind)
    more = sensitivities(bench, tmp_path, COARSE, ROUND, WANDA)
    with caplog.at_level(logging.INFO, "autoprune.searching.sensitivity"):
        costs = more.costs(kind)
    pairs = 8 if kind == "measured" else 14  # sites, layers
    for part in PARTS.get(kind, [kind]):
        assert f"sensitivities {part} of {pairs} pairs took" in caplog.text
    assert np.array_equal(costs[1:, [2, 0]], first[1:, :2])
    fresh = sensitivities(bench, tmp_path / "fresh", COARSE, ROUND, WANDA)
    np.testing.assert_allclose(fresh.costs(kind), costs, rtol=1e-4, atol=1e-7)


def measured_by(crew: ShuffledCrew, found: Sensitivities) -> Sensitivities:
    return replace(found, measure=partial(measure_together, crew), seconds={})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [2, 3, 7])
def test_shares_find_together_what_one_finds(
    kind: str, workers: int, bench: Workbench, tmp_path: Path
) -> None:
    """In whatever order they end, and though some are lost on the way."""
    alone = sensitivities(bench, tmp_path / "alone", WANDA, COARSE)
    other = sensitivities(bench, tmp_path / "together", WANDA, COARSE)
    evaluator = LocalEvaluator(other.bench, other.bank, other.space)
    crew = ShuffledCrew(evaluator, workers, seed=workers, lost=0.08)
    together = measured_by(crew, other)
    np.testing.assert_allclose(
        together.costs(kind), alone.costs(kind), rtol=1e-4, atol=1e-7
    )
    assert crew.most == min(workers, SHARES[kind])
    assert other.costs(kind).tolist() == together.costs(kind).tolist()  # they are kept
    assert other.seconds == {}


def test_labels_are_drawn_by_windows(bench: Workbench, tmp_path: Path) -> None:
    """Who takes which windows does not show in the rows."""
    found = sensitivities(bench, tmp_path, WANDA)
    layers = [layer for site in found.space.sites[1:] for layer in site.layers]
    costing = Scores(dict.fromkeys(layers, [WANDA]), "fitness", range(5), draws=3)
    (whole,) = costing.run(found.bench, found.bank)
    parts = [next(part.run(found.bench, found.bank)) for part in costing.shares(2)]
    (joined,) = costing.joined(iter([(1, parts[1]), (0, parts[0])]))
    for pair, rows in whole.items():
        np.testing.assert_allclose(joined[pair], rows, rtol=1e-3, atol=1e-6)


def test_share_that_costs_workers_again_and_again_ends_the_run(
    bench: Workbench, tmp_path: Path
) -> None:
    found = sensitivities(bench, tmp_path, WANDA)
    evaluator = LocalEvaluator(found.bench, found.bank, found.space)
    lost = measured_by(ShuffledCrew(evaluator, 2, lost=1.0), found)
    with pytest.raises(RunError, match="measuring sensitivities cost 3 workers; the"):
        lost.costs("error")


def test_errors_of_a_site_are_the_sum_of_its_layers(
    bench: Workbench, tmp_path: Path
) -> None:
    found = sensitivities(bench, tmp_path, WANDA)
    costs = found.costs("error")
    site = next(s for s in found.space.sites if len(s.layers) > 1)
    row = found.space.sites.index(site)
    layers = output_errors(found.bank, dict.fromkeys(site.layers, [WANDA]))
    plain = sum(float(values[0]) for values in layers.values())
    assert costs[row, 0] == pytest.approx(plain)


def test_outputs_take_all_text_there_is_before_more_labels(
    bench: Workbench, tmp_path: Path
) -> None:
    """Half of the draws of ``fisher``: 8 of 16, then 13 of 26, over 6 windows."""
    found = sensitivities(bench, tmp_path, WANDA, COARSE)
    few = replace(found, windows=2, draws=13, seconds={})
    costs = {1: found.costs("outputs"), 2: few.costs("outputs")}
    layers = [la for site in found.space.sites[1:] for la in site.layers]
    wanted = dict.fromkeys(layers, [WANDA, COARSE])
    teacher = found.bench.teacher("fitness")
    for draws, had in costs.items():
        plain = output_squares(found.bank, teacher, wanted, range(6), draws=draws)
        for row, site in enumerate(found.space.sites[1:], start=1):
            expected = np.sum([plain[layer] for layer in site.layers], 0)
            np.testing.assert_allclose(had[row, :2], expected, rtol=1e-4)


def test_a_blend_lies_between_its_parts_as_a_geometric_mean(
    bench: Workbench, tmp_path: Path
) -> None:
    found = sensitivities(bench, tmp_path, WANDA, DENSE, COARSE)
    blend, one, other = (found.costs(k) for k in ("blend", "fisher", "outputs"))
    some = np.isfinite(one) & (one > 0)
    assert some.sum() == 17 and not np.allclose(one[some], other[some], rtol=0.05)
    logs = (np.log(one[some]) + np.log(other[some])) / 2
    np.testing.assert_allclose(np.log(blend[some]), logs, rtol=1e-9)
    assert np.array_equal(blend[~some], one[~some])


def test_measured_costs_are_those_of_plain_measurements(
    bench: Workbench, tmp_path: Path
) -> None:
    found = sensitivities(bench, tmp_path, WANDA, DENSE)
    own, bank = found.bench, found.bank
    row = 3
    site = found.space.sites[row].name
    policy = Policy(dict(own.dense_policy()) | {site: WANDA})
    bank.put(own.per_layer(policy))
    plain = own.teacher("fitness").measure(own.stitched.model, range(4)).mean_kl
    assert found.costs("measured")[row, 0] == pytest.approx(plain, abs=1e-6)


def test_measured_at_an_incumbent(bench: Workbench, tmp_path: Path) -> None:
    found = sensitivities(bench, tmp_path, WANDA, COARSE)
    base = found.space.at(np.array([0] + [1] * 8))
    at_base = replace(found, base=base, seconds={})
    costs, dense = at_base.costs("measured"), found.costs("measured")
    assert (costs[0, 0], *costs[1:, 1]) == (0.0,) * 9
    assert (dense[1:, 1] > 0).all()
    assert not np.array_equal(costs[1:, 0], dense[1:, 0])


def test_policies_are_foretold_as_their_rows_say(
    bench: Workbench, tmp_path: Path
) -> None:
    found = sensitivities(bench, tmp_path, WANDA, DENSE, ROUND)
    rows = found.fisher_rows()
    assert rows.scores.shape == (9, 3, 16)
    assert np.array_equal(rows.costs(), found.costs("fisher"))
    rng = np.random.default_rng(0)
    policies = rng.integers(0, 2, (5, 9))
    many = rows.predict_many(policies)
    for policy, foretold in zip(policies, many, strict=True):
        summed = sum(rows.scores[site, choice] for site, choice in enumerate(policy))
        plain = np.square(np.asarray(summed, dtype=np.float64)).mean() / 2
        assert rows.predict(policy) == pytest.approx(plain, rel=1e-5)
        assert foretold == pytest.approx(plain, rel=1e-5)
    alone = np.zeros(9, dtype=np.int64)
    alone[1:] = 1  # dense in all blocks
    assert rows.predict(alone) == 0
    alone[4] = 0
    assert rows.predict(alone) == pytest.approx(rows.costs()[4, 0], rel=1e-5)


def test_prediction_takes_microseconds() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((210, 16, 32)).astype(np.float32)
    rows = FisherRows(scores, np.full(210, 16))
    policy = rng.integers(0, 16, 210)
    took = []
    for _ in range(20):
        start = time.perf_counter()
        rows.predict(policy)
        took.append(time.perf_counter() - start)
    assert min(took) < 1e-3


def test_a_damaged_file_is_made_again(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    costs = sensitivities(bench, tmp_path, WANDA).costs("error")
    (file,) = (tmp_path / "sensitivities").glob("*.npz")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:100], b"", bytes(flipped)):
        file.write_bytes(content)
        caplog.clear()
        again = sensitivities(bench, tmp_path, WANDA)
        assert np.array_equal(again.costs("error"), costs)
        assert f"{file} is damaged" in caplog.text
        assert again.seconds.keys() == {"error"}


def test_what_cannot_be_written_is_told(bench: Workbench, tmp_path: Path) -> None:
    found = sensitivities(bench, tmp_path, WANDA)
    (tmp_path / "sensitivities").write_text("a file in the folder's place")
    with pytest.raises(StoreError, match=r"cannot write sensitivities to .*npz: "):
        found.costs("error")


def test_an_unknown_kind_is_refused(bench: Workbench, tmp_path: Path) -> None:
    found = sensitivities(bench, tmp_path, WANDA)
    with pytest.raises(ConfigError, match="sensitivity 'fischer'. Did you mean 'fish"):
        found.costs("fischer")
