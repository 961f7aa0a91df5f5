"""Intervals: what adds up, what cancels, what is credited."""

import math
from dataclasses import replace

import pytest

from autoprune.latency.estimate import (
    Z_80,
    Estimate,
    Term,
    Tier,
    compare,
    credited,
)


def term(
    us: float,
    *,
    kernel: str = "a",
    shape: tuple[int, ...] = (1,),
    own: float = 0.1,
    shared: float = 0.05,
    tier: Tier = Tier.TABLE_INTERPOLATED,
    part: str = "linears",
) -> Term:
    return Term(part, kernel, shape, us, own, shared, tier)


def test_own_errors_average_out_and_shared_ones_do_not() -> None:
    many = Estimate({term(1.0, shape=(i,)): 1.0 for i in range(100)})
    assert many.sigma == pytest.approx(math.hypot(0.1 / 10, 0.05))
    one = Estimate({term(1.0): 100.0})
    assert one.sigma == pytest.approx(math.hypot(0.1, 0.05))
    assert one.ms == pytest.approx(0.1)


def test_the_interval_is_of_eighty_in_a_hundred() -> None:
    low, high = Estimate({term(1000.0, own=0.3, shared=0.4): 1.0}).interval
    assert high == pytest.approx(math.exp(Z_80 * 0.5))
    assert low * high == pytest.approx(1.0)


def test_what_two_estimates_share_cancels_in_their_ratio() -> None:
    same, mine, yours = term(900.0), term(50.0, shape=(2,)), term(100.0, shape=(3,))
    one = Estimate({same: 1.0, mine: 1.0})
    other = Estimate({same: 1.0, yours: 1.0})
    ratio = compare(one, other)
    assert ratio.value == pytest.approx(0.95)
    # By hand: 900/950 - 900/1000 of the first, 50/950 and 100/1000 of the others.
    sigma = 0.1 * math.sqrt((900 / 950 - 0.9) ** 2 + (50 / 950) ** 2 + 0.1**2)
    assert ratio.high == pytest.approx(0.95 * math.exp(Z_80 * sigma))
    assert ratio.high / ratio.low < one.interval[1] / one.interval[0]


def test_a_warning_makes_no_other_operation() -> None:
    told = replace(term(3.0), warnings=("timed as dense",))
    ratio = compare(Estimate({told: 2.0}), Estimate({term(3.0): 2.0}))
    assert (ratio.low, ratio.value, ratio.high) == (1.0, 1.0, 1.0)


def test_an_estimate_over_itself_is_one_for_sure() -> None:
    one = Estimate({term(3.0): 7.0})
    assert compare(one, one) == compare(Estimate({}), Estimate({}))
    assert compare(one, one).tied


@pytest.mark.parametrize(
    ("us", "own", "expected"),
    [
        (50.0, 0.1, "slow end"),
        (98.0, 0.1, "dense"),
        (104.0, 0.1, "dense"),
        (200.0, 0.1, "predicted"),
    ],
)
def test_no_more_is_credited_than_is_sure(us: float, own: float, expected: str) -> None:
    dense = Estimate({term(100.0, kernel="dense", own=own, shared=0.0): 1.0})
    changed = Estimate({term(us, kernel="other", own=own, shared=0.0): 1.0})
    found = credited(changed, dense)
    slow_end = us * math.exp(Z_80 * own * math.sqrt(2)) / 1e3
    by_name = {"slow end": slow_end, "dense": 0.1, "predicted": us / 1e3}
    assert found == pytest.approx(by_name[expected])


def test_nothing_left_costs_nothing() -> None:
    dense = Estimate({term(100.0): 1.0})
    assert credited(Estimate({}), dense) == 0.0
    assert credited(Estimate({}), Estimate({})) == 0.0


def test_the_parts_sum_to_the_whole_and_the_worst_tier_is_told() -> None:
    found = Estimate(
        {
            term(10.0): 2.0,
            term(5.0, part="rest", tier=Tier.ROOFLINE_DATASHEET): 1.0,
        }
    )
    assert sum(found.parts.values()) == pytest.approx(found.ms)
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert found.shares["roofline_datasheet"] == pytest.approx(0.2)
    assert found.tier is Tier.ROOFLINE_DATASHEET
