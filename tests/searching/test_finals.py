"""The last choice among the best trials, on text that the search never saw."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tiny_runs import config_of, write_text

from autoprune.errors import BudgetError
from autoprune.evaluation.metric import Measured
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Policy
from autoprune.searching.finals import (
    Candidate,
    Finalist,
    best_so_far,
    elect,
    gains,
    rank,
    report,
    resolve_anew,
    take_candidates,
)
from autoprune.searching.mixing import mixes
from autoprune.searching.objective import Limit, Objective
from autoprune.searching.plan import Plan
from autoprune.searching.rows import Trial, utc_now

KL = Objective((("kl", "minimize"),))
BOTH = Objective((("kl", "minimize"), ("size_bytes", "minimize")))


def trial(number: int, *values: float, origin: str = "tpe", **more: object) -> Trial:
    now = utc_now()
    text = f"rtn(bits={number % 7 + 2}, group={number + 1})"
    about: dict[str, object] = {
        "state": "complete",
        "metrics": {"kl": max(values, default=math.nan), "reward": -sum(values)},
    }
    return Trial(
        number=number,
        origin=origin,
        policy=Policy({"blocks.0.o": Action.parse(text)}),
        params={},
        seed=0,
        started=now,
        finished=now,
        values=values,
        **{**about, **more},  # type: ignore[arg-type]
    )


def numbers(candidates: list[Candidate]) -> list[int]:
    return [candidate.trial for candidate in candidates]


def test_the_best_are_taken_with_the_best_rival() -> None:
    trials = [
        trial(0, 5.0, origin="uniform rtn"),
        trial(1, 4.0, origin="uniform gptq"),
        trial(2, 1.0),
        trial(3, 3.0),
        trial(4, 2.0),
        trial(5, 0.1, state="diverged"),
        trial(6, 0.1, constraints={"kl": 0.5}),
    ]
    assert numbers(take_candidates(trials, KL, count=2)) == [2, 4, 1]
    assert numbers(take_candidates(trials, KL, count=9)) == [2, 4, 3, 1, 0]
    assert best_so_far(trials, KL) == trials[2].policy


def test_a_rival_that_is_among_the_best_is_taken_once() -> None:
    trials = [trial(0, 1.0, origin="uniform rtn"), trial(1, 2.0)]
    assert numbers(take_candidates(trials, KL, count=2)) == [0, 1]


def test_large_values_can_be_the_best() -> None:
    trials = [trial(0, 1.0), trial(1, 3.0), trial(2, 2.0)]
    reward = Objective((("reward", "maximize"),))
    assert numbers(take_candidates(trials, reward, count=2)) == [1, 2]


def test_from_a_front_the_reward_picks() -> None:
    # By the first goal alone trial 0 would come first; trial 3 is beaten by trial 1.
    trials = [trial(0, 1.0, 9.0), trial(1, 2.0, 2.0), trial(2, 3.0, 1.5)]
    trials.append(trial(3, 2.0, 2.5))
    assert numbers(take_candidates(trials, BOTH, count=2)) == [1, 2]
    assert best_so_far(trials, BOTH) == trials[1].policy


def test_nothing_is_best_where_no_trial_keeps_the_limits() -> None:
    limited = Objective(KL.goals, (Limit("perplexity", 20.0),))
    trials = [
        trial(0, 1.0, metrics={"perplexity": 30.0}, constraints={"perplexity": 0.5}),
        trial(1, 2.0, metrics={"perplexity": 22.0}, constraints={"perplexity": 0.1}),
    ]
    assert best_so_far(trials, limited) is None
    message = (
        r"none of 2 trials kept every limit \(perplexity 20\); the nearest, trial 1, "
        "has perplexity 22. Relax the limits"
    )
    with pytest.raises(BudgetError, match=message):
        take_candidates(trials, limited, count=2)


def test_the_last_error_is_told_where_no_trial_is_complete() -> None:
    trials = [trial(0, 9.0, state="diverged"), trial(1, state="failed", error="E: why")]
    with pytest.raises(BudgetError, match="none of 2 trials is complete; .*: E: why"):
        take_candidates(trials, KL, count=2)
    with pytest.raises(BudgetError, match="none of 1 trials is .*last one: diverged"):
        take_candidates(trials[:1], KL, count=2)


def test_candidates_know_what_they_scored_before() -> None:
    trials = [trial(0, 1.0), trial(1, 2.0)]
    found = take_candidates(trials, KL, count=2)
    assert [one.fitness for one in found] == [one.metrics for one in trials]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Plan:
    text = write_text(tmp_path_factory.mktemp("text"))
    space = [{"actions": ["gptq(bits=[3, 4], group=16)", "wanda(pattern=2:4)"]}]
    config = config_of(tiny_checkpoint, text, space=space, bank="dense", objective={})
    return Plan.make(config, load_plugins())


def candidates(plan: Plan) -> list[Candidate]:
    return [
        Candidate(number, origin, policy)
        for number, (origin, policy) in enumerate(plan.proposals)
    ]


def kl(measured: Measured) -> float:
    return measured.metrics["kl"]


def test_candidates_are_ranked_by_what_they_cost_on_the_choice_split(
    plan: Plan,
) -> None:
    ranked = rank(plan.bench, plan.bank, candidates(plan), kl)
    origins = [finalist.candidate.origin for finalist in ranked]
    assert origins == [
        "uniform gptq(bits=4, group=16)",
        "uniform gptq(bits=3, group=16)",
        "uniform wanda(pattern=2:4)",
    ]
    for finalist in ranked:
        policy = finalist.candidate.policy
        found = plan.bench.measure(policy, plan.bank, "choice").metrics
        assert finalist.choice.metrics == found
        assert not finalist.resolved
        assert finalist.reference is None
    upside_down = rank(plan.bench, plan.bank, candidates(plan), lambda m: -kl(m))
    assert [f.candidate.origin for f in upside_down] == origins[::-1]


@pytest.fixture
def finalist(plan: Plan) -> Callable[..., Finalist]:
    """Makes finalists of given divergences on both splits."""

    def finalist(name: str, fitness: float, choice: float) -> Finalist:
        _, policy = plan.proposals[0]
        candidate = Candidate(0, name, policy, {"kl": fitness})
        return Finalist(candidate, plan.bank, Measured({"kl": choice}, None, {}))

    return finalist


def test_gains_are_told_on_both_splits(finalist: Callable[..., Finalist]) -> None:
    rival, one = finalist("uniform rtn", 2.0, 1.5), finalist("gradient", 1.25, 1.25)
    assert gains(one, rival, kl) == (0.75, 0.25)
    assert gains(rival, one, kl) == (-0.75, -0.25)
    assert gains(one, rival, lambda m: -2 * kl(m)) == (-1.5, -0.5)


@pytest.mark.parametrize(
    ("searched", "elected"),
    [
        ({"a": (1.0, 1.4), "b": (1.5, 1.5)}, "a"),  # keeps 0.6 of 1.0
        ({"a": (1.0, 1.5), "b": (1.5, 1.6)}, "a"),  # just half
        ({"a": (1.0, 1.6), "b": (1.6, 1.7)}, "b"),  # 0.4 of 1.0; 0.3 of 0.4
        ({"a": (1.0, 1.6), "b": (1.0, 1.7)}, "uniform rtn"),
        ({"a": (1.0, 2.5), "b": (1.0, 2.1)}, "uniform rtn"),  # the rival is the best
        ({"a": (2.5, 1.9)}, "a"),  # behind on one split, and ahead on the other
        ({}, "uniform rtn"),
    ],
    ids=["most", "half", "next", "none", "worse", "surprise", "alone"],
)
def test_who_keeps_less_than_half_of_its_gain_is_passed_over(
    searched: dict[str, tuple[float, float]],
    elected: str,
    finalist: Callable[..., Finalist],
) -> None:
    """The plain rival stands at 2 on both splits."""
    known = searched | {"uniform rtn": (2.0, 2.0), "uniform gptq": (2.0, 3.0)}
    ranked = [finalist(name, *figures) for name, figures in known.items()]
    ranked.sort(key=lambda one: kl(one.choice))
    winner, rival = elect(ranked, kl)
    assert winner.candidate.origin == elected
    assert rival is not None and rival.candidate.origin == "uniform rtn"


def test_without_a_rival_the_best_is_elected(
    finalist: Callable[..., Finalist],
) -> None:
    ranked = [finalist("a", 1.0, 1.9), finalist("b", 0.1, 2.0)]
    assert elect(ranked, kl) == (ranked[0], None)


def test_a_finalist_knows_whose_inputs_it_was_made_on(plan: Plan) -> None:
    (_, basis), *_ = plan.proposals
    first, *_ = rank(plan.bench, plan.bank, candidates(plan), kl, basis=basis)
    assert first.reference == basis
    own = resolve_anew(plan.bench, first, lambda m: -kl(m), mix=False)
    other = resolve_anew(plan.bench, first, kl, mix=False)
    for one in (own, other):
        expected = first.candidate.policy if one.resolved else basis
        assert one.reference == expected


def test_the_better_of_two_solutions_is_kept(plan: Plan) -> None:
    """Whether its variants are made now or have been made before."""
    first = rank(plan.bench, plan.bank, candidates(plan), kl)[-1]
    policy = first.candidate.policy
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        steps.append((done, total))

    def solve(cost: Callable[[Measured], float]) -> Finalist:
        return resolve_anew(plan.bench, first, cost, progress, mix=False)

    for told in ([(0, 2), (1, 2), (2, 2)], []):
        better, worse = solve(lambda m: -kl(m)), solve(kl)
        kept = {better.resolved: better, worse.resolved: worse}
        assert kept.keys() == {True, False}  # one of the two is smaller
        assert kept[False] is first
        own = kept[True]
        assert own.bank.name != first.bank.name
        assert own.reference == policy
        again = plan.bench.measure(policy, own.bank, "choice").metrics
        assert own.choice.metrics == again
        assert kl(own.choice) != kl(first.choice)
        assert steps == told
        steps.clear()


def test_a_solution_that_diverges_is_no_better(plan: Plan) -> None:
    first = rank(plan.bench, plan.bank, candidates(plan), kl)[0]
    assert resolve_anew(plan.bench, first, lambda _: math.inf, mix=False) is first


@pytest.mark.parametrize("sign", [1, -1], ids=["better", "worse"])
def test_a_mix_is_kept_only_if_it_is_better_than_both(plan: Plan, sign: int) -> None:
    first = rank(plan.bench, plan.bank, candidates(plan), kl)[-1]
    policy, costs = first.candidate.policy, dict[str, float]()

    def cost(measured: Measured) -> float:
        return sign * kl(measured)

    plain = resolve_anew(plan.bench, first, cost, mix=False)
    best = resolve_anew(plan.bench, first, cost)
    own = plan.bench.bank(policy)
    banks = [plan.bank, own]
    if plain.bank is not first.bank:
        banks.reverse()
    costs = {
        bank.name: cost(plan.bench.measure(policy, bank, "choice"))
        for bank, _ in mixes(plan.bench, policy, *banks)
    }
    assert costs  # there is something to try
    if min(costs.values()) < cost(plain.choice):
        assert best.mix is not None
        assert best.bank.name == min(costs, key=costs.__getitem__)
        assert best.mix.reference == (None if plain.resolved else policy)
        assert report(plan.bench, best)["mixed_sites"] == len(best.mix.sites)
    else:
        assert best.mix is None
        assert best.bank.name == plain.bank.name
    assert cost(best.choice) == min(cost(plain.choice), *costs.values())


def test_the_report_says_how_sure_it_is(plan: Plan) -> None:
    first = rank(plan.bench, plan.bank, candidates(plan), kl)[0]
    told = report(plan.bench, first)
    assert told["trial"] == first.candidate.trial
    assert told["choice"] == first.choice.metrics
    fresh = plan.bench.measure(first.candidate.policy, plan.bank, "report").metrics
    assert told["report"] == fresh
    assert 0 < told["kl_standard_error"] < math.inf
    figures: Mapping[str, float] = told["report"]
    assert figures["kl"] != told["choice"]["kl"]  # other text
