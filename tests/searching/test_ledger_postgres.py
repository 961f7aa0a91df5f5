"""The ledger in a real PostgreSQL, which is killed, filled and made to refuse."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution

from autoprune.errors import RunError
from autoprune.policy import Policy
from autoprune.searching import mirror as mirrors
from autoprune.searching.ledger import Ledger
from autoprune.searching.mirror import Mirror
from autoprune.searching.mirrored import NUMBER, let_go, storage_of
from autoprune.searching.objective import Objective
from autoprune.searching.rows import Trial
from autoprune.searching.slopes import SiteSlopes

psycopg = pytest.importorskip("psycopg")
from postgres_server import UNPRIVILEGED, PostgresServer, binaries  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.ci]

MADE = {"space": "ab12"}
NAMES = count()


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    programs = binaries()
    if programs is None:
        pytest.skip("no initdb and postgres on this machine")
    made = PostgresServer(programs)
    yield made
    made.remove()


@pytest.fixture
def database(server: PostgresServer) -> str:
    """The name of a database of the test's own."""
    name = f"team{next(NAMES)}"
    server.sql(f"CREATE DATABASE {name}")
    return name


@pytest.fixture
def url(server: PostgresServer, database: str) -> str:
    return server.url(database)


def make_trial(number: int, **changes) -> Trial:
    text = "wanda(sparsity=0.5)"
    policy = Policy.from_dict({"actions": {"blocks.0.up": text, "head": "dense"}})
    made = Trial(
        number=number,
        state="complete",
        origin="random",
        policy=policy,
        params={"blocks.0.up": text, "head": "dense"},
        seed=2**32 - 1,
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:01+00:00",
        values=(0.5, 2.0),
        metrics={"kl": 0.5, "size_bytes": float("inf")},
        constraints={"latency_ms": -0.1},
        timings={"evaluate_s": 1.0},
        system_attrs={"generation": 2},
        windows=(0.25, 0.75),
    )
    return replace(made, **changes)


def begun(number: int, **changes) -> Trial:
    return make_trial(number, state="running", finished="", metrics={}, **changes)


def numbers_in(run_dir: Path) -> list[int]:
    with Ledger.read(run_dir) as ledger:
        return [trial.number for trial in ledger.trials()]


def test_rows_come_back_as_they_were_written(url, tmp_path):
    slopes = SiteSlopes.from_bytes(an_slopes().to_bytes())
    failed = make_trial(1, state="failed", values=(), error="no\0 \ud800 ü")
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        ledger.begin(begun(0, attempts=1), {"parents": [7]})
        ledger.begin(begun(0, attempts=2))
        assert [trial.attempts for trial in ledger.running()] == [2]
        assert ledger.trials() == []
        ledger.add(make_trial(0, attempts=2))
        ledger.add(failed)
        ledger.begin(begun(2))
        ledger.amend(0, {"generation": 3}, {"parents": [0]})
        ledger.add_slopes(0, slopes)
        ledger.add_slopes(0, slopes)
    with Ledger.read(tmp_path) as ledger:
        changed = make_trial(0, attempts=2, system_attrs={"generation": 3})
        kept = replace(failed, error="no\\0 \\ud800 ü")
        assert [vars(row) for row in ledger.trials()] == [vars(changed), vars(kept)]
        assert [row.number for row in ledger.running()] == [2]
        assert ledger.numbers() == [0, 1]
        assert [row.number for row in ledger.trials([1, 2])] == [1]
        assert ledger.fingerprint == MADE
        assert ledger.study_attrs == {"parents": [0]}
        assert ledger.slopes()[0].to_bytes() == slopes.to_bytes()
        assert ledger.frame()["number"].tolist() == [0, 1]
        with pytest.raises(RunError, match="cannot write trial 3 .*readonly"):
            ledger.add(make_trial(3))
    assert not list(tmp_path.glob("*.sqlite"))


def an_slopes() -> SiteSlopes:
    from dataclasses import fields

    grid = np.arange(6, dtype=np.float32).reshape(2, 3)
    known = {"slope": grid, "error": grid / 9, "curvature": grid * 0}
    given = [known.get(f.name, grid) for f in fields(SiteSlopes)[:3]]
    return SiteSlopes(*given, (0,))


