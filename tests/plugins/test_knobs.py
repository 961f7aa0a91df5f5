import json

import numpy as np
import optuna
import pytest
from autoprune_plugins.knobs import register_samplers
from optuna.trial import TrialState

from autoprune.errors import ConfigError
from autoprune.policy import DENSE, Action, Layer, Site
from autoprune.searching.allocation import allocate
from autoprune.searching.budget import Budget, Prices
from autoprune.searching.knobs import bend, knobs_of
from autoprune.searching.problem import Problem
from autoprune.searching.rows import Trial
from autoprune.searching.space import SearchSpace
from autoprune.searching.strategies import Brief, notes_of

FACTORIES = {factory.name: factory for factory in register_samplers()}
ACTIONS = (
    *Action.parse_all("sparsegpt(sparsity=[0.5, 0.7])"),
    *Action.parse_all("gptq(bits=[3, 4], group=64)"),
    DENSE,
)
BYTES = np.array([60.0, 40.0, 22.0, 29.0, 100.0])
KL = np.array([1.0, 4.0, 2.5, 0.7, 0.0])
ROLES = ("q_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def quiet():
    """Optuna tells of every study, as the run has forbidden it."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def space_of(blocks, roles=ROLES, actions=ACTIONS):
    sites = tuple(
        Site(f"blocks.{b}.{r}", (Layer(f"{b}.{r}", (8, 8), "float32", b, r, None),))
        for b in range(blocks)
        for r in roles
    )
    return SearchSpace(sites, {site.name: actions for site in sites})


def problem_of(blocks=8, *, share=0.5):
    space = space_of(blocks)
    sizes = {s.name: BYTES * (1 + i % 3) for i, s in enumerate(space.sites)}
    whole = sum(size[-1] for size in sizes.values())
    budget = Budget("size_bytes", share * whole)
    return Problem(space, (Prices("size_bytes", sizes),), (budget,))


def sensitivities_of(problem):
    rng = np.random.default_rng(3)
    return KL * rng.lognormal(0, 0.7, (len(problem.space.sites), 1))


def truth_of(problem, costs):
    """The true costs: sensitivities times what knobs unknown to the search say."""
    knobs = knobs_of(problem.space)
    rng = np.random.default_rng(3)
    return bend(costs, knobs, {name: rng.uniform(-1, 1) for name in knobs})


def row_of(problem, number, origin, indices, *, value, notes=(), state="complete"):
    policy = problem.space.at(indices)
    attrs = {f"note:{name}": note for name, note in dict(notes).items()}
    return Trial(
        number=number,
        state=state,
        origin=origin,
        policy=policy,
        params=problem.space.params(policy),
        seed=number,
        started="",
        finished="",
        values=() if value is None else (value,),
        system_attrs=json.loads(json.dumps(attrs)),
    )


def sampler_of(problem, name, history, seed=None):
    seed = 1000 + len(history) if seed is None else seed
    costs = sensitivities_of(problem)
    return FACTORIES[name].make(
        Brief(seed, 1, problem, history=history, sensitivities=costs)
    )


def search(problem, name, trials, history=()):
    """Propose and measure on; the costs are additive and known."""
    truth = truth_of(problem, sensitivities_of(problem))
    sites = np.arange(len(problem.space.sites))
    rows = list(history)
    while len(rows) < trials:
        indices, notes = sampler_of(problem, name, rows).propose()
        value = float(truth[sites, indices].sum())
        rows.append(row_of(problem, len(rows), name, indices, value=value, notes=notes))
    return rows


def told(sampler):
    """What stands in the outer study, in its order."""
    trials = sampler._rebuild().trials
    return [(t.state, t.value, t.params) for t in trials]


def test_three_strategies_need_sensitivities_and_serve_one_goal():
    assert list(FACTORIES) == ["knobs", "cmaes", "gp"]
    for factory in FACTORIES.values():
        assert factory.needs == {"sensitivities"}
        assert not factory.several
        assert factory.help


def test_says_what_is_lacking():
    problem = problem_of()
    with pytest.raises(ConfigError, match="'gp' .* found no sensitivities"):
        FACTORIES["gp"].make(Brief(0, 1, problem))
    free = Problem(problem.space, problem.prices)
    costs = sensitivities_of(problem)
    with pytest.raises(ConfigError, match="'knobs' .* found no budget"):
        FACTORIES["knobs"].make(Brief(0, 1, free, sensitivities=costs))


@pytest.mark.parametrize("name", FACTORIES)
def test_first_proposal_is_the_plain_allocation(name):
    problem = problem_of()
    indices, notes = sampler_of(problem, name, []).propose()
    assert set(notes["knobs"].values()) == {0.0}
    plain = allocate(problem, sensitivities_of(problem))
    assert indices.tolist() == plain.tolist()


# The optimum is 0.79 of the plain allocation; a Gaussian process takes its time.
@pytest.mark.parametrize(("name", "trials"), [("knobs", 40), ("cmaes", 40), ("gp", 16)])
def test_finds_better_than_the_plain_allocation(name, trials):
    problem = problem_of()
    rows = search(problem, name, trials)
    values = [row.values[0] for row in rows]
    assert min(values) < 0.86 * values[0]
    assert all(problem.within(row.policy) for row in rows)
    fullest = max(problem.price("size_bytes", row.policy) for row in rows)
    assert fullest > 0.998 * problem.budgets[0].limit


@pytest.mark.parametrize("name", FACTORIES)
def test_a_proposal_depends_on_its_brief_alone(name):
    problem = problem_of()
    count = 11 if name == "gp" else 20
    rows = search(problem, name, count)
    again = search(problem, name, count, history=rows[: count - 2])
    assert [row.params for row in again] == [row.params for row in rows]
    assert [row.system_attrs for row in again] == [row.system_attrs for row in rows]
    other, _ = sampler_of(problem, name, rows, seed=7).propose()
    same, _ = sampler_of(problem, name, rows, seed=7).propose()
    assert other.tolist() == same.tolist()


def test_cma_es_goes_on_where_an_uninterrupted_optuna_study_would():
    problem = problem_of()
    rows = search(problem, "cmaes", 30)
    noted = [notes_of(row)["generation"] for row in rows]
    assert noted[0] is None
    assert sorted(noted[1:]) == noted[1:]
    assert noted[-1] >= 2
    assert not any("optimizer" in json.dumps(dict(r.system_attrs)) for r in rows)
    # One study kept for the whole search, pickles and all, has the same optimizer.
    rebuilt = sampler_of(problem, "cmaes", rows)._rebuild()
    kept = optuna.create_study(sampler=optuna.samplers.CmaEsSampler(seed=0))
    for past in rebuilt.trials:
        kept.enqueue_trial(past.params)
        trial = kept.ask(past.distributions)
        frozen = kept.trials[trial.number]
        joint = kept.sampler.infer_relative_search_space(kept, frozen)
        kept.sampler.sample_relative(kept, frozen, joint)
        kept.tell(trial, past.value)
    one, other = (s.sampler._restore_optimizer(s.trials) for s in (rebuilt, kept))
    assert one.generation == other.generation
    assert one.mean.tolist() == other.mean.tolist()
    assert one._sigma == other._sigma
    assert one._C.tolist() == other._C.tolist()


def test_a_rival_is_no_outer_trial_but_a_measured_allocation_is():
    problem = problem_of()
    plain, notes = sampler_of(problem, "knobs", []).propose()
    # The notes of the proposal whose place a rival took stand in the rival's row.
    rival = row_of(problem, 0, "allocation", plain, value=3.0, notes=notes)
    indices, notes = sampler_of(problem, "knobs", [rival]).propose()
    assert indices.tolist() != plain.tolist()
    zeros = dict.fromkeys(knobs_of(problem.space), 0.0)
    assert notes["repeats"][0] == {"knobs": zeros, "generation": None, "row": 0}
    own = row_of(problem, 1, "knobs", indices, value=2.0, notes=notes)
    trials = told(sampler_of(problem, "knobs", [rival, own]))
    assert trials[0] == (TrialState.COMPLETE, 3.0, zeros)
    assert trials[-1] == (TrialState.COMPLETE, 2.0, notes["knobs"])


def test_failed_and_diverged_trials_teach_what_they_can():
    problem = problem_of()
    rows = search(problem, "knobs", 4)
    plain = problem.space.index(rows[0].policy)
    for state, value in (("failed", None), ("diverged", 1e6), ("pruned", 0.5)):
        notes = notes_of(rows[1]) | {"repeats": []}
        row = row_of(
            problem, len(rows), "knobs", plain, value=value, notes=notes, state=state
        )
        rows.append(row)
    worst = max(row.values[0] for row in rows[:4])
    states, values, _ = zip(*told(sampler_of(problem, "knobs", rows)), strict=True)
    assert states[-3:] == (TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE)
    assert values[-3:] == (None, worst, 0.5)


def test_many_roles_and_families_have_at_most_twenty_knobs():
    roles = [f"part_{i}" for i in range(12)]
    texts = [
        f"{method}(damping=0.{d}, group={g}, sparsity=0.5)"
        for method in ("wanda", "gptq", "rtn", "magnitude")
        for d in (1, 2, 3)
        for g in (32, 64)
    ]
    actions = tuple(Action.parse(text) for text in texts)
    knobs = knobs_of(space_of(30, roles, actions))
    kinds = [name.split()[0] for name in knobs]
    assert kinds == ["role"] * 8 + ["depth"] * 5 + ["action"] * 6
    named = list(knobs)[13:17]
    assert named == [f"action {m}" for m in ("gptq", "magnitude", "rtn", "wanda")]


def test_what_all_choices_share_has_no_knob():
    actions = (*Action.parse_all("gptq(bits=[3, 4], group=64)"), DENSE)
    assert knobs_of(space_of(1, ["q_proj"], actions)) == {}
    assert list(knobs_of(space_of(2, ["q_proj"], actions))) == ["depth 0", "depth 1"]


def test_depth_is_linear_between_its_knots():
    space = space_of(9, ["q_proj"])
    knobs = knobs_of(space)
    depth = np.array([acts[:, 0] for name, acts in knobs.items() if "depth" in name])
    assert depth.sum(axis=0).tolist() == [1.0] * 9
    assert depth[:, 0].tolist() == [1, 0, 0, 0, 0]
    assert depth[:, 3].tolist() == [0, 0.5, 0.5, 0, 0]


def test_knobs_bend_what_they_act_on():
    space = space_of(1)
    knobs = knobs_of(space)
    costs = np.tile(KL, (3, 1))
    values = {"role up_proj": np.log(2.0), "action gptq": np.log(3.0)}
    bent = bend(costs, knobs, values)
    assert np.allclose(bent[0], KL * [1, 1, 3, 3, 1])
    assert np.allclose(bent[1], KL * [2, 2, 6, 6, 2])


@pytest.mark.parametrize("name", FACTORIES)
def test_a_space_without_knobs_has_its_allocation(name):
    actions = (*Action.parse_all("gptq(bits=[3, 4])"), DENSE)
    space = space_of(1, ["q_proj"], actions)
    sizes = {site.name: np.array([3.0, 4.0, 16.0]) for site in space.sites}
    problem = Problem(space, (Prices("size_bytes", sizes),), (Budget("size_bytes", 5),))
    costs = np.array([[2.0, 1.0, 0.0]])
    rows = []
    for number in range(3):
        brief = Brief(number, 1, problem, history=rows, sensitivities=costs)
        indices, notes = FACTORIES[name].make(brief).propose()
        assert indices.tolist() == [1]
        rows.append(row_of(problem, number, name, indices, value=1.0, notes=notes))
