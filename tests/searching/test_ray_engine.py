"""Evaluators on Ray: real clusters, real nodes, killed for real."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType

import pytest
import ray
import yaml
from tiny_runs import config_of, space_of, write_text
from toy_jobs import Differing, Dying, Elsewhere, Light, Sharing, Stuck
from toy_orders import Job, no_recipe

from autoprune.config import RunConfig
from autoprune.errors import ConfigError, PluginError, RunError
from autoprune.hookspecs import hookimpl
from autoprune.models.checkpoints import cache_dir
from autoprune.plugins import load_plugins
from autoprune.run import search
from autoprune.searching import preparing, ray_cluster, ray_engine, ray_local
from autoprune.searching.ledger import Ledger
from autoprune.searching.plan import Plan
from autoprune.searching.preparing import make_together
from autoprune.searching.ray_causes import cause_of
from autoprune.searching.ray_cluster import Cluster
from autoprune.searching.ray_engine import RayCrew
from autoprune.searching.recipe import Recipe
from autoprune.searching.store_mark import StoreMark

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
        opened = Cluster.open(None, cpus=3)
        yield Cluster(opened.name, ExitStack())  # crews of tests do not close it
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
    def make(*, trials=8, plugins=(), **workers):
        return config_of(
            tiny_checkpoint,
            text,
            search={"trials": trials, "finalists": 2, "sampler": "random"},
            workers={"threads": 1, **workers},
            plugins=list(plugins),
        )

    return make


def trials_of(folder):
    with Ledger.read(folder) as ledger:
        assert ledger.running() == []
        return ledger.trials()


def meets_trouble(trial):
    return "bits=3" in str(trial.policy["blocks.0.qkv"])


def light(cluster, *, count=1, cpus=1, evaluator=Light, recipe=None, **settings):
    recipe = recipe or no_recipe()
    return RayCrew(
        recipe, cluster, count=count, cpus=cpus, evaluator=evaluator, **settings
    )


def until_idle(crew, count=1, seconds=120):
    ends = time.monotonic() + seconds
    while len(crew.idle()) < count:
        assert time.monotonic() < ends
        assert crew.wait(1.0) == []
    return crew.idle()


def outcome_of(crew, job):
    crew.submit(until_idle(crew)[0], job)
    while not (heard := crew.wait(1.0)):
        pass
    return heard[0]


@pytest.mark.ci
def test_actors_measure_what_one_process_does(tmp_path, config, cluster):
    alone = search(config(), tmp_path / "alone")
    together = search(config(engine="ray", count=2), tmp_path / "together")
    rows, others = trials_of(tmp_path / "alone"), trials_of(tmp_path / "together")
    assert [row.number for row in others] == list(range(8))
    assert [row.policy for row in others] == [row.policy for row in rows]
    assert [row.windows for row in others] == [row.windows for row in rows]
    assert together.policy == alone.policy
    assert list(cache_dir().glob("**/*.mark")) == []


def test_policy_that_kills_two_actors_is_not_tried_again(
    tmp_path, config, trouble, capfd
):
    trouble("kill")
    asked = config(engine="ray", count=2, plugins=["toy_trouble"])
    result = search(asked, tmp_path / "run")
    rows = trials_of(tmp_path / "run")
    troubled = [row for row in rows if meets_trouble(row)]
    assert troubled and len(rows) == 8 > len(troubled)
    assert {(row.state, row.attempts) for row in troubled} == {("failed", 2)}
    assert re.search(r"process \d+ on .*: died without a word", troubled[0].error)
    assert {row.state for row in rows if not meets_trouble(row)} == {"complete"}
    assert result.finals
    assert "Worker exit" not in capfd.readouterr().out  # Ray prints to it by itself


def test_plugin_that_an_actor_lacks_ends_the_run_by_name(
    tmp_path, config, cluster, monkeypatch
):
    ghost = ModuleType("ghost")
    ghost.trial_finished = hookimpl(lambda trial, run_dir: None, specname=None)
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    with pytest.raises(PluginError, match="cannot load plugin 'ghost'"):
        search(config(engine="ray", count=1, plugins=["ghost"]), tmp_path / "run")


def test_actor_that_differs_is_refused_with_the_difference(config, cluster):
    recipe = Recipe.of(Plan.make(config(), load_plugins()), 1)
    packages = {**recipe.fingerprint["packages"], "torch": "1.0"}
    other = {**recipe.fingerprint, "packages": packages}
    recipe = Recipe(recipe.config, recipe.incumbents, other, 1)
    with (
        RayCrew(recipe, cluster, count=1, cpus=1) as crew,
        pytest.raises(RunError, match=r"(?s)differs from the driver.*torch.*1\.0"),
    ):
        until_idle(crew)


def test_actor_that_does_not_see_the_store_is_refused(config, cluster):
    plan = Plan.make(config(), load_plugins())
    store = plan.bench.store.folder
    recipe = replace(Recipe.of(plan, 1), mark=StoreMark.make(store))
    why = (
        rf"the worker on .* does not see the run's store {store}, its own is "
        r".*/elsewhere/variants: .*Set AUTOPRUNE_CACHE to a folder that all nodes share"
    )
    try:
        with (
            RayCrew(recipe, cluster, count=1, cpus=1, evaluator=Elsewhere) as crew,
            pytest.raises(RunError, match=why),
        ):
            until_idle(crew)
    finally:
        recipe.mark.remove()


def test_share_is_cut_for_each_actor_with_a_place(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "GATHER_S", 2.0)
    recipe = no_recipe(path=str(tmp_path))
    asked = {"count": 3, "cpus": 1.5, "time_limit": 0.5}  # two fit
    with light(cluster, evaluator=Sharing, recipe=recipe, **asked) as crew:
        assert make_together(crew, lambda: None) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0 of 2", "1 of 2"]


def test_shares_are_cut_anew_where_nobody_takes_a_lost_ones_place(
    cluster, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(preparing, "STALL_S", 2.0)
    recipe = no_recipe(path=str(tmp_path), fatal=True)
    with light(cluster, count=2, evaluator=Sharing, recipe=recipe) as crew:

        def lose_a_node():
            crew._count = 1

        until_idle(crew, 2)
        assert make_together(crew, lose_a_node) == 1
    assert "making variants with fewer workers" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0 of 1", "0 of 2"]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("job", "why"),
    [
        (Job("kill"), "died without a word"),
        (Job("exit"), "ended with exit code 7"),
        (Job("sleep", 3600), "no answer in 2 s; stopped"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_actor_that_is_lost_is_told_of_and_replaced(cluster, job, why):
    with light(cluster, time_limit=2.0) as crew:
        lost = outcome_of(crew, job)
        assert why in lost.lost and lost.error is None
        assert outcome_of(crew, Job(gives=5)).result == 5


@pytest.mark.ci
def test_error_of_a_job_comes_back_with_where_it_was_raised(cluster):
    with light(cluster) as crew:
        found = outcome_of(crew, Job("raise", "a bad level"))
        assert repr(found.error) == "ValueError('a bad level')"
        assert re.search(r"raised in process \d+ on", found.error.__notes__[0])
        assert outcome_of(crew, Job(gives=1)).result == 1


def test_crew_without_a_count_fills_the_cluster(cluster):
    with light(cluster, count=None, cpus=1) as crew:
        assert len(until_idle(crew, 3)) == crew.size == 3
    with light(cluster, count=None, cpus=1.5) as crew:
        assert crew.size == 2


def test_crew_that_finds_no_place_says_what_there_is(cluster):
    with (
        light(cluster, gpus=1, patience=1.0) as crew,
        pytest.raises(RunError, match="no place .* 1 GPUs, and the nodes have 3 CPUs"),
    ):
        until_idle(crew)


def test_actors_that_die_before_they_are_ready_are_not_begun_for_ever(cluster):
    with (
        light(cluster, count=3, evaluator=Dying) as crew,
        pytest.raises(RunError, match="died 3 times before one was ready; the last"),
    ):
        until_idle(crew)


def test_actors_that_never_have_loaded_are_stopped(cluster, monkeypatch):
    monkeypatch.setattr(ray_engine, "LOAD_S", 1.0)
    with (
        light(cluster, count=3, evaluator=Stuck) as crew,
        pytest.raises(RunError, match="died 3 times before one .* no answer in 1 s"),
    ):
        until_idle(crew)


def test_late_actor_that_differs_is_left_out(cluster, tmp_path, caplog):
    recipe = no_recipe(path=str(tmp_path / "first"))
    with light(cluster, evaluator=Differing, recipe=recipe) as crew:
        until_idle(crew)
        crew._count = 2  # a node joins
        crew._looked = float("-inf")
        while "is not used: the worker differs" not in caplog.text:
            crew.wait(0.5)
        assert len(crew.idle()) == 1
        assert outcome_of(crew, Job(gives=2)).result == 2


def test_threads_are_those_of_the_recipe(cluster):
    with light(cluster) as crew:
        assert outcome_of(crew, Job("environment")).result["OMP_NUM_THREADS"] == "1"


@pytest.mark.ci
def test_causes_are_told_in_few_words():
    assert cause_of(RuntimeError("The actor died because its node has died.")) == (
        "its node is gone"
    )
    error = ray.exceptions.OutOfMemoryError("Task was killed due to low memory")
    assert cause_of(error).startswith("killed by Ray, as the memory")


@pytest.mark.ci
@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "nobody answers there .*refused.* ray start --head"),
        ("ray://127.0.0.1:1", "nobody answers there"),
        ("here", r"give auto, HOST:PORT or ray://HOST:PORT"),
    ],
)
def test_address_that_does_not_answer_is_refused_at_once(address, why):
    began = time.monotonic()
    with pytest.raises(RunError, match=rf"cluster at {address}: .*{why}"):
        ray_cluster._join(address, ExitStack())
    assert time.monotonic() - began < 5


@pytest.mark.ci
def test_address_of_something_else_is_refused_in_bounded_time(monkeypatch):
    monkeypatch.setattr(ray_cluster, "PROBE_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(RunError, match="did not let us in within 3 s"):
            ray_cluster._join(address, ExitStack())
        assert time.monotonic() - began < 30


@pytest.mark.ci
def test_other_version_of_ray_or_python_is_told():
    other = {"ray_version": "2.1.0", "python_version": "3.9.1"}
    with pytest.raises(RuntimeError) as raised:
        ray._private.utils.check_version_info(other, "this process")
    told = ray_cluster._reason(str(raised.value))
    assert "Ray: 2.1.0" in told and "Python: 3.9.1" in told
    assert told.endswith("Install one version of Ray and of Python everywhere")


@pytest.mark.ci
def test_files_of_a_cluster_lie_where_paths_are_short(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(ray_local.tempfile, "gettempdir", lambda: str(long))
    folder = ray_local.make_folder()
    try:
        assert len(str(folder)) <= ray_local.LONGEST
        assert list(long.iterdir()) == []
    finally:
        folder.rmdir()


@pytest.mark.ci
def test_files_of_a_killed_cluster_are_swept(tmp_path):
    for name, age in (("old", 1e6), ("new", 0)):
        session = tmp_path / f"autoprune-ray-{name}" / "session_latest"
        session.mkdir(parents=True)
        os.utime(session, (time.time() - age,) * 2)
    ray_local._sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["autoprune-ray-new"]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("workers", "why"),
    [
        ({"address": "auto"}, "address belongs to Ray; add engine: ray"),
        ({"gpus": 1}, "gpus belongs to Ray"),
        ({"engine": "ray", "gpus": 1.5}, "share of one GPU .* found gpus: 1.5; give"),
        ({"engine": "dask"}, "Input should be 'process', 'ray' or 'ray-tune'"),
        (
            {"engine": "ray-tune", "address": "ray://head:10001"},
            "ray-tune drives from this machine",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(workers, why):
    with pytest.raises(ConfigError, match=why):
        RunConfig.from_dict(space_of("demo", "builtin", workers=workers))


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.stdout + done.stderr


def test_without_ray_the_extra_is_named(tmp_path, tiny_checkpoint, text):
    space = tmp_path / "tiny.yaml"
    space.write_text(yaml.safe_dump(space_of(tiny_checkpoint, text)))
    code = (
        "import sys; sys.modules['ray'] = None; from autoprune.cli import main;"
        f"sys.argv[1:] = ['search', {str(space)!r}, '--engine', 'ray', '--run',"
        f" {str(tmp_path / 'run')!r}]; main()"
    )
    said = " ".join(run_python(code).split())
    assert "engine ray needs Ray" in said
    assert "pip install 'autoprune[ray]'" in said


CHANGES = """
import faulthandler, json, logging, os, resource, signal, sys
from pathlib import Path
import ray
from autoprune.searching.ray_cluster import Cluster

