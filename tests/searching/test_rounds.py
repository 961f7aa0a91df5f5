"""A further round keeps the choices near the incumbent, at half the step."""

import numpy as np
import pytest

from autoprune.policy import DENSE, Action, Policy
from autoprune.searching.budget import Prices
from autoprune.searching.problem import Problem
from autoprune.searching.rounds import narrowed
from autoprune.searching.space import SearchSpace

LADDER = [f"wanda(sparsity={level})" for level in (0.3, 0.4, 0.5, 0.6, 0.7)]


def every(site: str, action: Action) -> bool:
    return True


@pytest.fixture
def narrow(sites_of):
    """Narrows the space of one site; gives its actions as texts."""

    def narrow(texts, chosen, *, takes=every, prices=None):
        (site,) = sites_of(1)
        actions = tuple(Action.parse(text) for text in texts)
        space = SearchSpace((site,), {site.name: actions})
        table = {site.name: np.array(prices, dtype=float)} if prices else {}
        problem = Problem(space, (Prices("size_bytes", table),) if prices else ())
        found = narrowed(problem, Policy({site.name: Action.parse(chosen)}), takes)
        assert found.sites == (site,)
        return [str(action) for action in found.choices[site.name]]

    return narrow


@pytest.mark.parametrize(
    ("chosen", "levels"),
    [
        (0.5, [0.4, 0.5, 0.6, 0.45, 0.55]),
        (0.3, [0.3, 0.4, 0.35]),
        (0.7, [0.6, 0.7, 0.65]),
    ],
    ids=["middle", "low end", "high end"],
)
def test_neighbours_stay_and_half_steps_join_them(chosen, levels, narrow):
    found = narrow(LADDER, f"wanda(sparsity={chosen})")
    assert found == [f"wanda(sparsity={level})" for level in levels]


def test_the_order_of_the_choices_does_not_count(narrow):
    found = narrow(LADDER[::-1], "wanda(sparsity=0.5)")
    assert found == narrow(LADDER, "wanda(sparsity=0.5)")


def test_steps_need_not_be_even(narrow):
    texts = ["magnitude(sparsity=0.2)", "magnitude(sparsity=0.5)", "dense"]
    found = narrow([*texts, "magnitude(sparsity=0.6)"], "magnitude(sparsity=0.5)")
    levels = [0.2, 0.5, 0.6, 0.35, 0.55]
    assert found == [f"magnitude(sparsity={level})" for level in levels]


def test_the_next_round_halves_again(narrow):
    texts = narrow(LADDER, "wanda(sparsity=0.5)")
    found = narrow(texts, "wanda(sparsity=0.55)")
    levels = [0.5, 0.55, 0.6, 0.525, 0.575]
    assert found == [f"wanda(sparsity={level})" for level in levels]


def test_only_actions_that_are_alike_otherwise_make_a_ladder(narrow):
    """Another method, other parameters or other steps are no neighbours."""
    pruned = "sparsegpt(sparsity={})+gptq(bits={}, group=128)"
    texts = [pruned.format(s, b) for s in (0.3, 0.5, 0.7) for b in (3, 4)]
    texts += ["gptq(bits=4, group=128)", "wanda(sparsity=0.4)", "dense"]
    found = [Action.parse(text) for text in narrow(texts, pruned.format(0.5, 4))]
    levels = (0.3, 0.5, 0.7, 0.4, 0.6)
    assert found == [Action.parse(pruned.format(level, 4)) for level in levels]


def test_the_level_may_stand_in_a_later_step(narrow):
    later = "first(kind=a)+second(share={})"
    texts = [later.format(share) for share in (0.1, 0.2, 0.4)]
    found = [Action.parse(text) for text in narrow(texts, later.format(0.1))]
    assert found == [Action.parse(later.format(s)) for s in (0.1, 0.2, 0.15)]


BITS = [f"rtn(bits={bits})" for bits in (2, 3, 4, 5, 6, 8)]


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [(4, [2, 3, 4, 5, 6]), (2, [2, 3, 4]), (8, [5, 6, 8])],
    ids=["middle", "cheapest", "dearest"],
)
def test_whole_numbers_are_not_halved_but_the_nearest_in_price_stay(
    chosen, kept, narrow
):
    prices = [20.0, 30.0, 40.0, 50.0, 60.0, 80.0]
    found = narrow(BITS, f"rtn(bits={chosen})", prices=prices)
    assert found == [f"rtn(bits={bits})" for bits in kept]


def test_near_means_in_price_and_the_order_of_choices_stays(narrow):
    # By price: 8, 2, 6, 3, 5, 4.
    prices = [20.0, 40.0, 60.0, 50.0, 30.0, 10.0]
    found = narrow(BITS, "rtn(bits=2)", prices=prices)
    assert found == [f"rtn(bits={bits})" for bits in (2, 3, 6, 8)]


def test_a_level_without_another_is_no_ladder(narrow):
    texts = ["wanda(sparsity=0.5)", *BITS]
    prices = [25.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0]
    found = narrow(texts, "wanda(sparsity=0.5)", prices=prices)
    kept = ["wanda(sparsity=0.5)", *(f"rtn(bits={bits})" for bits in (2, 3, 4))]
    assert found == kept


def test_dense_has_no_level(narrow):
    found = narrow(["dense", *BITS], "dense", prices=[160, 20, 30, 40, 50, 60, 80])
    assert found == ["dense", "rtn(bits=6)", "rtn(bits=8)"]


def test_without_prices_every_choice_stays(narrow):
    assert narrow(BITS, "rtn(bits=4)") == BITS


def test_only_new_actions_are_asked_about_and_left_out_if_refused(narrow):
    asked = []

    def takes(site, action):
        asked.append((site, str(action)))
        return str(action) != "wanda(sparsity=0.45)"

    found = narrow(LADDER, "wanda(sparsity=0.5)", takes=takes)
    levels = [0.4, 0.5, 0.6, 0.55]
    assert found == [f"wanda(sparsity={level})" for level in levels]
    new = [("blocks.0.up", f"wanda(sparsity={level})") for level in (0.45, 0.55)]
    assert asked == new


def test_each_site_is_narrowed_around_its_own_action(problem_of):
    problem = problem_of(3, 7)
    around = problem.space.at(np.array([0, 3, 6]))
    found = narrowed(problem, around, every)
    levels = [
        [dict(a.steps[0].params)["sparsity"] for a in found.choices[s.name]]
        for s in found.sites
    ]
    assert levels == [
        [0.1, 0.2, 0.15],
        [0.3, 0.4, 0.5, 0.35, 0.45],
        [0.6, 0.7, 0.65],
    ]
    found.index(around)  # the incumbent is in its own space


def test_a_site_with_one_action_keeps_it(narrow):
    assert narrow([str(DENSE)], "dense", prices=[1.0]) == ["dense"]