def test_finished_trial_is_not_written_over(url, tmp_path):
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        ledger.add(make_trial(0))
        for again in (make_trial(0), make_trial(0, metrics={"kl": 9.0})):
            with pytest.raises(RunError, match="trial 0 is finished already in .*team"):
                ledger.add(again, {"parents": [7]})
        with pytest.raises(RunError, match="trial 0 is finished already"):
            ledger.begin(begun(0))
        assert [vars(row) for row in ledger.trials()] == [vars(make_trial(0))]
        assert ledger.study_attrs == {}


def test_runs_and_parts_of_one_database_are_apart(url, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    with (
        Ledger.open(one, MADE, url=url) as first,
        Ledger.open(one, {"space": "round"}, url=url, part="round-2") as second,
        Ledger.open(other, {"space": "cd34"}, url=url) as third,
    ):
        for ledger, seed in ((first, 1), (second, 2), (third, 3)):
            ledger.add(make_trial(0, seed=seed), {"of": seed})
            ledger.begin(begun(seed))
        assert second.identity == f"{first.identity}/round-2"
        assert third.identity != first.identity
        assert second.run_dir == one / "round-2"
    for folder, part, seed in ((one, "", 1), (one, "round-2", 2), (other, "", 3)):
        with Ledger.read(folder, part) as ledger:
            assert [row.seed for row in ledger.trials()] == [seed]
            assert [row.number for row in ledger.running()] == [seed]
            assert ledger.study_attrs == {"of": seed}
    with Ledger.read(one / "round-2") as ledger:
        assert ledger.fingerprint == {"space": "round"}


def test_folder_keeps_the_database_and_no_password(server, database, tmp_path, caplog):
    server.sql("DROP ROLE IF EXISTS guarded")
    server.sql("CREATE ROLE guarded LOGIN SUPERUSER PASSWORD 's3cret'")
    url = server.url(database, "guarded", "s3cret")
    with caplog.at_level(logging.WARNING):
        with Ledger.open(tmp_path, MADE, url=url) as ledger:
            ledger.add(make_trial(0))
            run = ledger.identity
        with Ledger.open(tmp_path, MADE, url=url, part="round-2"):
            pass
    assert caplog.text.count("Set PGPASSWORD or write it to ~/.pgpass") == 1
    kept = json.loads((tmp_path / "ledger.json").read_text())
    assert kept == {"url": server.url(database, "guarded"), "run": run, "part": ""}
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any("s3cret" in text for text in (*written, caplog.text))
    with pytest.raises(RunError, match="no password supplied.*Set PGPASSWORD") as told:
        Ledger.read(tmp_path)
    assert "s3cret" not in str(told.value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSWORD", "s3cret")
        assert numbers_in(tmp_path) == [0]
        with Ledger.open(tmp_path, MADE) as ledger:  # the folder knows the database
            ledger.add(make_trial(1))
    with pytest.raises(RunError, match="password authentication failed") as told:
        Ledger.open(tmp_path, MADE, url=url.replace("s3cret", "wr0ng"))
    assert "wr0ng" not in str(told.value)


def test_second_writer_is_refused_and_told_who_is_first(url, tmp_path):
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        me = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(RunError, match=f"another run goes on in .*: {me}, since"):
            Ledger.open(tmp_path, MADE)
        ledger.add(make_trial(0))
    Ledger.open(tmp_path, MADE).close()


def test_folder_made_with_something_else_is_refused(url, tmp_path):
    Ledger.open(tmp_path, MADE, url=url).close()
    with pytest.raises(RunError, match="space: 'ab12' then, 'cd34' now"):
        Ledger.open(tmp_path, {"space": "cd34"})
    Ledger.open(tmp_path, MADE).close()  # the refusal holds no lock


def test_killed_driver_loses_no_row_and_frees_the_run(url, tmp_path):
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[3])\n"
        "from test_ledger_postgres import Ledger, MADE, begun, make_trial\n"
        "run_dir, url = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "with Ledger.open(run_dir, MADE, url=url) as ledger:\n"
        "    for number in range(10_000):\n"
        "        ledger.begin(begun(number)); ledger.add(make_trial(number))\n"
        "        print(number, flush=True)\n"
    )
    command = [sys.executable, "-c", program, tmp_path, url, Path(__file__).parent]
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    ) as child:
        for line in child.stdout:
            if int(line) == 20:
                child.send_signal(signal.SIGKILL)
                break
        told = [20, *map(int, child.stdout)]
    kept = numbers_in(tmp_path)
    assert kept[: told[-1] + 1] == list(range(told[-1] + 1))
    assert len(kept) in (told[-1] + 1, told[-1] + 2)
    with Ledger.open(tmp_path, MADE) as ledger:
        assert {row.number for row in ledger.running()} <= {len(kept)}


