"""Compares what ``autoprune plan`` says with runs that were measured.

    python results/scale/plan_check.py [--measure quick | --measure 1b]

A run is measured in a fresh cache, on one thread, by its CPU time (the machine may be
busy), stage by stage: seconds, the most memory, and what it leaves on disk. The pass
over two blocks of the shape of Llama-3.2-1B is ``results/memory``'s. Measurements
are files in ``measured/``, kept until they are deleted; ``plan_check.json`` has what
was predicted, what was measured, and the ratio of the two.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
MEASURED = HERE / "measured"
sys.path[:0] = [str(ROOT / "results" / "memory")]

TRIALS, PERIOD_S = 24, 0.01
"""Of the run that is measured; and between two looks at its memory."""

BLOCKS, TOKENS = 2, 8 * 128
"""Of the pass that is measured."""

STAGES: dict[str, str | tuple[str, ...]] = {
    "load": "loading",
    "statistics + variants": "making variants",
    "export check": "exporting the smallest",
    "dense model": "measuring the dense",
    "sensitivities": "measuring sensitivities",
    "trials": "searching",
    "finals": ("choosing", "solving", "measuring on the report"),
    "export": "exporting trial",
}
"""Phases of a plan, by how the stages of a run begin that they are."""


def cpu_seconds() -> float:
    """Give the CPU time of this process and of those that it has waited for."""
    spent = os.times()
    return sum((spent.user, spent.system, spent.children_user, spent.children_system))


def measure_run(space: str, scratch: Path) -> dict[str, Any]:
    """Search, export and verify in a fresh cache; tell what each stage took."""
    import torch
    from peak import status

    from autoprune import run
    from autoprune.reporting.observer import Observer
    from autoprune.searching.clock import TIMINGS, Clock

    torch.set_num_threads(1)

    class CpuClock(Clock):
        def now(self) -> float:
            return cpu_seconds()

    class Stages(Observer):
        def __init__(self) -> None:
            self.stages: list[dict[str, Any]] = []
            self._ended = threading.Event()
            threading.Thread(target=self._watch, daemon=True).start()

        def stage(self, name: str) -> None:
            self.close()
            now = status()
            entry = {"stage": name, "cpu_s": -cpu_seconds(), "anon_bytes": 0}
            self.stages.append({**entry, "at_start_bytes": now["RssAnon"]})
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {name}\n")

        def close(self) -> None:
            if self.stages and self.stages[-1]["cpu_s"] < 0:
                self.stages[-1]["cpu_s"] += cpu_seconds()
                sys.stderr.write(f"  {self.stages[-1]}\n")

        def _watch(self) -> None:
            while not self._ended.wait(PERIOD_S):
                if self.stages:
                    last = self.stages[-1]
                    last["anon_bytes"] = max(last["anon_bytes"], status()["RssAnon"])

    before = status()
    observer = Stages()
    folder = scratch / "run"
    result = run.search(
        space,
        folder,
        observer=observer,
        export=True,
        clock=CpuClock(),
        search__trials=TRIALS,
    )
    observer.close()
    cache = scratch / "cache"
    (report,) = result.exports
    trials = result.trials
    return {
        "space": space,
        "trials": len(trials),
        "stages": observer.stages,
        "timings": json.loads((folder / TIMINGS).read_text()),
        "evaluate_s": trials["time.evaluate_s"].tolist(),
        "before_bytes": before["RssAnon"],
        "disk_bytes": {
            name: sum(f.stat().st_size for f in (cache / name).rglob("*.safetensors"))
            for name in ("variants", "teachers")
        },
        "export_bytes": report.size_bytes,
        "policy": result.policy.to_dict() if result.policy else None,
    }


def run_alone(space: str) -> dict[str, Any]:
    """Measure a run in a process and a cache of its own."""
    from autoprune.models.checkpoints import cache_dir

    with tempfile.TemporaryDirectory(prefix="plan-check-") as name:
        scratch = Path(name)
        for kept in ("converted", "hashes"):  # the demo is converted once, ever
            if (cache_dir() / kept).is_dir():
                shutil.copytree(cache_dir() / kept, scratch / "cache" / kept)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        env = {
            **os.environ,
            **dict.fromkeys(names, "1"),
            "AUTOPRUNE_CACHE": str(scratch / "cache"),
        }
        command = [sys.executable, __file__, "--inside", space, "--scratch", name]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def pass_alone() -> dict[str, Any]:
    """Measure a pass over two blocks of 1B, as ``results/memory`` does."""
    import torch
    from transformers import LlamaForCausalLM

    from autoprune.models.outline import outline

    torch.manual_seed(0)
    config: Any = outline("1B").config
    config.num_hidden_layers = BLOCKS
    with tempfile.TemporaryDirectory(prefix="plan-check-") as name:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(name)
        del model
        script = str(ROOT / "results" / "memory" / "pass_memory.py")
        command = [sys.executable, script, name, "--propagate"]
        few = {"MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1"}
        env = os.environ | few
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return {"width": 2048, "depth": BLOCKS, "levels": 1, **found}


def compare() -> dict[str, Any]:
    """Hold what is foreseen against what was measured."""
    found: dict[str, Any] = {"memory_of_passes": list(_passes())}
    for path in sorted(MEASURED.glob("*.json")):
        measured = json.loads(path.read_text())
        if "stages" in measured:
            found[path.stem] = _run(measured)
    return found


def _row(what: str, foreseen: float, measured: float) -> dict[str, Any]:
    """Set two figures beside each other."""
    ratio = round(foreseen / measured, 3) if measured else None
    return {"what": what, "foreseen": foreseen, "measured": measured, "ratio": ratio}


def _run(measured: dict[str, Any]) -> dict[str, Any]:
    """Compare a whole run: seconds by phase, memory, bytes on the disk."""
    from autoprune.config import RunConfig
    from autoprune.planning.disk import file_bytes
    from autoprune.planning.foresee import foresee
    from autoprune.planning.outlined import Outlined
    from autoprune.plugins import load_plugins
    from autoprune.policy import Policy
    from autoprune.run import find_space

    trials = {"search__trials": measured["trials"]}
    config = RunConfig.from_yaml(find_space(measured["space"]), **trials)
    told, plugins = foresee(config, "cpu"), load_plugins()
    phases = {phase.name: phase.span.middle for phase in told.phases}
    spent = {name: 0.0 for name in STAGES}
    for stage in measured["stages"]:
        text = stage["stage"]
        name = next(name for name, begin in STAGES.items() if text.startswith(begin))
        spent[name] += stage["cpu_s"]
    rows = [
        _row(name, sum(phases[part] for part in name.split(" + ")), seconds)
        for name, seconds in spent.items()
    ]
    rows.append(_row("in all", told.busy.middle, sum(spent.values())))
    peak = max(stage["anon_bytes"] for stage in measured["stages"])
    bench = Outlined.of(config, plugins).bench
    policy = Policy.from_dict(measured["policy"])
    storages = bench.storages(policy)
    export = bench.exporter.size_bytes(storages, bench.untouched)
    sizes = measured["disk_bytes"]
    solved = sum(stage["stage"].startswith("solving") for stage in measured["stages"])
    anew = sum(
        file_bytes(layer, action, storages[layer], None)
        for layer, action in bench.per_layer(policy).items()
        if bench.actions.needs(action)
    )
    kept = dict(told.disk) | {"variants": told.disk["variants"] + solved * anew}
    return {
        "cpu_s": rows,
        "memory": [_row("driver, of its own", told.driver.own, peak)],
        "disk": [
            *(_row(name, kept[name], size) for name, size in sizes.items()),
            _row("export", export, measured["export_bytes"]),
        ],
        "basis": told.basis,
        "date": measured["date"],
    }


def _passes() -> Iterator[dict[str, Any]]:
    """Compare the passes over blocks of random models that were measured."""
    from transformers import LlamaConfig

    from autoprune.config import RunConfig
    from autoprune.planning.memory import pass_bytes
    from autoprune.planning.outlined import Outlined
    from autoprune.planning.rates import find_rates
    from autoprune.planning.work import Work
    from autoprune.plugins import load_plugins

    cells = sorted((ROOT / "results" / "memory" / "cells").glob("*.json"))
    own = [path for path in (MEASURED / "1b.json",) if path.exists()]
    for path in [*cells, *own]:
        cell = json.loads(path.read_text())
        width, levels = cell["width"], cell.get("levels", 1)
        inner = 8192 if path in own else width * 11 // 4
        shape = {"num_attention_heads": width // 64, "num_key_value_heads": 4}
        if path in own:
            shape["num_key_value_heads"] = 8
        with tempfile.TemporaryDirectory() as folder:
            LlamaConfig(
                vocab_size=256,
                hidden_size=width,
                intermediate_size=inner,
                num_hidden_layers=cell["depth"],
                dtype="bfloat16",
                **shape,
            ).save_pretrained(folder)
            actions = [f"sparsegpt(sparsity=0.{50 + at})" for at in range(levels)]
            config = RunConfig.from_dict(
                {
                    "model": folder,
                    "space": [{"sites": "blocks.*", "actions": actions}],
                    "search": {"trials": 1},
                }
            )
            work = Work(Outlined.of(config, load_plugins()), find_rates("cpu"))
            told = pass_bytes(work, levels, tokens=TOKENS)
        yield _row(path.stem, told, cell["peak_anon_bytes"])


def main() -> None:
    """Measure, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", metavar="WHAT", help="a space, or 1b")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        sys.stdout.write(json.dumps(measure_run(arguments.inside, arguments.scratch)))
        return
    if wanted := arguments.measure:
        MEASURED.mkdir(exist_ok=True)
        found = pass_alone() if wanted == "1b" else run_alone(wanted)
        found |= {"date": time.strftime("%Y-%m-%d")}
        path = MEASURED / f"{wanted}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        return
    text = json.dumps(compare(), indent=1)
    (HERE / "plan_check.json").write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
