import numpy as np
import pytest

from autoprune.errors import ConfigError
from autoprune.searching.budget import Budget, Prices, prices_of


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_budget_must_be_positive(limit):
    with pytest.raises(
        ConfigError, match=f"size_bytes must be positive, found {limit}"
    ):
        Budget("size_bytes", limit)


def test_prices_are_padded_with_what_nobody_can_pay(problem_of):
    problem = problem_of(2, 3)
    padded = problem.prices[0].padded(problem.space)
    assert padded.shape == (2, 3)
    assert padded[1].tolist() == problem.prices[0].table["blocks.1.up"].tolist()


@pytest.mark.parametrize(
    ("prices", "found"),
    [([1.0, 2.0], r"\[1.0, 2.0\]"), ([1.0, 2.0, np.nan], "nan"), ([], r"\[\]")],
    ids=["too few", "not a number", "none"],
)
def test_prices_that_do_not_fit_the_space_are_refused(problem_of, prices, found):
    problem = problem_of(1, 3)
    bad = Prices("size_bytes", {"blocks.0.up": np.array(prices)})
    with pytest.raises(
        ConfigError, match=f"size_bytes needs 3 finite .* 'blocks.0.up', .*{found}"
    ):
        bad.padded(problem.space)


def test_metric_without_prices_is_unknown(problem_of):
    with pytest.raises(ConfigError, match="metric 'size_byte'. Did you mean 'size_byt"):
        prices_of("size_byte", problem_of(1, 2).prices)


def test_reach_is_from_the_cheapest_to_the_dearest_policy(problem_of):
    problem = problem_of(2, 3)
    first, last = (sum(p[i] for p in problem.prices[0].table.values()) for i in (0, -1))
    assert problem.prices[0].reach(problem.space) == (500 + last, 500 + first)