@contextmanager
def started_later(server: PostgresServer, seconds: float) -> Iterator[None]:
    later = threading.Timer(seconds, server.start)
    server.kill()
    later.start()
    yield
    later.join()


def test_server_that_is_killed_and_comes_back_loses_nothing(
    server, url, tmp_path, caplog
):
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        for number in range(3):
            ledger.begin(begun(number))
            with started_later(server, 0.3), caplog.at_level(logging.WARNING):
                ledger.add(make_trial(number), {"after": number})
        with started_later(server, 0.3):
            assert [row.number for row in ledger.trials()] == [0, 1, 2]
        with pytest.raises(RunError, match="another run goes on"):
            Ledger.open(tmp_path, MADE)  # the lock was taken anew
        assert ledger.study_attrs == {"after": 2}
        assert ledger.running() == []
    assert caplog.text.count("is away") == caplog.text.count("is back after") == 4


def test_reader_outlives_the_server_too(server, url, tmp_path):
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        ledger.add(make_trial(0))
    with Ledger.read(tmp_path) as reader, started_later(server, 0.3):
        assert [row.number for row in reader.trials()] == [0]


def test_server_that_stays_away_ends_the_run_and_keeps_its_rows(server, url, tmp_path):
    with Ledger.open(tmp_path, MADE, url=url, patience=0.5) as ledger:
        ledger.add(make_trial(0))
        server.kill()
        begin = time.monotonic()
        message = "cannot write trial 1 to the ledger .* away for 0.5 s .*start the"
        with pytest.raises(RunError, match=message):
            ledger.add(make_trial(1))
        assert time.monotonic() - begin < 5
    with pytest.raises(RunError, match="cannot read the ledger .*server is up"):
        Ledger.read(tmp_path)
    server.start()
    with Ledger.open(tmp_path, MADE) as ledger:
        assert [row.number for row in ledger.trials()] == [0]
        ledger.add(make_trial(1))


def test_server_that_does_not_answer_is_not_waited_for_without_end(
    server, url, tmp_path
):
    url += "?connect_timeout=2"
    with Ledger.open(tmp_path, MADE, url=url, patience=1) as ledger:
        ledger.add(make_trial(0))
        with server.paused():
            with pytest.raises(RunError, match="away for 1 s .*kept"):
                ledger.add(make_trial(1))
    with Ledger.open(tmp_path, MADE, url=server_url(url)) as ledger:
        assert ledger.numbers() in ([0], [0, 1])  # what is in doubt is whole or absent


def server_url(url: str) -> str:
    return url.partition("?")[0]


@pytest.mark.parametrize("seconds", [0.5, 6.0], ids=["short", "cut off"])
def test_server_that_pauses_is_waited_for(server, url, tmp_path, seconds):
    with Ledger.open(tmp_path, MADE, url=url, patience=5) as ledger:
        with ExitStack() as standing, ThreadPoolExecutor() as pool:
            standing.enter_context(server.paused())
            added = pool.submit(ledger.add, make_trial(0))
            time.sleep(seconds)
            standing.close()
            added.result()
        assert ledger.numbers() == [0]


