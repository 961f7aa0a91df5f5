"""The exception tree is the one drawn, and unknown names get near misses."""

import re

import pytest

from autoprune import errors
from autoprune.errors import AutoPruneError, BudgetError, ConfigError, unknown_name

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, AutoPruneError)
}


def test_every_error_stands_in_the_drawn_tree() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"\b(\w+Error)\b", errors.__doc__)
    assert sorted(drawn) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_caught_as_one_of_ours(name: str) -> None:
    assert issubclass(CLASSES[name], AutoPruneError)
    assert not issubclass(CLASSES[name], OSError | ValueError)


def test_a_budget_is_a_part_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="no policy"):
        raise BudgetError("no policy is so small")


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        (
            "wnada",
            ["wanda", "magnitude"],
            "unknown method 'wnada'. Did you mean 'wanda'? Known: magnitude, wanda",
        ),
        (
            "gptq2",
            ["gptq", "gptq3"],
            "unknown method 'gptq2'. Did you mean 'gptq' or 'gptq3'? Known: gptq, "
            "gptq3",
        ),
        ("zzz", ["wanda"], "unknown method 'zzz'. Known: wanda"),
        ("zzz", [], "unknown method 'zzz'. Known: none"),
    ],
    ids=["one-near", "two-near", "none-near", "none-known"],
)
def test_an_unknown_name_gets_near_misses_then_all(
    name: str, known: list[str], text: str
) -> None:
    assert unknown_name("method", name, known) == text
