import numpy as np
import optuna
import pytest
from autoprune_plugins.samplers import register_samplers
from toy_evaluators import FormulaEvaluator

from autoprune.policy import Action, Layer, Policy, Site
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.ends import Ends
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Objective, best, front
from autoprune.searching.problem import Problem
from autoprune.searching.space import SearchSpace
from autoprune.searching.strategies import Brief
from autoprune.searching.study import run_study

FACTORIES = {factory.name: factory for factory in register_samplers()}
LEVELS = 6


def make_problem(sites):
    layers = [Layer(f"l{i}", (8, 8), "float32", i, "q", None) for i in range(sites)]
    places = tuple(Site(f"blocks.{i}.q", (layer,)) for i, layer in enumerate(layers))
    actions = tuple(Action.parse(f"rtn(bits={bits})") for bits in range(2, 2 + LEVELS))
    space = SearchSpace(places, {site.name: actions for site in places})
    sizes = {site.name: np.arange(2.0, 2 + LEVELS) for site in places}
    budget = Budget("size_bytes", 4.0 * sites)
    return Problem(space, (Prices("size_bytes", sizes),), (budget,))


@pytest.fixture
def problem():
    """Twenty sites of very different sensitivity; four bits each on average."""
    return make_problem(20)


def kl_of(problem, policy):
    sensitivity = 4.0 ** np.linspace(0, 4, len(problem.space.sites))
    return float(sensitivity @ 0.25 ** problem.space.index(policy))


def search(run_dir, problem, name, goals, trials):
    def evaluate(policy):
        size = problem.price("size_bytes", policy)
        return {"kl": kl_of(problem, policy), "size_bytes": size}

    rival = Policy.uniform(problem.space.sites, Action.parse("rtn(bits=4)"))
    with Ledger.open(run_dir, {}) as ledger:
        run_study(
            problem,
            FormulaEvaluator(evaluate),
            ledger=ledger,
            sampler=FACTORIES[name],
            objective=Objective(goals),
            seed=0,
            ends=Ends(trials),
            proposals=[("uniform rtn(bits=4)", rival)],
        )
        return ledger.trials()


def test_names_are_those_of_the_manual():
    assert list(FACTORIES) == ["random", "nsga2", "tpe"]
    assert all(factory.help for factory in FACTORIES.values())


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("objectives", [1, 2])
def test_makes_a_fresh_sampler_of_a_seed_without_a_warning(name, objectives, problem):
    brief = Brief(seed=7, objectives=objectives, problem=problem)
    one, other = (FACTORIES[name].make(brief) for _ in range(2))
    assert isinstance(one, optuna.samplers.BaseSampler)
    assert one is not other


@pytest.mark.parametrize(("name", "factor"), [("nsga2", 0.8), ("tpe", 0.8)])
def test_beats_the_uniform_rival_of_equal_size(tmp_path, problem, name, factor):
    goals = (("kl", "minimize"),)
    trials = search(tmp_path, problem, name, goals, 150)
    winner = best(trials, Objective(goals))
    assert winner is not None
    assert winner.metrics["kl"] < factor * trials[0].metrics["kl"]
    assert winner.metrics["size_bytes"] <= 80


def test_front_has_more_individuals_than_a_search_for_one(problem):
    sizes = [
        FACTORIES["nsga2"].make(Brief(0, objectives, problem)).population_size
        for objectives in (1, 2)
    ]
    assert sizes == [12, 32]


@pytest.mark.parametrize("name", FACTORIES)
def test_finds_a_front(tmp_path, problem, name):
    free = Problem(problem.space, problem.prices)
    goals = (("kl", "minimize"), ("size_bytes", "minimize"))
    trials = search(tmp_path, free, name, goals, 60)
    found = front(trials, Objective(goals))
    assert len(found) >= 4
    sizes = [trial.metrics["size_bytes"] for trial in found]
    assert sizes == sorted(sizes, reverse=True)
