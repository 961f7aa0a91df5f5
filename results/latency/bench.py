"""How good the predictions of recorded profiles are.

    python results/latency/bench.py [PROFILE ...]

Shapes that were held out by hash before any fit, and whole models of which only the
dense one was ever fitted. Nothing is measured here: what was recorded is predicted
anew. Writes ``accuracy.csv`` beside this file, a row for each kernel and number of
tokens, each ratio to the dense kernel, and each kind of model.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from autoprune.latency.accuracy import (
    Accuracy,
    accuracy_of,
    accuracy_of_models,
    accuracy_of_ratios,
    sign_accuracy,
)
from autoprune.latency.profiles import Profile, find_profile, profiles_that_ship

TABLE = Path(__file__).parent / "accuracy.csv"
DENSE = {"cuda": "torch.mm.bf16", "cpu": "cpu.linear.fp32"}
SPARSE = "cslt.24.bf16"


def rows_of(profile: Profile) -> Iterator[tuple[str, Accuracy]]:
    """Judge everything in a profile."""
    for found in accuracy_of(profile):
        yield "kernel", found
    for found in accuracy_of_ratios(profile, DENSE[profile.kind]):
        yield "ratio", found
    for found in accuracy_of_models(profile):
        yield "model", found


def main() -> None:
    """Judge the profiles that ship, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profiles", nargs="*", help="names or folders")
    wanted = parser.parse_args().profiles or profiles_that_ship()
    columns = ["profile", "sort", *(field.name for field in fields(Accuracy))]
    with TABLE.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for name in wanted:
            profile = find_profile(name)
            print(f"\n{profile.name}: {profile.device['name']}, {profile.created}")
            for sort, found in rows_of(profile):
                values = asdict(found)
                numbers = {k: v for k, v in values.items() if isinstance(v, float)}
                shown = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
                print(f"  {sort:6} {found.what}: {found.count} x, {shown}")
                rounded = [
                    f"{v:.4f}" if isinstance(v, float) else v for v in values.values()
                ]
                table.writerow([profile.name, sort, *rounded])
            right, base = sign_accuracy(profile, SPARSE, DENSE[profile.kind])
            if right == right:
                print(f"  2:4 faster or not: {right:.0%} right, base rate {base:.0%}")


if __name__ == "__main__":
    main()
