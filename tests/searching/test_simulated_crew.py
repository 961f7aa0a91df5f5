"""Simulated workers: what they take on a virtual clock, worked out by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest
from toy_evaluators import FormulaEvaluator, ShuffledCrew

from autoprune.plugins import load_plugins
from autoprune.searching.ends import Ends
from autoprune.searching.ledger import Ledger
from autoprune.searching.objective import Objective
from autoprune.searching.strategies import (
    ExhaustedError,
    PolicySampler,
    SamplerFactory,
)
from autoprune.searching.study import run_study

RESULTS = Path(__file__).parents[2] / "results" / "scale"


@pytest.fixture(scope="module")
def simulate():
    """The script, loaded as if it were run in its folder."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("simulate", RESULTS / "simulate.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(RESULTS))
    sys.modules["simulate"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        del sys.modules["simulate"]


@pytest.fixture
def equal_times(simulate, monkeypatch):
    times = simulate.Times([10.0], [20.0])
    monkeypatch.setattr(simulate.Times, "recorded", classmethod(lambda cls: times))


@pytest.mark.usefixtures("equal_times")
@pytest.mark.parametrize("workers", [1, 4])
def test_equal_jobs_go_in_step(simulate, workers):
    problem = simulate.make_problem(14)
    found = simulate.simulate(
        "random", workers, 24, lost=0.0, driver=0.0, problem=problem
    )
    assert found["virtual_s"] == pytest.approx(10 * 24 / workers)
    assert found["busy"] == pytest.approx(1.0)
    assert found["driver_busy"] == 0.0
    assert found["ideal_per_hour"] == 360 * workers
    assert found["states"] == {"complete": 24} and found["losses"] == 0
    # All end at once and are told one by one: 0, 1, 2 and 3 came between.
    assert found["between_mean"] == pytest.approx((workers - 1) / 2)


@pytest.mark.usefixtures("equal_times")
def test_slopes_are_shared_and_count(simulate):
    problem = simulate.make_problem(14)
    one = simulate.simulate("gradient", 1, 6, lost=0.0, driver=0.0, problem=problem)
    # Every trial but the given first one follows slopes that were taken before it.
    assert one["virtual_s"] == pytest.approx(10 * 6 + 20 * 5)
    assert one["left_share"] == 0.0


@pytest.mark.usefixtures("equal_times")
def test_lost_workers_are_replaced(simulate):
    problem = simulate.make_problem(14)
    found = simulate.simulate("random", 3, 30, lost=0.3, driver=0.0, problem=problem)
    assert found["losses"] > 3
    assert sum(found["states"].values()) == 30
    assert found["virtual_s"] > 10 * 30 / 3
    assert found["busy"] < 1


def test_a_clock_goes_on_by_what_the_driver_takes(simulate):
    still, real = simulate.VirtualClock(0.0), simulate.VirtualClock(1.0)
    total = sum(number * number for number in range(100_000))
    assert total and still.now() == 0.0 and real.now() > 0.0
    still.reach(5.0)
    still.reach(3.0)
    assert still.now() == 5.0


def test_a_strategy_without_ideas_is_asked_once_an_event(tmp_path, problem_of):
    """Not once for every idle worker: at 512 of them that takes longer than trials."""
    asked = []

    class Few(PolicySampler):
        def propose(self):
            asked.append(len(self.brief.history))
            if len(asked) > 12:
                raise ExhaustedError("nothing comes to mind")
            return self.brief.rng().integers(8, size=len(self.space.sites)), {}

    problem = problem_of(24, 8)
    crew = ShuffledCrew(FormulaEvaluator(lambda policy: {"kl": 1.0}), 40)
    with Ledger.open(tmp_path, {}) as ledger:
        reason = run_study(
            problem,
            crew,
            ledger=ledger,
            sampler=SamplerFactory("few", Few),
            objective=Objective((("kl", "minimize"),)),
            seed=0,
            ends=Ends(100),
        )
        assert reason == "exhausted" and len(ledger.trials()) == 12
    assert len(asked) == 12 + 1 + 12  # each trial, then once in vain, then at each end


@pytest.mark.parametrize("seed", range(6))
def test_trials_that_are_begun_again_let_no_more_in(tmp_path, problem_of, seed):
    problem = problem_of(24, 8)
    formula = FormulaEvaluator(lambda policy: {"kl": 1.0})
    crew = ShuffledCrew(formula, 6, seed=seed, lost=0.3)
    with Ledger.open(tmp_path, {}) as ledger:
        run_study(
            problem,
            crew,
            ledger=ledger,
            sampler=load_plugins().objects["samplers"]["random"],
            objective=Objective((("kl", "minimize"),)),
            seed=0,
            ends=Ends(20),
        )
        assert len(ledger.trials()) == 20
