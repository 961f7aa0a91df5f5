"""Recoveries that move masks: as many zeros as declared, also after a stop."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_trainings import open_bench, policy_of, stopping_at, write_lines

from autoprune.errors import ConfigError, PolicyError
from autoprune.evaluation.scheduled import own_bank
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import load_plugins
from autoprune.policy import Layer, Policy

HALF = "magnitude(sparsity=0.5)"
PATTERN = "magnitude(pattern=2:4)"
TILES = "magnitude(sparsity=0.5, tile=4x4)"
TRAINED = "tokens=1024, learning_rate=0.003, interval=2"


@pytest.fixture(scope="module")
def bench(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workbench]:
    folder = tmp_path_factory.mktemp("bench")
    text = write_lines(folder)
    yield open_bench(load_plugins(), tiny_checkpoint, text, folder / "c")


def trained(bench: Workbench, policy: Policy) -> dict[Layer, torch.Tensor]:
    """The weights after a course, which store what is declared."""
    bank, declared = own_bank(bench, policy), bench.storages(policy)
    found = {}
    for layer, one in bench.per_layer(policy).items():
        if not one.steps:
            continue
        bank.make([(layer, one)])
        variant = bank.get(layer, one)
        assert variant.storage == declared[layer]
        assert variant.mask is not None
        assert int(variant.mask.sum()) == declared[layer].kept
        gone = variant.weight[~variant.mask]
        assert not gone.any() and not gone.signbit().any()
        if declared[layer].mask == "2:4":
            assert (variant.mask.view(-1, 4).sum(1) == 2).all()
        found[layer] = variant.weight
    return found


def kl(bench: Workbench, policy: Policy) -> float:
    return bench.measure(policy, own_bank(bench, policy), "report").metrics["kl"]


@pytest.mark.parametrize(
    ("action", "course"),
    [
        (HALF, f"one-shot + rigl({TRAINED})"),
        pytest.param(HALF, f"one-shot + set({TRAINED})", marks=pytest.mark.slow),
        pytest.param(
            HALF,
            f"one-shot + sr-ste({TRAINED})".replace(".003", ".01"),
            marks=pytest.mark.slow,
        ),
        (PATTERN, f"one-shot + sr-ste({TRAINED})"),
        (PATTERN, f"during + sr-ste({TRAINED})"),
        pytest.param(
            HALF,
            f"late(start=0.5) + rigl({TRAINED.replace('1024', '2048')})",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            PATTERN,
            f"progressive(stages=2) + sr-ste({TRAINED.replace('1024', '4096')})",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            HALF,
            f"iterative(rounds=2) + rigl({TRAINED.replace('1024', '2048')})",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_zeros_move_and_are_as_many_as_declared(
    bench: Workbench, action: str, course: str
) -> None:
    policy, plain = (policy_of(bench, action, one) for one in (course, "one-shot"))
    now, before = trained(bench, policy), trained(bench, plain)
    moved = [bool(((now[la] == 0) != (before[la] == 0)).any()) for la in now]
    assert all(moved), moved
    assert kl(bench, policy) < kl(bench, plain)


@pytest.mark.parametrize(
    "course",
    [
        f"one-shot + rigl({TRAINED}, seed=9)",
        pytest.param(f"during + sr-ste({TRAINED}, seed=9)", marks=pytest.mark.slow),
    ],
)
def test_a_course_that_was_interrupted_ends_the_same(
    bench: Workbench, course: str
) -> None:
    policy = policy_of(bench, HALF, course)
    undisturbed = trained(bench, policy)
    bank, actions = own_bank(bench, policy), bench.per_layer(policy)
    for layer in undisturbed:
        bench.store.files.discard(bank.key(layer, actions[layer]), "test")
    with stopping_at(5), pytest.raises(KeyboardInterrupt):
        trained(bench, policy)
    found = trained(bench, policy)
    assert all(torch.equal(found[la], weight) for la, weight in undisturbed.items())


def test_what_cannot_move_is_told(bench: Workbench) -> None:
    units = policy_of(bench, TILES, f"one-shot + rigl({TRAINED})")
    with pytest.raises(ConfigError, match="rigl moves zeros .* but only 0 of 14"):
        trained(bench, units)
    tiles = policy_of(bench, TILES, f"during + sr-ste({TRAINED})")
    with pytest.raises(ConfigError, match="sr-ste makes zeros .* only 0 of 14"):
        trained(bench, tiles)
    early = policy_of(bench, HALF, f"during + sr-ste({TRAINED}, patience=3)")
    with pytest.raises(ConfigError, match="may not stop before the end, found pat"):
        trained(bench, early)
    with pytest.raises(PolicyError, match="in during the recovery prunes, found rigl"):
        trained(bench, policy_of(bench, HALF, f"during + rigl({TRAINED})"))
    with pytest.raises(PolicyError, match="found none, which cannot. Take one of: "):
        trained(bench, policy_of(bench, HALF, "during"))
