import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

from autoprune.searching.problem import Problem
from autoprune.searching.projection import SLACK
from autoprune.searching.samplers import BudgetedSampler, derive_seed
from autoprune.searching.space import SearchSpace
from autoprune.searching.strategies import Brief, ExhaustedError, SamplerFactory


class FirstSite(BaseSampler):
    """A third party's sampler: proposes one site, leaves the others open."""

    def infer_relative_search_space(self, study, trial):
        space = optuna.search_space.IntersectionSearchSpace().calculate(study)
        return dict(list(space.items())[:1])

    def sample_relative(self, study, trial, search_space):
        return {name: d.choices[-1] for name, d in search_space.items()}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return param_distribution.choices[0]


FACTORIES = [
    SamplerFactory("random", lambda brief: RandomSampler(seed=brief.seed)),
    SamplerFactory(
        "nsga2", lambda brief: NSGAIISampler(population_size=4, seed=brief.seed)
    ),
    SamplerFactory(
        "tpe",
        lambda brief: TPESampler(
            multivariate=True, n_startup_trials=4, seed=brief.seed
        ),
        changes=4,
    ),
    SamplerFactory("first site", lambda brief: FirstSite()),
]
every_factory = pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.name)


def study_of(problem, factory, objectives=1, seed=0):
    brief = Brief(seed=seed, objectives=objectives, problem=problem)
    sampler = BudgetedSampler(brief, factory)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * objectives)
    return study, sampler


def values_of(problem, params, objectives):
    indices = problem.space.index(problem.space.policy(params))
    return [float(((indices - goal) ** 2).sum()) for goal in range(objectives)]


def run(problem, factory, trials, objectives=1, seed=0):
    study, _ = study_of(problem, factory, objectives, seed)
    for _ in range(trials):
        trial = study.ask(problem.space.distributions())
        study.tell(trial, values_of(problem, trial.params, objectives))
    return study.trials


@every_factory
@pytest.mark.parametrize("objectives", [1, 2])
def test_every_trial_is_new_and_on_the_budget(problem_of, factory, objectives):
    problem = problem_of(30, 6, budget=0.5)
    limit = problem.budgets[0].limit
    policies = [
        problem.space.policy(trial.params)
        for trial in run(problem, factory, 16, objectives)
    ]
    sizes = [problem.price("size_bytes", policy) for policy in policies]
    assert limit * (1 - SLACK) <= min(sizes) <= max(sizes) <= limit
    assert len(set(policies)) == 16


@every_factory
def test_equal_seeds_propose_equal_policies(problem_of, factory):
    problem = problem_of(12, 6, budget=0.5)
    one, same, other = (
        [trial.params for trial in run(problem, factory, 12, seed=seed)]
        for seed in (3, 3, 4)
    )
    assert one == same
    assert one != other


def test_without_budgets_the_proposal_is_what_the_inner_sampler_says(problem_of):
    problem = problem_of(5, 6)
    params = run(problem, FACTORIES[3], 1)[0].params
    texts = list(params.values())
    assert texts == ["wanda(sparsity=0.6)"] + ["wanda(sparsity=0.1)"] * 4


def test_repeat_is_changed_at_one_site(problem_of):
    problem = problem_of(5, 6)
    first, second = (trial.params for trial in run(problem, FACTORIES[3], 2))
    assert sum(first[site] != second[site] for site in first) == 1


def test_policies_of_a_study_made_elsewhere_count_as_known(problem_of):
    problem = problem_of(1, 3)
    study, _ = study_of(problem, FACTORIES[0])
    distributions = problem.space.distributions()
    for text in distributions["blocks.0.up"].choices[:2]:
        params = {"blocks.0.up": text}
        study.add_trial(
            optuna.create_trial(params=params, distributions=distributions, value=0.0)
        )
    trial = study.ask(distributions)
    assert trial.params == {"blocks.0.up": "wanda(sparsity=0.3)"}