def state():
    log = logging.getLogger("ray")
    return [
        dict(os.environ), repr(sys.excepthook), repr(signal.getsignal(signal.SIGTERM)),
        repr(signal.getsignal(signal.SIGINT)), faulthandler.is_enabled(), log.level,
        len(log.handlers), log.propagate, resource.getrlimit(resource.RLIMIT_NOFILE),
        sorted(map(str, Path(os.environ["TMPDIR"]).iterdir())),
        sorted(map(str, Path.home().rglob("*"))),
    ]

before = state()
cluster = Cluster.open(None)
during = state()
cluster.close()
print(json.dumps([before, during, state()]))
"""


@pytest.mark.ci
def test_nothing_is_left_changed_and_no_file_behind(tmp_path_factory):
    with_short_path = os.path.join("/tmp", f"h{os.getpid()}")
    os.mkdir(with_short_path)
    home = tmp_path_factory.mktemp("home")
    try:
        said = run_python(CHANGES, TMPDIR=with_short_path, HOME=str(home))
    finally:
        os.rmdir(with_short_path)
    before, during, after = json.loads(said.splitlines()[-1])
    assert after == before != during
    assert during[0]["RAY_USAGE_STATS_ENABLED"] == "0"
    assert during[0]["RAY_AUTH_TOKEN"]  # of our own, and in no file
    assert during[-1] == []


HEADLESS = """
import os, time
from pathlib import Path
from toy_jobs import Light
from toy_orders import no_recipe
from autoprune.searching import ray_cluster, ray_watch
from autoprune.searching.ray_engine import RayCrew

