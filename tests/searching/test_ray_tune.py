"""The search through Ray Tune: real trials of it, and the ledger as the truth."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml
from tiny_runs import config_of, space_of, write_text

from autoprune.errors import PluginError, RunError
from autoprune.hookspecs import hookimpl
from autoprune.policy import Action, Policy
from autoprune.run import search
from autoprune.searching.ledger import Ledger
from autoprune.searching.ray_cluster import Cluster
from autoprune.searching.ray_local import remove_cluster
from autoprune.searching.ray_searcher import halving
from autoprune.searching.ray_trials import TIME, VALUE, pack, unpack
from autoprune.searching.rows import Trial

pytestmark = pytest.mark.slow

TROUBLE = "TROUBLE_FILE"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of this process, which runs use and leave as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TROUBLE, str(tmp_path_factory.mktemp("trouble") / "kind"))
        patch.setenv("TROUBLE_SPARES", str(os.getpid()))
        opened = Cluster.open(None, cpus=2)
        yield Cluster(opened.name, ExitStack())
        opened.close()


@pytest.fixture
def trouble(cluster):
    path = os.environ[TROUBLE]

    def make(kind):
        with open(path, "w") as file:
            file.write(kind)

    yield make
    if os.path.exists(path):
        os.remove(path)


@pytest.fixture
def config(tiny_checkpoint, text):
    def make(*, trials=8, plugins=(), engine="ray-tune", count=1, search=(), **workers):
        return config_of(
            tiny_checkpoint,
            text,
            search={
                "trials": trials,
                "finalists": 1,
                "sampler": "random",
                "refine": "none",
                **dict(search),
            },
            workers={"threads": 1, "engine": engine, "count": count, **workers},
            plugins=list(plugins),
        )

    return make


def trials_of(folder):
    with Ledger.read(folder) as ledger:
        assert ledger.running() == []
        return ledger.trials()


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


def meets_trouble(trial):
    return "bits=3" in str(trial.policy["blocks.0.qkv"])


def test_tune_measures_what_one_process_does(tmp_path, config, cluster, capfd):
    search(config(engine="process", count=None), tmp_path / "alone")
    capfd.readouterr()
    tuned = search(config(), tmp_path / "tuned")
    assert capfd.readouterr().out == ""  # Tune is told to be quiet
    rows, others = trials_of(tmp_path / "alone"), trials_of(tmp_path / "tuned")
    assert tuned.ended == "trials"
    assert [row.number for row in others] == list(range(8))
    assert [row.policy for row in others] == [row.policy for row in rows]
    assert [row.windows for row in others] == [row.windows for row in rows]
    assert [row.constraints for row in others] == [row.constraints for row in rows]
    (experiment,) = (tmp_path / "tuned/tune").iterdir()
    assert len([path for path in experiment.iterdir() if path.is_dir()]) == 8
    # A resumed search is a new experiment, and has only the rest measured.
    search(config(trials=10), tmp_path / "tuned")
    more = trials_of(tmp_path / "tuned")
    assert [row.finished for row in more[:8]] == [row.finished for row in others]
    assert [row.number for row in more] == list(range(10))
    counts = sorted(
        len([path for path in one.iterdir() if path.is_dir()])
        for one in (tmp_path / "tuned/tune").iterdir()
    )
    assert counts == [2, 8]


def test_strategy_that_needs_slopes_has_them_taken_beside(tmp_path, config, cluster):
    asked = {"sampler": "gradient"}
    search(config(engine="process", count=None, search=asked), tmp_path / "alone")
    search(config(search=asked), tmp_path / "tuned")
    rows, others = trials_of(tmp_path / "alone"), trials_of(tmp_path / "tuned")
    assert [row.policy for row in others] == [row.policy for row in rows]
    with Ledger.read(tmp_path / "tuned") as ledger:
        assert ledger.slopes()


def test_cluster_without_room_for_slopes_is_refused(tmp_path, config, cluster):
    with pytest.raises(
        RunError, match=r"no room for an evaluator and one more that takes slopes: .*"
    ):
        search(config(cpus=2, search={"sampler": "gradient"}), tmp_path / "run")


@pytest.mark.parametrize("pruner", ["race", "halving"])
def test_trials_end_at_rungs(tmp_path, config, cluster, pruner):
    asked = {"rungs": [64], "pruner": pruner}
    data = config(trials=16, count=2, search=asked)
    data = data.model_copy(update={"text": data.text.model_copy(update={"fitness": 4})})
    search(data, tmp_path / "run")
    rows = trials_of(tmp_path / "run")
    pruned = [row for row in rows if row.state == "pruned"]
    whole = [row for row in rows if row.state == "complete"]
    assert len(pruned) + len(whole) == 16
    assert pruned and {len(row.windows) for row in pruned} == {2}
    assert {len(row.windows) for row in whole} == {4}
    first = [np.mean([row.windows[:2] for row in some]) for some in (whole, pruned)]
    assert first[0] < first[1]


def test_policy_that_kills_two_actors_is_not_tried_again(tmp_path, config, trouble):
    trouble("kill")
    search(config(plugins=["toy_trouble"]), tmp_path / "run")
    rows = trials_of(tmp_path / "run")
    troubled = [row for row in rows if meets_trouble(row)]
    assert troubled and len(rows) == 8 > len(troubled)
    assert {(row.state, row.attempts) for row in troubled} == {("failed", 2)}
    assert "it cost 2 workers; the last: died without a word" in troubled[0].error
    assert {row.state for row in rows if not meets_trouble(row)} == {"complete"}


def test_trial_that_hangs_is_ended(tmp_path, config, trouble):
    trouble("hang")
    search(config(trials=4, plugins=["toy_trouble"], time_limit="6s"), tmp_path / "run")
    troubled = [row for row in trials_of(tmp_path / "run") if meets_trouble(row)]
    assert troubled
    assert all("no answer in 6 s; stopped" in row.error for row in troubled)


def test_error_of_a_trial_is_its_row(tmp_path, config, trouble):
    trouble("memory")
    search(config(trials=4, plugins=["toy_trouble"]), tmp_path / "run")
    troubled = [row for row in trials_of(tmp_path / "run") if meets_trouble(row)]
    assert troubled
    assert all(row.error == "MemoryError: cannot allocate 1 TB" for row in troubled)
    assert {row.attempts for row in troubled} == {1}


def test_plugin_that_a_trial_lacks_ends_the_run_by_name(
    tmp_path, config, cluster, monkeypatch
):
    ghost = ModuleType("ghost")
    ghost.trial_finished = hookimpl(lambda trial, run_dir: None, specname=None)
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    with pytest.raises(PluginError, match="cannot load plugin 'ghost'"):
        search(config(plugins=["ghost"]), tmp_path / "run")


@pytest.mark.ci
def test_halving_begins_with_what_the_ledger_knows():
    policy = Policy({"blocks.0.up": Action.parse("rtn(bits=4)")})
    rows = [
        Trial(number, "complete", "x", policy, {}, 0, "", "", windows=(kl, kl, kl))
        for number, kl in enumerate([1.0, 2.0, 3.0, 4.0])
    ]
    asha = halving((1, 3), rows)
    for value, decision in ((3.9, "STOP"), (0.5, "CONTINUE")):
        trial = SimpleNamespace(trial_id=f"new {value}")
        asha.on_trial_add(None, trial)
        assert asha.on_trial_result(None, trial, {TIME: 1, VALUE: value}) == decision


@pytest.mark.ci
def test_policies_are_packed_without_loss():
    actions = [Action.parse(f"gptq(bits={bits}, group=128)") for bits in (2, 3, 4)]
    policy = Policy({f"blocks.{n}.up": actions[n % 3] for n in range(300)})
    assert unpack(pack(policy)) == policy
    assert len(pack(policy)) < 4000


@pytest.fixture
def short_tmpdir(monkeypatch):
    """A folder for the files of a cluster whose driver is killed."""
    folder = Path(f"/tmp/t{os.getpid()}")
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    remove_cluster(folder)


def test_killed_driver_loses_and_doubles_nothing(
    tmp_path, tiny_checkpoint, text, monkeypatch, short_tmpdir
):
    monkeypatch.setenv("TROUBLE", "nap")
    monkeypatch.setenv("WITNESS", str(tmp_path / "witness"))
    space, run = tmp_path / "tiny.yaml", tmp_path / "run"
    data = space_of(tiny_checkpoint, text, plugins=["toy_trouble", "toy_witness"])
    data["search"] = {"trials": 10, "finalists": 1, "sampler": "random"}
    data["workers"] = {"threads": 1, "count": 2, "engine": "ray-tune"}
    space.write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "autoprune", "search", str(space), "--no-export"]
    command += ["--run", str(run)]

    def finished():
        with Ledger.read(run) as ledger:
            return ledger.trials()

    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
        while len(lines_of(tmp_path / "witness")) < 4 and driver.poll() is None:
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
        kept = {row.number: row.finished for row in finished()}
        done = subprocess.run(command, stdout=log, stderr=log)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    rows = trials_of(run)
    assert [row.number for row in rows] == list(range(10))
    assert len(kept) >= 4
    assert kept.items() <= {row.number: row.finished for row in rows}.items()
    heard = lines_of(tmp_path / "witness")
    assert sorted(heard) == sorted(f"run {number}" for number in range(10))
    assert max(row.attempts for row in rows) == 2  # those that it died in
    assert not re.search(r"Traceback", (tmp_path / "log").read_text())