@every_factory
def test_small_space_is_exhausted_and_says_so(problem_of, factory):
    problem = problem_of(2, 3)
    study, _ = study_of(problem, factory)
    with pytest.raises(ExhaustedError, match="it has 9 of 9"):
        for _ in range(10):
            trial = study.ask(problem.space.distributions())
            study.tell(trial, values_of(problem, trial.params, 1))
    assert len({tuple(t.params.values()) for t in study.trials[:9]}) == 9


def test_given_policy_joins_the_first_generation_and_may_be_a_parent(problem_of):
    problem = problem_of(30, 6)
    study, sampler = study_of(problem, FACTORIES[1])
    optimum = {site: "wanda(sparsity=0.1)" for site in problem.space.choices}
    sampler.give(optimum)
    trials = [study.ask(problem.space.distributions())]
    study.tell(trials[0], 0.0)
    for _ in range(11):
        trials.append(study.ask(problem.space.distributions()))
        study.tell(trials[-1], values_of(problem, trials[-1].params, 1))
    generations = [t.system_attrs["NSGAIISampler:generation"] for t in study.trials]
    assert study.trials[0].params == optimum
    assert generations == [0] * 4 + [1] * 4 + [2] * 4
    same = [sum(t.params[s] == optimum[s] for s in optimum) for t in trials[8:]]
    assert max(same) >= 10  # a random policy has 5 of 30


def test_changes_bound_how_far_a_proposal_leaves_the_best(problem_of):
    problem = problem_of(40, 6)
    trials = run(problem, FACTORIES[2], 20)
    for number in range(1, 20):
        best = min(trials[:number], key=lambda trial: trial.value)
        moved = [
            s for s, text in best.params.items() if text != trials[number].params[s]
        ]
        assert 1 <= len(moved) <= 4


def test_changes_start_from_a_feasible_trial(problem_of):
    problem = problem_of(40, 6)
    study, _ = study_of(problem, FACTORIES[2])
    distributions = problem.space.distributions()
    for value, excess, text in ((0.0, 1.0, "0.1"), (5.0, -1.0, "0.2")):
        params = dict.fromkeys(distributions, f"wanda(sparsity={text})")
        study.add_trial(
            optuna.create_trial(
                params=params,
                distributions=distributions,
                value=value,
                constraints={"latency_ms": excess},
            )
        )
    params = study.ask(distributions).params
    assert list(params.values()).count("wanda(sparsity=0.2)") >= 36


@pytest.mark.parametrize("spread", [None, "size_bytes"])
def test_independent_draws_are_spread_over_all_sizes(problem_of, spread):
    problem = problem_of(100, 6)
    brief = Brief(seed=0, objectives=1, problem=problem)
    sampler = BudgetedSampler(brief, FACTORIES[0], spread=spread)
    study = optuna.create_study(sampler=sampler)
    sizes = []
    for _ in range(20):
        trial = study.ask(problem.space.distributions())
        study.tell(trial, 0.0)
        policy = problem.space.policy(trial.params)
        sizes.append(problem.price("size_bytes", policy))
    low, high = problem.prices[0].reach(problem.space)
    width = (max(sizes) - min(sizes)) / (high - low)
    assert width > 0.7 if spread else width < 0.3


def test_fixed_sites_keep_their_only_action(problem_of):
    problem = problem_of(4, 6)
    choices = {**problem.space.choices}
    choices["blocks.2.up"] = choices["blocks.2.up"][3:4]
    fixed = Problem(SearchSpace(problem.space.sites, choices))
    for trial in run(fixed, FACTORIES[2], 10):
        assert trial.params["blocks.2.up"] == "wanda(sparsity=0.4)"


def test_seeds_differ_by_run_and_by_trial():
    seeds = {derive_seed(seed, number) for seed in range(20) for number in range(20)}
    assert len(seeds) == 400
    assert max(seeds) < 2**32
    assert derive_seed(0, 0) == int(np.random.SeedSequence([0, 0]).generate_state(1)[0])
