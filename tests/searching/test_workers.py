"""Workers in processes of their own: real ones that die for real."""

import os
import sys
import time
from types import ModuleType

import pytest
from tiny_runs import config_of, write_text

from autoprune.errors import PluginError, RunError
from autoprune.hookspecs import hookimpl
from autoprune.plugins import load_plugins
from autoprune.run import search
from autoprune.searching.costings import Scores
from autoprune.searching.crew import Measure
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.recipe import Recipe
from autoprune.searching.workers import ProcessCrew, threads_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def config(tiny_checkpoint, text):
    def make(*, trials=10, plugins=(), sampler="random", **workers):
        return config_of(
            tiny_checkpoint,
            text,
            search={"trials": trials, "finalists": 2, "sampler": sampler},
            workers={"threads": 1, **workers},
            plugins=list(plugins),
        )

    return make


@pytest.fixture
def trouble(monkeypatch):
    def make(kind):
        monkeypatch.setenv("TROUBLE", kind)
        monkeypatch.setenv("TROUBLE_SPARES", str(os.getpid()))

    return make


def trials_of(folder):
    with Ledger.read(folder) as ledger:
        assert ledger.running() == []
        return ledger.trials()


def meets_trouble(trial):
    return "bits=3" in str(trial.policy["blocks.0.qkv"])


@pytest.mark.ci
def test_workers_measure_what_one_process_does(tmp_path, config):
    alone = search(config(), tmp_path / "alone")
    together = search(config(count=2), tmp_path / "together")
    rows, others = trials_of(tmp_path / "alone"), trials_of(tmp_path / "together")
    assert [row.number for row in others] == list(range(10))
    assert [row.policy for row in others] == [row.policy for row in rows]
    assert [row.windows for row in others] == [row.windows for row in rows]
    assert together.policy == alone.policy
    assert {path.name for path in (tmp_path / "together/workers").iterdir()} == {
        "0.log",
        "1.log",
    }


def test_workers_measure_sensitivities_as_one_process_does(
    tmp_path, config, monkeypatch
):
    rows = {}
    for count in (None, 2):
        asked = config(trials=4, count=count, sampler="allocation")
        folder = tmp_path / str(count)
        monkeypatch.setenv("AUTOPRUNE_CACHE", str(folder / "cache"))
        if count:  # in this process; those of the workers are their own
            monkeypatch.setattr(Scores, "run", None)
        search(asked, folder / "run")
        rows[count] = trials_of(folder / "run")
    assert rows[2][0].origin == rows[None][0].origin
    assert [row.policy for row in rows[2]] == [row.policy for row in rows[None]]


@pytest.mark.ci
def test_policy_that_kills_two_workers_is_not_tried_again(tmp_path, config, trouble):
    trouble("kill")
    result = search(config(count=2, plugins=["toy_trouble"]), tmp_path / "run")
    rows = trials_of(tmp_path / "run")
    assert len(rows) == 10
    troubled = [row for row in rows if meets_trouble(row)]
    assert troubled and len(troubled) < 10
    assert {row.state for row in troubled} == {"failed"}
    assert {row.attempts for row in troubled} == {2}
    assert "killed by SIGKILL" in troubled[0].error
    assert {row.state for row in rows if not meets_trouble(row)} == {"complete"}
    assert result.finals


def test_worker_that_hangs_is_stopped_and_replaced(tmp_path, config, trouble):
    trouble("hang")
    asked = config(count=1, time_limit="4s", trials=4, plugins=["toy_trouble"])
    search(asked, tmp_path / "run")
    troubled = [row for row in trials_of(tmp_path / "run") if meets_trouble(row)]
    assert troubled
    assert all("no answer in 4 s; stopped" in row.error for row in troubled)


@pytest.mark.parametrize(
    ("kind", "why"), [("exit", "exit code 7"), ("memory", "MemoryError: cannot")]
)
def test_how_a_trial_ended_is_recorded(tmp_path, config, trouble, kind, why):
    trouble(kind)
    search(config(count=1, trials=4, plugins=["toy_trouble"]), tmp_path / "run")
    troubled = [row for row in trials_of(tmp_path / "run") if meets_trouble(row)]
    assert troubled and all(why in row.error for row in troubled)


def test_plugin_that_a_worker_lacks_ends_the_run_by_name(tmp_path, config, monkeypatch):
    ghost = ModuleType("ghost")
    ghost.trial_finished = hookimpl(lambda trial, run_dir: None, specname=None)
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    with pytest.raises(PluginError, match="cannot load plugin 'ghost'"):
        search(config(count=1, plugins=["ghost"]), tmp_path / "run")


@pytest.fixture
def plan(config):
    return Plan.make(config(), load_plugins())


def test_worker_that_differs_is_refused_with_the_difference(tmp_path, plan):
    recipe = Recipe.of(plan, 1)
    packages = {**recipe.fingerprint["packages"], "torch": "1.0"}
    other = {**recipe.fingerprint, "packages": packages}
    recipe = Recipe(recipe.config, recipe.incumbents, other, 1)
    with (
        ProcessCrew(recipe, 1, tmp_path) as crew,
        pytest.raises(RunError, match=r"(?s)differs from the driver.*torch.*1\.0"),
    ):
        while not crew.idle():
            crew.wait(1.0)


def test_crew_that_is_closed_leaves_no_process(tmp_path, plan):
    crew = ProcessCrew(Recipe.of(plan, 1), 2, tmp_path)
    while len(crew.idle()) < 2:
        assert crew.wait(1.0) == []
    pids = [worker.process.pid for worker in crew._workers]
    policy = next(iter(plan.proposals))[1]
    crew.submit(0, Measure(policy))
    (outcome,) = crew.wait(60.0)
    assert outcome.worker == 0 and outcome.error is None
    expected = plan.evaluator().measure(policy)
    assert outcome.result.windows == expected.windows
    crew.submit(1, Measure(policy))
    crew.close()
    crew.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_worker_ends_when_its_driver_is_gone(tmp_path, plan):
    crew = ProcessCrew(Recipe.of(plan, 1), 1, tmp_path)
    while not crew.idle():
        crew.wait(1.0)
    process = crew._workers[0].process
    crew._workers[0].connection.close()  # as the kernel does for a killed driver
    assert process.wait(timeout=20) == 0
    crew.close()


def test_processors_are_shared_out():
    cores = len(os.sched_getaffinity(0))
    assert threads_for(1) == cores
    assert threads_for(cores) == 1
    assert threads_for(10 * cores) == 1


def test_first_worker_that_cannot_start_is_not_begun_for_ever(tmp_path, plan):
    recipe = Recipe.of(plan, 1)
    began = time.monotonic()
    crew = ProcessCrew(recipe, 1, tmp_path)
    with crew, pytest.raises(RunError, match="died 3 times before it was ready"):
        while time.monotonic() - began < 60:
            crew._workers[0].process.kill()
            crew.wait(1.0)