class Wire:
    """Passes on to a server, and cuts the line right after it has passed a word."""

    def __init__(self, port: int) -> None:
        self.cut_after: bytes | None = None
        self.keep_session = False
        self.cuts = 0
        self._port = port
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            pair = (client, server)
            for work in (self._up, self._down):
                self._threads.append(threading.Thread(target=work, args=pair))
                self._threads[-1].start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with client:
            while data := _received(client):
                if self.cut_after is not None and self.cut_after in data:
                    self.cut_after = None
                    self.cuts += 1
                    client.shutdown(socket.SHUT_WR)  # no answer comes back
                    server.sendall(data)
                    time.sleep(0.2)
                    break
                server.sendall(data)
        if not self.keep_session:
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with server:  # open until the server ends the session
            while data := _received(server):
                with suppress(OSError):
                    client.sendall(data)

    def close(self) -> None:
        self._listening.close()
        for thread in self._threads:
            thread.join()


def _received(line: socket.socket) -> bytes:
    try:
        return line.recv(65536)
    except OSError:
        return b""


@pytest.fixture
def wire(server) -> Iterator[Wire]:
    made = Wire(server.port)
    yield made
    made.close()


@pytest.mark.parametrize("keep_session", [False, True], ids=["ended", "lingers"])
@pytest.mark.parametrize("word", [b"COMMIT", b"INSERT INTO autoprune_trials"])
def test_commit_of_unknown_outcome_is_neither_lost_nor_doubled(
    server, database, wire, tmp_path, word, keep_session
):
    """The line breaks after the word went out; whether it was done is not known."""
    url = server.url(database).replace(str(server.port), str(wire.port))
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        ledger.begin(begun(0))
        wire.cut_after, wire.keep_session = word, keep_session
        ledger.add(make_trial(0), {"parents": [7]})
        assert wire.cuts == 1
        ledger.add(make_trial(1))
        assert [vars(row) for row in ledger.trials()] == [
            vars(make_trial(0)),
            vars(make_trial(1)),
        ]
        assert ledger.study_attrs == {"parents": [7]}
        with pytest.raises(RunError, match="trial 0 is finished already"):
            ledger.add(make_trial(0))
    rows = server.sql("SELECT count(*) FROM autoprune_trials", database)
    assert rows == [(2,)]


def end_sessions(server: PostgresServer, database: str) -> None:
    """End the sessions of a database, as an administrator does."""
    server.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE datname = '{database}'"
    )


def test_ended_session_is_opened_again(server, database, url, tmp_path):
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        end_sessions(server, database)
        ledger.add(make_trial(0))
        assert ledger.numbers() == [0]


@pytest.mark.parametrize("goes_on", [True, False])
def test_run_that_lost_its_lock_to_another_ends(
    server, database, url, tmp_path, goes_on
):
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        ledger.add(make_trial(0))
        end_sessions(server, database)
        other = Ledger.open(tmp_path, MADE)
        other.add(make_trial(1, seed=5))
        if not goes_on:
            other.close()
        message = "another run goes on" if goes_on else "another run began to write"
        with pytest.raises(RunError, match=message):
            ledger.add(make_trial(1, seed=6))
        other.close()
    with Ledger.read(tmp_path) as ledger:
        assert [row.seed for row in ledger.trials()][1:] == [5]


def test_tables_are_made_once_by_many(url, tmp_path):
    failed = []

    def work(number: int) -> None:
        try:
            with Ledger.open(tmp_path / str(number), MADE, url=url) as ledger:
                ledger.add(make_trial(number))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [numbers_in(tmp_path / str(n)) for n in range(4)] == [[0], [1], [2], [3]]


