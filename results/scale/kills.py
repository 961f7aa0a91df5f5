"""Kills real searches at random moments, and looks whether anything was lost.

    python results/scale/kills.py --kills 200 [--workers 2] [--seed 0]

A search of a tiny model, from an empty cache to the exported winner, is killed by
SIGKILL again and again, in every one of its stages, and given again with the same
command until it ends; then the next one begins. At the end of each:

- every trial that was told of stands in the ledger, and none was told of twice;
- the ledger, its copy, every variant, every file of the run and the export are whole;
- where one process evaluates, winner and figures are those of a search that nobody
  disturbed.

Searches are forked from a process that has imported everything already, so that kills
meet the search and not the imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import torch  # noqa: E402
from conftest import _tiny_model, _tiny_tokenizer  # noqa: E402
from tiny_runs import config_of, write_text  # noqa: E402

from autoprune import run  # noqa: E402
from autoprune.compression.files import TensorFiles  # noqa: E402
from autoprune.exporting.manifest import check_files, read_manifest  # noqa: E402
from autoprune.policy import Policy  # noqa: E402
from autoprune.reporting.observer import Observer  # noqa: E402
from autoprune.searching.ledger import Ledger  # noqa: E402

PATIENCE_S = 600


@dataclass
class Campaign:
    """One search, from its empty cache to its export, however often it is killed.

    Attributes:
        place: Its folder: cache, run folder and what was told of.
        config: What is searched.
    """

    place: Path
    config: Any

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.place / "run"

    def start(self) -> tuple[int, int]:
        """Fork the search; give its process, and where it tells its stages."""
        heard, told = os.pipe()
        pid = os.fork()
        if pid:
            os.close(told)
            return pid, heard
        try:
            os.close(heard)
            os.setsid()  # its workers and checks die with it
            os.environ["AUTOPRUNE_CACHE"] = str(self.place / "cache")
            os.environ["WITNESS"] = str(self.place / "witness")
            quiet = os.open(self.place / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            run.search(self.config, self.folder, observer=_Telling(told), export=True)
        except BaseException as error:
            os.write(told, f"failed: {type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)


class _Telling(Observer):
    """Writes the stages of a run to a pipe."""

    def __init__(self, told: int) -> None:
        self._told = told

    def stage(self, name: str) -> None:
        os.write(self._told, f"{kind_of(name)}\n".encode())


def kind_of(stage: str) -> str:
    """Name a stage without the numbers in it."""
    return " ".join(word for word in stage.split() if not any(map(str.isdigit, word)))


@dataclass
class Tally:
    """What was seen.

    Attributes:
        kills: By the stage that they met.
        searches: That have ended.
        trials: That were told of.
        faults: What was wrong: there must be none.
    """

    kills: Counter[str] = field(default_factory=Counter)
    searches: int = 0
    trials: int = 0
    faults: list[str] = field(default_factory=list)


def undisturbed(campaign: Campaign) -> dict[str, float]:
    """Run a search to its end; give the seconds of its stages."""
    pid, heard = campaign.start()
    seconds, last, since = {}, "", time.monotonic()
    with os.fdopen(heard) as lines:
        for line in lines:
            now = time.monotonic()
            seconds[last] = seconds.get(last, 0.0) + now - since
            last, since = line.strip(), now
    seconds[last] = time.monotonic() - since
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the undisturbed search failed: {last}"
    seconds.pop("")
    return seconds


def disturb(
    campaign: Campaign, seconds: dict[str, float], rng: random.Random, victim: str
) -> str | None:
    """Start a search and kill it in a stage that chance picks; tell which.

    Returns:
        The stage; None if the search ended before, as it should.

    Raises:
        RuntimeError: If the search failed.
    """
    stage = rng.choice(list(seconds))
    pid, heard = campaign.start()
    began, last = time.monotonic(), ""
    with os.fdopen(heard) as lines:
        for line in lines:
            last = line.strip()
            if last == stage:
                time.sleep(rng.uniform(0, seconds[stage]))
                if _kill(pid, victim, rng):
                    break
            if time.monotonic() - began > PATIENCE_S:
                os.killpg(pid, signal.SIGKILL)
                raise RuntimeError(f"a search hangs in {last!r}")
        _, status = os.waitpid(pid, 0)
        rest = lines.read()
    failed = [line for line in [last, *rest.splitlines()] if "failed: " in line]
    if failed:
        raise RuntimeError(failed[0])
    return stage if os.WIFSIGNALED(status) or victim == "worker" else None


def _kill(pid: int, victim: str, rng: random.Random) -> bool:
    """Kill a search or one of its workers; tell if the search is dead by it."""
    if victim == "worker":
        workers = [child for child in _children(pid) if "worker" in _command(child)]
        if workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(one) for one in listed.read_text().split()] if listed.exists() else []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def faults_of(campaign: Campaign) -> list[str]:
    """Look for what a search that has ended lost, doubled or broke."""
    found, folder = [], campaign.folder
    with Ledger.read(folder) as ledger:
        rows, running = ledger.trials(), ledger.running()
    numbers = [row.number for row in rows]
    if numbers != list(range(len(rows))) or running:
        found.append(f"rows {numbers}, running {[row.number for row in running]}")
    told = _told(campaign)
    if lost := set(told) - set(numbers):
        found.append(f"lost trials {sorted(lost)}")
    if twice := [number for number, count in Counter(told).items() if count > 1]:
        found.append(f"trials {twice} were finished twice")
    policies = [(row.policy.fingerprint, len(row.windows)) for row in rows]
    if len(set(policies)) < len(policies):
        found.append("a policy was measured twice")
    for name in ("ledger.sqlite", "ledger.backup.sqlite"):
        with closing(sqlite3.connect(folder / name)) as database:
            if (
                said := database.execute("PRAGMA integrity_check").fetchone()[0]
            ) != "ok":
                found.append(f"{name}: {said}")
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    check_files(folder / "export-packed", read_manifest(folder / "export-packed"))
    for folder in ("variants", "teachers"):
        files = TensorFiles(campaign.place / "cache" / folder, 1 << 40, what=folder)
        for path in files.folder.glob("*/*.safetensors"):
            if files.read(path.stem) is None:
                found.append(f"{folder}: {path.name} is damaged")
    return found


def _told(campaign: Campaign) -> list[int]:
    lines = (campaign.place / "witness").read_text().splitlines()
    return [int(line.split()[1]) for line in lines]


def result_of(campaign: Campaign) -> tuple[Any, Any]:
    """Give the winner and its figures."""
    finals = json.loads((campaign.folder / "finals.json").read_text())
    record = json.loads((campaign.folder / "policy.json").read_text())
    return Policy.from_dict(record).to_dict(), finals["winner"]["report"]


def main() -> None:
    """Kill as often as is asked for, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0, help="0: no processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", default=None)
    parser.add_argument("--json", type=Path, help="write the tally here")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rng, tally = random.Random(asked.seed), Tally()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        place = Path(folder)
        config = _config(place, asked)
        model = Campaign(place / "undisturbed", config)
        model.place.mkdir()
        seconds = undisturbed(model)
        expected = result_of(model)
        tally.faults += faults_of(model)
        while sum(tally.kills.values()) < asked.kills and not tally.faults:
            _kill_one(place, config, seconds, expected, rng, tally, asked)
    told = {
        "kills": dict(tally.kills),
        "searches": tally.searches,
        "trials": tally.trials,
        "faults": tally.faults,
        "workers": asked.workers,
        "sampler": asked.sampler or "gradient",
    }
    print(json.dumps(told, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(told, indent=1) + "\n")
    sys.exit(bool(tally.faults))


def _kill_one(
    place: Path,
    config: Any,
    seconds: dict[str, float],
    expected: tuple[Any, Any],
    rng: random.Random,
    tally: Tally,
    asked: argparse.Namespace,
) -> None:
    """Kill one search until it ends in spite of all, and look at it."""
    campaign = Campaign(place / f"search-{tally.searches}", config)
    campaign.place.mkdir()
    left = rng.randint(3, 9)  # then it is left alone, or the last stage never ends
    while left and sum(tally.kills.values()) < asked.kills:
        victim = rng.choice(["driver", "worker"]) if asked.workers else "driver"
        try:
            stage = disturb(campaign, seconds, rng, victim)
        except RuntimeError as error:
            tally.faults.append(f"search {tally.searches}: {error}")
            return
        if stage is None:
            break
        tally.kills[stage] += 1
        left -= 1
    undisturbed(campaign)
    tally.searches += 1
    tally.trials += len(_told(campaign))
    found = faults_of(campaign)
    if not asked.workers and result_of(campaign) != expected:
        found.append(f"another winner: {result_of(campaign)} for {expected}")
    tally.faults += [f"search {tally.searches - 1}: {fault}" for fault in found]
    if not found:
        shutil.rmtree(campaign.place)


def _config(place: Path, asked: argparse.Namespace) -> Any:
    checkpoint = place / "model"
    _tiny_model().save_pretrained(checkpoint)
    _tiny_tokenizer().save_pretrained(checkpoint)
    workers = {"count": asked.workers, "threads": 1} if asked.workers else {}
    search = {"trials": 14, "finalists": 2, "sampler": asked.sampler}
    return config_of(
        checkpoint,
        write_text(place),
        search=search,
        workers=workers,
        plugins=["toy_witness"],
    )


if __name__ == "__main__":
    main()
