"""The steps of ``run.sh`` that need more than the command line: see there."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from autoprune.latency import running
from autoprune.latency.accuracy import (
    Accuracy,
    accuracy_of,
    accuracy_of_models,
    accuracy_of_ratios,
    sign_accuracy,
)
from autoprune.latency.facts import device_facts, software_facts, state
from autoprune.latency.journal import Journal
from autoprune.latency.kernels import KERNELS
from autoprune.latency.plan import TOKENS, gemms
from autoprune.latency.profiles import HEADER, Point, Profile
from autoprune.latency.recording import Deadline, Recorder, about
from autoprune.latency.timing import CudaTimer

HERE = Path(__file__).parent
PROFILES = Path(os.environ.get("PROFILES", HERE / "profiles"))

DENSE = "torch.mm.bf16"
PAIRS = {
    "cslt.24.bf16": DENSE,
    "cslt.24.fp8": "torch.scaled_mm.tensor",
    "cslt.24.int8": "torch.int_mm",
    "torchao.24.fp8.row": "torch.scaled_mm.row",
}
"""Kernels of 2:4, each beside the dense one of its type."""

SITES = [(8192, 2048), (2048, 8192), (14336, 4096), (4096, 14336), (4096, 4096)]
"""Matrices of which 2:4 is looked at for every number of tokens."""


def smoke() -> int:
    """Try every kernel once: right result, captured or not, how many algorithms."""
    rows: list[dict[str, Any]] = [
        {"device": device_facts("cuda"), "software": software_facts()},
        {"state": state("cuda"), "cusparselt_capable": _has_search()},
    ]
    _tell(rows)
    timer, rng = CudaTimer(), running.generator_on("cuda")
    for kernel in (k for k in KERNELS.values() if k.device == "cuda"):
        row: dict[str, Any] = {"kernel": kernel.name}
        rows.append(row)
        try:
            weight = running.random_weight(kernel, 4096, 2048, rng)
            x = running.activations(kernel, 64, 2048, rng)
            with torch.inference_mode():
                made = [running.product(kernel, weight)]
                exact = x.float() @ weight.t()
                row["error"] = float((made[0](x) - exact).norm() / exact.norm())
                row["algorithms"] = len(running.algorithms_of(made, x))
                row |= asdict(timer.time(running.calls_of(made, x)))
        except Exception as error:  # every kernel is tried, whatever the others do
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        _tell(rows[-1:])
        (PROFILES.parent / "smoke.json").write_text(json.dumps(rows, indent=1) + "\n")
    good = sum("error" in row and row["error"] < 0.2 for row in rows)
    print(f"{good} kernels multiply rightly")
    return 0 if good else 1


def _has_search() -> bool:
    return hasattr(getattr(torch._C, "_cusparselt", None), "mm_search")


def _tell(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)


def sparse(minutes: float) -> int:
    """Time 2:4 beside dense for M = 1 to 8192 into the journal, and write the table."""
    journal = _journal()
    plan: list[Point] = []
    for two_four, dense in PAIRS.items():
        plan += gemms(dense, SITES, TOKENS["cuda"])
        plan += gemms(two_four, SITES, TOKENS["cuda"])
    recorder = Recorder("cuda", journal, timer=CudaTimer(), tell=print)
    complete = recorder.run(plan, Deadline.after(60 * minutes))
    write_sparse(journal.points.values())
    return 0 if complete else 3


def _journal() -> Journal:
    begun = sorted(PROFILES.glob("*.work"), key=lambda path: path.stat().st_mtime)
    if not begun:
        sys.exit("no recording was begun: run the step `record` first")
    return Journal(begun[-1], about("cuda"), resume=True)


def write_sparse(points: Iterable[Point]) -> None:
    """Write ``sparse.csv``: 2:4 over dense, shape by shape, for every M."""
    timed = {(p.kernel, p.n, p.k, p.m): p for p in points if p.ok and p.op == "gemm"}
    rows = []
    for (name, n, k, m), point in sorted(timed.items()):
        dense = timed.get((PAIRS.get(name, ""), n, k, m))
        plain = timed.get((DENSE, n, k, m))
        if dense is not None:
            over = plain.us / point.us if plain else ""
            rows.append(
                [name, n, k, m, point.us, point.algorithm, dense.kernel, dense.us]
                + [dense.us / point.us, over]
            )
    header = ["kernel", "n", "k", "m", "us", "algorithm", "dense", "dense_us"]
    _write_csv(
        PROFILES.parent / "sparse.csv", [*header, "speedup", "speedup_over_bf16"], rows
    )


def summary() -> int:
    """Write and print how good predictions are, and what 2:4 brings."""
    folders = sorted(PROFILES.glob(f"*/{HEADER}"), key=lambda p: p.stat().st_mtime)
    if not folders:
        sys.exit("no profile was written: run the step `finish` first")
    profile = Profile.read(folders[-1].parent)
    found = accuracy_of(profile) + accuracy_of_ratios(profile, DENSE)
    found += _of_models(profile)
    names = [one.name for one in fields(Accuracy)]
    rows = [[getattr(one, name) for name in names] for one in found]
    _write_csv(PROFILES.parent / "holdout.csv", names, rows)
    write_sparse(profile.points)
    print(f"{profile.name}: {len(profile.points)} points")
    print(json.dumps(profile.quality, indent=1))
    for one in found:
        print(
            f"{one.what}: {one.count} points, MAPE {one.mape:.1%}, median "
            f"{one.median:.1%}, p90 {one.p90:.1%}, bias {one.bias:+.1%}, Spearman "
            f"{one.spearman:.3f}, coverage {one.coverage:.0%}"
        )
    for name, dense in PAIRS.items():
        right, base = sign_accuracy(profile, name, dense)
        print(f"{name} faster than {dense}? foretold {right:.0%}, base rate {base:.0%}")
    return 0


def _of_models(profile: Profile) -> list[Accuracy]:
    """Judge whole models, if the dense one to fit was recorded."""
    return accuracy_of_models(profile) if profile.of("model_decode") else []


def _write_csv(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow([f"{x:.5g}" if isinstance(x, float) else x for x in row])
    print(f"wrote {path}")


def main() -> int:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("smoke", "sparse", "summary"))
    parser.add_argument("--minutes", type=float, default=3.0)
    given = parser.parse_args()
    if given.step == "smoke":
        return smoke()
    return sparse(given.minutes) if given.step == "sparse" else summary()


if __name__ == "__main__":
    sys.exit(main())