def answering(text: bytes) -> tuple[socket.socket, int]:
    """Serve something on a port that is no PostgreSQL."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        try:
            while True:
                client, _ = listening.accept()
                client.recv(100)
                client.sendall(text)
                client.close()
        except OSError:
            return

    threading.Thread(target=serve, daemon=True).start()
    return listening, listening.getsockname()[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("/team", "/nothing"), r"database \"nothing\d+\" does not exist.*createdb"),
        (("postgres@", "nobody@"), r"role \"nobody\" does not exist.*createuser"),
        (("127.0.0.1", "no.such.host.invalid"), "cannot open .*See that the server is"),
        (("postgresql:", "mysql:"), "not in 'mysql'. Give postgresql://USER@HOST"),
        (("postgresql:", "sqlite:"), "not in 'sqlite'"),
        (("postgresql://", ""), "URL cannot be read; it has the form postgresql://"),
    ],
)
def test_database_that_cannot_be_is_refused(url, tmp_path, change, message):
    with pytest.raises(RunError, match=message):
        Ledger.open(tmp_path, MADE, url=url.replace(*change))
    assert not list(tmp_path.iterdir())  # another URL can be given


def test_port_without_a_server_is_refused_at_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"postgresql://127.0.0.1:{free.getsockname()[1]}/team"
        begin = time.monotonic()
        with pytest.raises(RunError, match="refused.*See that the server is up"):
            Ledger.open(tmp_path, MADE, url=url)
        assert time.monotonic() - begin < 5


def test_what_is_no_postgresql_is_refused(tmp_path):
    listening, port = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(RunError, match="may be no PostgreSQL"):
        Ledger.open(tmp_path, MADE, url=f"postgresql://127.0.0.1:{port}/team")
    listening.close()


def test_missing_driver_is_named(url, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        RunError, match=r"needs the driver psycopg.*autoprune\[postgres"
    ):
        Ledger.open(tmp_path, MADE, url=url)


def test_user_who_may_not_make_tables_is_told_the_rights(server, database, tmp_path):
    server.sql("DROP ROLE IF EXISTS guest")
    server.sql("CREATE ROLE guest LOGIN")
    url = server.url(database, "guest")
    with pytest.raises(RunError, match="permission denied.*GRANT CREATE, USAGE ON SCH"):
        Ledger.open(tmp_path, MADE, url=url)
    assert not list(tmp_path.iterdir())
    Ledger.open(tmp_path / "own", MADE, url=server.url(database)).close()
    for right in ("SELECT, INSERT, UPDATE ON ALL TABLES", "USAGE ON"):
        server.sql(
            f"GRANT {right} {'IN' if 'ALL' in right else ''} SCHEMA public TO guest",
            database,
        )
    with Ledger.open(tmp_path / "guest", MADE, url=url) as ledger:
        ledger.add(make_trial(0))


def test_database_that_turns_read_only_keeps_what_it_has(
    server, database, url, tmp_path
):
    """As when a primary becomes a standby."""
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        ledger.add(make_trial(0))
        server.sql(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
        end_sessions(server, database)
        with pytest.raises(
            RunError, match="read-only transaction.*takes no writes now"
        ):
            ledger.add(make_trial(1))
        assert ledger.numbers() == [0]
    with pytest.raises(RunError, match="cannot open .*takes no writes now"):
        Ledger.open(tmp_path, MADE)
    server.sql(f"ALTER DATABASE {database} RESET default_transaction_read_only")
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.add(make_trial(1))


@pytest.fixture
def own_server(server: PostgresServer) -> Iterator[PostgresServer]:
    """A server of the test's own, whose end is nobody else's."""
    programs = binaries()
    assert programs is not None
    made = PostgresServer(programs)
    yield made
    made.remove()


@pytest.fixture
def small_disk(own_server) -> Iterator[Path]:
    """A disk of 12 MB that the server can write to."""
    disk = own_server.folder / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk])
    if made.returncode:
        pytest.skip("a disk of a given size can be mounted by root only")
    os.chmod(disk, 0o777)
    yield disk
    own_server.kill()
    subprocess.run(["umount", disk], check=True)


def test_full_disk_of_the_server_is_told_and_loses_nothing(
    own_server, small_disk, tmp_path
):
    place = small_disk / "space"
    place.mkdir()
    os.chmod(place, 0o777)
    if os.getuid() == 0:
        shutil.chown(place, UNPRIVILEGED)
        os.chmod(place, 0o700)
    own_server.sql(f"CREATE TABLESPACE tiny LOCATION '{place}'")
    own_server.sql("CREATE DATABASE tiny TABLESPACE tiny")
    noise = np.random.default_rng(0)
    with Ledger.open(tmp_path, MADE, url=own_server.url("tiny")) as ledger:
        # The server has three ways to say it; what it says for us is the same.
        full = r"could not .* Its disk is full\. .*free the disk of"
        with pytest.raises(RunError, match=full):
            for number in range(200):
                text = noise.bytes(100_000).hex()  # that PostgreSQL cannot make shorter
                ledger.add(make_trial(number, error=text))
        written = ledger.numbers()
        assert 0 < len(written) == number
    with Ledger.open(tmp_path, MADE) as ledger:
        assert ledger.numbers() == written
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
        ledger.add(make_trial(number))
        assert ledger.numbers() == [*written, number]
    own_server.sql("DROP DATABASE tiny")
    own_server.sql("DROP TABLESPACE tiny")


def test_mirror_outlives_the_server(server, url, tmp_path, monkeypatch, caplog):
    """Ledger and mirror in one database; their tables are not in each other's way."""
    monkeypatch.setattr(mirrors, "FIRST_PAUSE_S", 0.1)
    space = {
        site: CategoricalDistribution(["wanda(sparsity=0.5)", "dense"])
        for site in make_trial(0).params
    }
    objective = Objective((("kl", "minimize"), ("size_bytes", "minimize")))
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        ledger.add(make_trial(0))
        mirror = Mirror(
            url, "run", objective=objective, distributions=space, folder=tmp_path
        ).start()
        for number in range(1, 4):
            with started_later(server, 0.3):
                mirror.update()
                ledger.add(make_trial(number))
        mirror.update()
        mirror.close()
    storage = storage_of(url)()
    study = optuna.load_study(study_name="run", storage=storage)
    assert [t.user_attrs[NUMBER] for t in study.get_trials()] == [0, 1, 2, 3]
    let_go(storage)


