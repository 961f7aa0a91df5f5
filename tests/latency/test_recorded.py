"""Profiles that ship keep what is promised: held-out shapes and whole models.

``results/latency/bench.py`` prints the same in full.
"""

import numpy as np
import pytest

from autoprune.latency.accuracy import (
    Accuracy,
    accuracy_of,
    accuracy_of_models,
    accuracy_of_ratios,
    sign_accuracy,
)
from autoprune.latency.opening import open_device
from autoprune.latency.profiles import Profile, find_profile, profiles_that_ship
from autoprune.latency.whole_models import shape_of, variation_of
from autoprune.latency.workload import find_workload

SHIPPED = sorted(profiles_that_ship())
DENSE = {"cuda": "torch.mm.bf16", "cpu": "cpu.linear.fp32"}

BUDGETS = {
    "torch.mm.bf16": 0.08,
    "torch.scaled_mm.row": 0.15,
    "torch.scaled_mm.tensor": 0.15,
    "cslt.24.bf16": 0.15,
    "cpu.linear.fp32": 0.08,
    "cpu.linear.bf16": 0.12,
    "cpu.int8.x86": 0.12,
}
"""Largest mean absolute error of held-out shapes, kernel by kernel."""

RATIOS = {"cuda": 0.12, "cpu": 0.12}
MODELS = {"cuda": 0.10, "cpu": 0.15}
"""On a CPU no single model may be off by more; on a GPU their mean."""


@pytest.fixture(params=SHIPPED)
def profile(request: pytest.FixtureRequest) -> Profile:
    return find_profile(request.param)


def tell(found: list[Accuracy]) -> None:
    for one in found:
        print(f"{one.what}: {one.count} x, MAPE {one.mape:.3f}, {one.coverage:.2f} in")


def test_a_profile_ships() -> None:
    assert SHIPPED


def test_shapes_that_were_held_out_are_foretold(profile: Profile) -> None:
    found = accuracy_of(profile)
    tell(found)
    for kernel, most in BUDGETS.items():
        own = [one for one in found if one.what.startswith(f"{kernel},")]
        if own:
            weights = [one.count for one in own]
            assert np.average([one.mape for one in own], weights=weights) <= most


def test_gains_are_foretold(profile: Profile) -> None:
    found = accuracy_of_ratios(profile, DENSE[profile.kind])
    tell(found)
    pairs = [(one.mape, one.count) for one in found if one.count > 20]
    assert pairs
    mean = np.average([mape for mape, _ in pairs], weights=[n for _, n in pairs])
    assert mean <= RATIOS[profile.kind]


def test_whether_two_of_four_is_faster_is_foretold(profile: Profile) -> None:
    right, base = sign_accuracy(profile, "cslt.24.bf16", DENSE[profile.kind])
    print(f"{right:.2f} right, base rate {base:.2f}")
    if profile.kind == "cpu":
        assert np.isnan(right)  # no kernel skips them
    elif base < 0.9:
        assert right >= base + 0.05


def test_whole_models_are_foretold(profile: Profile) -> None:
    *each, everything = accuracy_of_models(profile)
    tell([*each, everything])
    assert everything.mape <= MODELS[profile.kind]
    if profile.kind == "cpu":
        assert max(one.mape for one in each) <= MODELS["cpu"]
    assert everything.spearman > 0.9


def test_intervals_hold_most_of_what_was_measured(profile: Profile) -> None:
    found = [*accuracy_of(profile), accuracy_of_models(profile)[-1]]
    weights = [one.count for one in found]
    inside = np.average([one.coverage for one in found], weights=weights)
    assert 0.7 <= inside <= 0.98


def test_zeros_were_measured_to_gain_nothing_and_are_credited_nothing(
    profile: Profile,
) -> None:
    """The dense kernel took as long, and that is what is foretold."""
    points = profile.of("model_prefill")
    dense = {p.context: p for p in points if p.kernel.endswith("dense")}
    for point in points:
        if not variation_of(point).zeros:
            continue
        assert point.us == pytest.approx(dense[point.context].us, rel=0.1)
        device, work = open_device(profile.name), find_workload("prefill").on("cpu")
        times = [
            device.predictor.forecast(shape_of(one), work).total.ms
            for one in (point, dense[point.context])
        ]
        assert times[0] == times[1]
