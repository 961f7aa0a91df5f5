"""The gradient's steps, worked out by hand; searches with it: test_study_rungs."""

import numpy as np
import pytest
from autoprune_plugins.gradient import (
    EXPECTED,
    FEWEST,
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


def row(problem, number, *, step=None, windows=(1.0, 1.0), indices=None):
    """A row; a ``step`` is a pair of what it promised, linear and curved."""
    if indices is None:
        indices = np.zeros(len(problem.space.sites), dtype=np.int64)
    policy = problem.space.at(indices)
    notes = {}
    if step is not None:
        notes = {"base": 0, "linear": step[0], "curved": step[1]}
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
    rows = [row(problem, 0)]
    rows += [row(problem, n + 1, step=(-1.0, 0.0)) for n in range(len(verdicts))]
    held = [0] + [n + 1 for n, verdict in enumerate(verdicts) if verdict == "+"]
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
    assert notes == {"base": 0, "linear": -105.0, "curved": 0.0}


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


def test_slopes_of_earlier_incumbents_fade(problem):
    """Weights 1, 1/2, 1/4, 1/8 from the last on; a fifth is forgotten."""
    table = np.zeros((SITES, 3))
    table[:, 2] = 1.0
    rows, known = [row(problem, 0)], {}
    for number, gain in enumerate((1000.0, 8.0, 4.0, 2.0, 1.0)):
        table[:, 1] = -gain
        known[number] = slopes(table)
        rows.append(row(problem, number + 1, step=(-1.0, 0.0)))
    chosen, notes = Gradient(
        Brief(0, 1, problem, tuple(rows[:5]), slopes=known)
    ).propose()
    each = -(1 + 2 / 2 + 4 / 4 + 8 / 8) / (1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert notes["linear"] == pytest.approx(each * (chosen == 1).sum(), rel=1e-12)
    assert (chosen == 1).all()  # four were accepted


def test_slopes_are_changes_from_where_the_incumbent_is(problem):
    """What an earlier incumbent gave for a choice is taken relative to that of now."""
    earlier = np.zeros((SITES, 3))
    earlier[:, 1:] = [-2.0, -1.0]
    later = np.tile([3.0, 0.0, 5.0], (SITES, 1))
    later[0] = [3.0, 0.0, -4.0]
    rows = (row(problem, 0), row(problem, 1, indices=np.full(SITES, 1)))
    known = {0: slopes(earlier), 1: slopes(later)}
    chosen, notes = Gradient(Brief(0, 1, problem, rows, slopes=known)).propose()
    assert chosen.tolist() == [2] + [1] * (SITES - 1)
    assert notes["linear"] == pytest.approx((-4.0 + 0.5 * 1.0) / 1.5)


@pytest.mark.parametrize(
    ("steps", "true", "expected"),
    [
        (0, 2.0, 0.5),  # nothing known: what is expected
        (1, 2.0, 1.25),  # drawn to that as by one step more
        (3, 2.0, 1.625),
        (9, 2.0, 1.85),
        (9, 1.0, 0.95),
        (1, -5.0, 0.25),  # and kept within bounds
        (9, 99.0, 4.0),
    ],
)
def test_weight_of_the_curvature_is_fitted_to_the_steps(problem, steps, true, expected):
    rng = np.random.default_rng(0)
    base = (3.0, 1.0, 2.0)
    rows = [row(problem, 0, windows=base)]
    for number in range(steps):
        linear, curved = -rng.random(), 0.2  # equal, so each step counts alike
        gaps = linear + true * curved + np.array([0.1, -0.1, 0.0])
        windows = tuple(np.array(base) + gaps)
        rows.append(row(problem, number + 1, step=(linear, curved), windows=windows))
    brief = Brief(0, 1, problem, tuple(rows), slopes={0: falling()})
    assert Gradient(brief)._weight() == pytest.approx(expected, rel=1e-9)


def test_weight_leaves_out_what_has_no_windows_or_diverged(problem):
    rows = [row(problem, 0)]
    rows.append(row(problem, 1, step=(-1.0, 0.5), windows=(0.75, 0.75)))  # true 1.5
    rows.append(row(problem, 2, step=(-1.0, 0.5), windows=(np.inf, 1.0)))
    rows.append(row(problem, 3, step=(-1.0, 0.5), windows=(np.nan, 1.0)))
    brief = Brief(0, 1, problem, tuple(rows), slopes={0: falling()})
    below = 0.5**2
    prior = below / 3
    expected = (1.5 * below + EXPECTED * prior) / (below + prior)
    assert Gradient(brief)._weight() == pytest.approx(expected)


@pytest.mark.parametrize(("change", "taken"), [(0.0, False), (-0.8, True)])
def test_curvature_of_that_weight_decides_what_is_changed(problem, change, taken):
    """A site that gains 1 and curves by 2 is changed once steps curve far less."""
    slope, curvature = np.zeros((SITES, 3)), np.zeros((SITES, 3))
    slope[:, 2] = 1.0
    slope[4, 1], curvature[4, 1] = -1.0, 2.0
    found = slopes(slope, curvature)
    # Promised: -1 and 0.2 more. At 0.25 of it or less, the weight is below a half.
    rows = [row(problem, 0)]
    for number in range(1, 5):
        windows = (1.0 - 1.0 + 0.2 + change,) * 2
        rows.append(row(problem, number, step=(-1.0, 0.2), windows=windows))
    known = {number: found for number in range(5)}
    chosen, notes = Gradient(Brief(0, 1, problem, tuple(rows), slopes=known)).propose()
    assert chosen.tolist() == [int(taken and site == 4) for site in range(SITES)]
    assert notes["curved"] == (2.0 if taken else 0.0)