def test_run_in_a_file_does_not_move_to_a_database(url, tmp_path):
    with Ledger.open(tmp_path, MADE) as ledger:
        ledger.add(make_trial(0))
    with pytest.raises(
        RunError, match=r"are in its ledger\.sqlite, not in .*without a"
    ):
        Ledger.open(tmp_path, MADE, url=url)
    assert numbers_in(tmp_path) == [0]


def test_database_may_move_but_not_without_the_run(server, database, url, tmp_path):
    with Ledger.open(tmp_path, MADE, url=url) as ledger:
        ledger.add(make_trial(0))
        run = ledger.identity
    empty, moved = f"{database}empty", f"{database}moved"
    server.sql(f"CREATE DATABASE {empty}")
    with pytest.raises(RunError, match=f"{empty} has no run {run}. Give the URL of"):
        Ledger.open(tmp_path, MADE, url=server.url(empty))
    assert server.sql("SELECT to_regclass('autoprune_trials')", empty) == [(None,)]
    server.sql(f"CREATE DATABASE {moved} TEMPLATE {database}")
    with Ledger.open(tmp_path, MADE, url=server.url(moved)) as ledger:
        ledger.add(make_trial(1))
    assert numbers_in(tmp_path) == [0, 1]
    assert json.loads((tmp_path / "ledger.json").read_text())["url"].endswith(moved)


def test_run_that_is_gone_from_its_database_is_told(server, database, url, tmp_path):
    Ledger.open(tmp_path, MADE, url=url).close()
    for table in ("meta", "trials", "slopes"):
        server.sql(f"DELETE FROM autoprune_{table}", database)
    for attempt in (lambda: Ledger.open(tmp_path, MADE), lambda: Ledger.read(tmp_path)):
        with pytest.raises(RunError, match="has no run"):
            attempt()


def test_tables_of_a_newer_autoprune_are_refused(server, database, url, tmp_path):
    Ledger.open(tmp_path, MADE, url=url).close()
    server.sql("UPDATE autoprune_format SET version = 9", database)
    for attempt in (lambda: Ledger.open(tmp_path, MADE), lambda: Ledger.read(tmp_path)):
        with pytest.raises(RunError, match="have format 9, this AutoPrune reads 3"):
            attempt()


@pytest.mark.parametrize("text", ["", "[1]", '{"url": "x"}', '{"place": "x"}'])
def test_broken_address_is_told(tmp_path, text):
    (tmp_path / "ledger.json").write_text(text)
    for attempt in (lambda: Ledger.open(tmp_path, MADE), lambda: Ledger.read(tmp_path)):
        with pytest.raises(RunError, match=r"cannot read .*ledger\.json, which tells"):
            attempt()
