"""The gradient's steps, worked out by hand; searches with it: test_study_rungs."""

from dataclasses import replace

import numpy as np
import pytest
from autoprune_plugins.gradient import (
    EXPECTED,
    FEWEST,
    FORGETS,
    PATIENCE,
    Gradient,
    register_samplers,
)

from autoprune.policy import Action, Layer, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.problem import Problem
from autoprune.searching.rows import Trial
from autoprune.searching.slopes import SiteSlopes
from autoprune.searching.space import SearchSpace
from autoprune.searching.strategies import Brief, ExhaustedError, PolicySampler

SITES = 20


def make_problem(prices, sites=SITES):
    """Sites that all have these prices; the budget is that of the middle choice."""
    places = tuple(
        Site(f"s.{i}", (Layer(f"l.{i}", (4, 4), "float32", i, "up", None),))
        for i in range(sites)
    )
    actions = tuple(Action.parse(f"toy(keep={i})") for i in range(len(prices)))
    space = SearchSpace(places, {site.name: actions for site in places})
    table = {site.name: np.array(prices, dtype=float) for site in places}
    limit = float(sites * prices[len(prices) // 2])
    return Problem(
        space, (Prices("size_bytes", table),), (Budget("size_bytes", limit),)
    )


@pytest.fixture(scope="module")
def problem():
    """All choices cost the same: the slopes alone decide."""
    return make_problem((10, 10, 10))


def row(
    problem,
    number,
    *,
    base=0,
    step=None,
    changes=SITES,
    windows=(1.0, 1.0),
    indices=None,
):
    """A row; a ``step`` is a pair of what it promised, linear and curved."""
    if indices is None:
        indices = np.zeros(len(problem.space.sites), dtype=np.int64)
    policy = problem.space.at(indices)
    notes = {}
    if step is not None:
        linear, curved = step
        notes = {"base": base, "changes": changes, "promised": linear + curved}
        notes |= {"linear": linear, "curved": curved}
    return Trial(
        number=number,
        state="complete",
        origin="test",
        policy=policy,
        params=problem.space.params(policy),
        seed=0,
        started="",
        finished="",
        values=(float(np.mean(windows)),),
        system_attrs={PolicySampler.NOTES + k: v for k, v in notes.items()},
        windows=windows,
    )


def slopes(slope, curvature=None):
    slope = np.array(slope, dtype=np.float32)
    curved = np.zeros_like(slope) if curvature is None else curvature
    return SiteSlopes(slope, np.zeros_like(slope), np.float32(curved), (0,))


def falling():
    """Choice 1 gains 1, 2, 3 ... at the sites; choice 2 costs."""
    gains = np.arange(1.0, SITES + 1)
    return slopes(np.stack([0 * gains, -gains, 0 * gains + 1], axis=1))


def brief_of(problem, verdicts, *, found=None, seed=0):
    """A history of one base and steps that were accepted (+) or refused (-)."""
    rows, held = [row(problem, 0)], [0]
    for number, verdict in enumerate(verdicts, start=1):
        rows.append(row(problem, number, step=(-1.0, 0.0), base=held[-1]))
        held += [number] if verdict == "+" else []
    known = {number: found or falling() for number in held}
    return Brief(seed, 1, problem, tuple(rows), slopes=known)


def test_factory():
    (factory,) = register_samplers()
    assert (factory.name, factory.several, factory.changes) == ("gradient", False, None)
    assert factory.needs == {"slopes"}
    assert factory.make is Gradient


def test_first_step_changes_the_sites_that_promise_most(problem):
    chosen, notes = Gradient(brief_of(problem, "")).propose()
    assert chosen.tolist() == [0] * 14 + [1] * 6  # 0.3 of 20
    assert notes == {
        "base": 0,
        "changes": 6,
        "promised": -105.0,
        "linear": -105.0,
        "curved": 0.0,
    }


@pytest.mark.parametrize(
    ("verdicts", "changes"),
    [
        ("+", 9),  # 6 * 1.5
        ("++", 14),  # 13.5
        ("+++", 20),  # no more than there are
        ("++++-", 10),
        ("-", 3),
        ("-+", 4),  # 4.5, to the even
        ("--+", 3),  # never below 2, and so 3
        ("---+-+", 3),
        ("+-", 4),
    ],
)
def test_trust_region_grows_and_shrinks(problem, verdicts, changes):
    chosen, notes = Gradient(brief_of(problem, verdicts)).propose()
    assert chosen.tolist() == [0] * (SITES - changes) + [1] * changes
    last = verdicts.rfind("+") + 1
    assert notes["base"] == last


def test_steps_beside_each_other_are_ever_smaller(problem):
    brief, sizes = brief_of(problem, ""), []
    for number in range(1, 4):
        chosen, notes = Gradient(brief).propose()
        sizes.append(notes["changes"])
        step = row(problem, number, step=(-1.0, 0.0), changes=notes["changes"])
        brief = replace(brief, pending=(*brief.pending, step))
    assert sizes == [6, 3, 2]


def test_steps_of_an_incumbent_that_was_left_meanwhile_do_not_count(problem):
    brief = brief_of(problem, "+")
    late = [row(problem, n, step=(-1.0, 0.0), base=0) for n in range(2, 9)]
    brief = replace(brief, history=(*brief.history, *late))
    chosen, notes = Gradient(brief).propose()
    assert (notes["base"], chosen.sum()) == (1, 9)


def test_steps_of_an_older_version_do_not_count(problem):
    rows = [row(problem, 0), row(problem, 1, step=(-1.0, 0.0))]
    for name in ("promised", "changes"):
        del rows[1].system_attrs[PolicySampler.NOTES + name]
    brief = Brief(0, 1, problem, tuple(rows), slopes={0: falling()})
    chosen, _ = Gradient(brief).propose()
    assert chosen.sum() == 6  # as if it were the first


def test_rows_of_others_are_no_steps(problem):
    brief = brief_of(problem, "+")
    more = (*brief.history, row(problem, 2), row(problem, 3))
    chosen, _ = Gradient(Brief(0, 1, problem, more, slopes=brief.slopes)).propose()
    assert chosen.sum() == 9


def test_smallest_set_is_drawn_anew_when_it_is_refused(problem):
    drawn = []
    for seed in range(20):
        chosen, _ = Gradient(brief_of(problem, "---", seed=seed)).propose()
        again, _ = Gradient(brief_of(problem, "---", seed=seed)).propose()
        np.testing.assert_array_equal(chosen, again)
        assert (chosen == 1).sum() == FEWEST
        drawn.append(tuple(np.flatnonzero(chosen)))
    assert len(set(drawn)) > 5
    assert np.mean(drawn) > SITES / 2  # of those that are left in, the best


def test_patience_ends(problem):
    Gradient(brief_of(problem, "+" + "-" * (PATIENCE - 1))).propose()
    for before in ("", "+", "-----+"):
        brief = brief_of(problem, before + "-" * PATIENCE)
        with pytest.raises(ExhaustedError, match=f"last {PATIENCE} sets of changes"):
            Gradient(brief).propose()


def test_without_slopes_any_policy_on_the_budget_will_do():
    problem = make_problem(tuple(range(30, 10, -2)))
    chosen, notes = Gradient(Brief(0, 1, problem)).propose()
    price = problem.price("size_bytes", problem.space.at(chosen))
    limit = problem.budgets[0].limit
    assert 0.998 * limit <= price <= limit
    assert notes == {}


def test_step_reaches_a_quarter_of_the_choices_far():
    problem = make_problem(tuple(range(120, 0, -10)), sites=2)
    choices = np.arange(12.0)
    # The first site gains with every level up, the second a little with every one down.
    found = slopes([choices - 6, (6 - choices) / 2])
    base = row(problem, 0, indices=np.array([6, 6]))
    chosen, notes = Gradient(Brief(0, 1, problem, (base,), slopes={0: found})).propose()
    assert chosen.tolist() == [3, 9]
    assert notes["linear"] == -4.5


def test_proposal_fills_the_budget():
    problem = make_problem(tuple(range(120, 0, -10)))
    rng = np.random.default_rng(0)
    levels = np.arange(12.0) - 6
    found = slopes(rng.random((SITES, 1)) * levels + 0.1 * rng.random((SITES, 12)))
    base = row(problem, 0, indices=np.full(SITES, 6))
    chosen, _ = Gradient(Brief(0, 1, problem, (base,), slopes={0: found})).propose()
    assert 0 < (chosen != 6).sum() <= 6
    assert problem.price("size_bytes", problem.space.at(chosen)) == (
        problem.budgets[0].limit
    )


def test_slopes_without_noise_are_those_of_the_last_incumbent(problem):
    earlier = np.tile([0.0, -2.0, -1.0], (SITES, 1))
    later = np.tile([3.0, 0.0, 5.0], (SITES, 1))
    later[0] = [3.0, 0.0, -4.0]
    rows = (row(problem, 0), row(problem, 1, indices=np.full(SITES, 1)))
    known = {0: slopes(earlier), 1: slopes(later)}
    chosen, notes = Gradient(Brief(0, 1, problem, rows, slopes=known)).propose()
    assert chosen.tolist() == [2] + [1] * (SITES - 1)
    assert notes["linear"] == -4.0


def test_slopes_of_earlier_incumbents_outweigh_a_noisy_one(problem):
    """Only site 4 gains by each of five gradients; the last one, noisy, says 9 does."""
    steady = np.zeros((SITES, 3))
    steady[:, 2], steady[4, 1] = 1.0, -1.0
    last = steady.copy()
    last[4, 1], last[9, 1] = -0.4, -0.5
    rows, known = [row(problem, 0)], {}
    for number in range(5):
        found = slopes(steady if number < 4 else last)
        error = np.full_like(found.slope, 0.4)
        known[number] = replace(found, error=error)
        rows.append(row(problem, number + 1, step=(-1.0, 0.0)))
    brief = Brief(0, 1, problem, tuple(rows[:5]), slopes=known)
    slope, _ = Gradient(brief)._slopes()
    assert slope[4, 1] < -0.5 < 2 * slope[9, 1] <= 0


@pytest.mark.parametrize(
    ("steps", "true", "expected"),
    [
        (0, 0.8, 0.5),  # nothing known: what is expected
        (1, 0.8, (0.8 + 0.3) / 1.6),  # which counts as a step before the first
        (2, 0.9, (0.9 + 0.9 * 0.6 + 0.18) / 1.96),
        (9, 0.5, 0.5),
        (1, -5.0, (0.25 + 0.3) / 1.6),  # and no step tells of more than the bounds
        (40, 99.0, 1.0),
    ],
)
def test_weight_of_the_curvature_follows_the_steps(problem, steps, true, expected):
    rng = np.random.default_rng(0)
    base = (3.0, 1.0, 2.0)
    rows = [row(problem, 0, windows=base)]
    for number in range(steps):
        linear, curved = -rng.random(), rng.random()  # no step counts for its size
        gaps = linear + true * curved + np.array([0.1, -0.1, 0.0])
        windows = tuple(np.array(base) + gaps)
        rows.append(row(problem, number + 1, step=(linear, curved), windows=windows))
    brief = Brief(0, 1, problem, tuple(rows), slopes={0: falling()})
    assert Gradient(brief)._weight() == pytest.approx(expected, rel=1e-6)


def test_the_last_steps_tell_most_of_the_weight(problem):
    rows = [row(problem, 0, windows=(1.0, 1.0))]
    for number, true in enumerate((1.0, 1.0, 0.25, 0.25)):
        windows = (1.0 - 0.5 + true * 0.1,) * 2
        rows.append(row(problem, number + 1, step=(-0.5, 0.1), windows=windows))
    weights = [
        Gradient(Brief(0, 1, problem, tuple(some), slopes={0: falling()}))._weight()
        for some in (rows, [rows[0], *rows[:0:-1]])
    ]
    assert weights[0] < 0.6 < weights[1]


def test_weight_leaves_out_what_has_no_windows_or_diverged(problem):
    rows = [row(problem, 0)]
    rows.append(row(problem, 1, step=(-1.0, 0.5), windows=(0.4, 0.4)))  # true 0.8
    rows.append(row(problem, 2, step=(-1.0, 0.5), windows=(np.inf, 1.0)))
    rows.append(row(problem, 3, step=(-1.0, 0.5), windows=(np.nan, 1.0)))
    rows.append(row(problem, 4, step=(-1.0, 0.0), windows=(0.4, 0.4)))
    brief = Brief(0, 1, problem, tuple(rows), slopes={0: falling()})
    expected = (0.8 + FORGETS * EXPECTED) / (1 + FORGETS)
    assert Gradient(brief)._weight() == pytest.approx(expected)


@pytest.mark.parametrize(("change", "taken"), [(0.0, False), (-0.8, True)])
def test_curvature_of_that_weight_decides_what_is_changed(problem, change, taken):
    """A site that gains 1 and curves by 2 is changed once steps curve far less."""
    slope, curvature = np.zeros((SITES, 3)), np.zeros((SITES, 3))
    slope[:, 2] = 1.0
    slope[4, 1], curvature[4, 1] = -1.0, 2.0
    slope[7, 1] = -0.1  # something is always worth it
    found = slopes(slope, curvature)
    # Promised: -1 and 0.2 more. At 0.25 of it or less, the weight is below a half.
    rows = [row(problem, 0)]
    for number in range(1, 5):
        windows = (1.0 - 1.0 + 0.2 + change,) * 2
        rows.append(row(problem, number, step=(-1.0, 0.2), windows=windows))
    known = {number: found for number in range(5)}
    chosen, notes = Gradient(Brief(0, 1, problem, tuple(rows), slopes=known)).propose()
    expected = [7, *([4] if taken else [])]
    assert np.flatnonzero(chosen).tolist() == sorted(expected)
    assert notes["curved"] == (2.0 if taken else 0.0)


def test_where_nothing_is_worth_its_curvature_bolder_steps_are_tried(problem):
    slope, curvature = np.zeros((SITES, 3)), np.ones((SITES, 3))
    slope[:, 2] = 1.0
    slope[4, 1], curvature[:, 0] = -0.4, 0.0
    rows, known = (row(problem, 0),), {0: slopes(slope, curvature)}
    chosen, notes = Gradient(Brief(0, 1, problem, rows, slopes=known)).propose()
    assert np.flatnonzero(chosen).tolist() == [4]
    assert notes["linear"] == pytest.approx(-0.4)


@pytest.mark.parametrize(("gap", "sites"), [(-0.5, [4, 7]), (-0.1, [7]), (0.1, [7])])
def test_a_step_too_small_to_be_told_from_noise_is_followed_by_a_bolder_one(
    problem, gap, sites
):
    slope, curvature = np.zeros((SITES, 3)), np.zeros((SITES, 3))
    slope[:, 2] = 1.0
    slope[4, 1], curvature[4, 1] = -0.5, 1.5  # worth it at half of the weight
    slope[7, 1] = -1.0
    windows = (1.0 + gap,) * 2  # of a promise of 1, a half, a tenth or nothing
    rows = (row(problem, 0), row(problem, 1, step=(-1.0, 0.0), windows=windows))
    known = {0: slopes(slope, curvature)}
    chosen, _ = Gradient(Brief(0, 1, problem, rows, slopes=known)).propose()
    assert np.flatnonzero(chosen).tolist() == sites


def test_a_refused_step_shrinks_from_what_it_changed(problem):
    rows = (row(problem, 0), row(problem, 1, step=(-1.0, 0.0), changes=4))
    brief = Brief(0, 1, problem, rows, slopes={0: falling()})
    chosen, _ = Gradient(brief).propose()
    assert chosen.sum() == 2