ray_cluster.SILENT_S = 6.0
ray_watch.LOOK_S = 0.5
cluster = ray_cluster.Cluster.open(None)
crew = RayCrew(no_recipe(), cluster, count=1, cpus=1, evaluator=Light)
while not crew.idle():
    crew.wait(1.0)
for process in Path("/proc").glob("[0-9]*"):
    try:
        ours = (process / "stat").read_text().split()[3] == str(os.getpid())
        if ours and "gcs_server" in (process / "cmdline").read_text():
            os.kill(int(process.name), 9)
    except OSError:
        pass
began = time.monotonic()
try:
    while True:
        crew.wait(1.0)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
with ray_watch.watched(cluster):  # while Ray Tune drives
    time.sleep(2.0)
crew.close()
print(f"left after {time.monotonic() - began:.0f} s")
"""


def test_cluster_that_is_gone_is_told_before_ray_ends_the_process():
    said = run_python(HEADLESS, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    told = r"RunError: the local cluster is gone: its head at .* does not answer"
    assert re.search(told, said), said
    assert said.count("is gone: its head at") == 2  # also while Tune waits
    assert int(re.search(r"left after (\d+) s", said)[1]) < 60


class Node:
    """A node of a cluster, in a session of its own."""

    def __init__(self, folder, *arguments):
        with (folder / "nodes.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                    *("--disable-usage-stats", "--object-store-memory=80000000"),
                    *arguments,
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self):
        """Kill it and all that it started, as a power cut does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """Starts nodes of a cluster whose head has no room for evaluators."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    folder = f"/tmp/n{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [
        Node(
            tmp_path,
            *("--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={folder}"),
            "--include-dashboard=false",
        )
    ]

    def start():
        started.append(Node(tmp_path, f"--address=127.0.0.1:{port}", "--num-cpus=1"))
        return started[-1]

    wait_until(lambda: answers(port))
    yield f"127.0.0.1:{port}", start
    for node in started:
        if node.process.poll() is None:
            node.kill()
    ray_local.remove_cluster(type(tmp_path)(folder))


def answers(port):
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true, seconds=300):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_killed_driver_and_killed_nodes_lose_and_double_nothing(
    tmp_path, tiny_checkpoint, text, nodes, monkeypatch
):
    address, start_node = nodes
    monkeypatch.setenv("TROUBLE", "nap")
    monkeypatch.setenv("WITNESS", str(tmp_path / "witness"))
    first, second = start_node(), start_node()
    space, run = tmp_path / "tiny.yaml", tmp_path / "run"
    data = space_of(tiny_checkpoint, text, plugins=["toy_trouble", "toy_witness"])
    data["search"] = {"trials": 40, "finalists": 1, "sampler": "random"}
    data["workers"] = {"threads": 1}
    space.write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "autoprune", "search", str(space), "--no-export"]
    command += ["--run", str(run), "--engine", "ray", "--address", address]

    def start_driver():
        with (tmp_path / "driver.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    def heard():
        path = tmp_path / "witness"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(trials):
        wait_until(lambda: len(heard()) >= trials or driver.poll() is not None, 600)

    def finished():
        with Ledger.read(run) as ledger:
            return ledger.trials()

    driver = start_driver()
    wait_for(4)
    driver.kill()
    driver.wait()
    kept = {row.number: row.finished for row in finished()}
    assert len(kept) >= 4

    driver = start_driver()
    wait_for(12)
    first.kill()  # in the middle of a trial: they take all of its time
    third = start_node()
    wait_for(18)
    second.kill()
    assert driver.wait(timeout=600) == 0, (tmp_path / "driver.log").read_text()
    rows = trials_of(run)
    assert third.process.poll() is None
    assert [row.number for row in rows] == list(range(40))
    assert {row.state for row in rows} == {"complete"}
    assert kept.items() <= {row.number: row.finished for row in rows}.items()
    assert max(row.attempts for row in rows) == 2
    assert sorted(heard()) == sorted(f"run {number}" for number in range(40))
