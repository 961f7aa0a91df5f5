"""Exact counts over one ranking or many."""

import math

import pytest
import torch

from autoprune.errors import ConfigError, MethodError
from autoprune.training.choosing import erk_counts, prune_counts, prune_smallest


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.999, 1.0])
def test_counts_are_exact_over_all_and_over_each(sparsity: float) -> None:
    scores = {"a": torch.rand(10, 7), "b": torch.rand(3, 5, 2), "c": torch.rand(4)}
    everywhere = prune_smallest(scores, sparsity)
    assert sum(int(m.sum()) for m in everywhere.values()) == round(sparsity * 104)
    flat = torch.cat([score.flatten() for score in scores.values()])
    marked = torch.cat([mask.flatten() for mask in everywhere.values()])
    if 0 < int(marked.sum()) < 104:
        assert flat[marked].max() < flat[~marked].min()
    for name, mask in prune_smallest(scores, sparsity, per="parameter").items():
        assert mask.shape == scores[name].shape
        assert int(mask.sum()) == round(sparsity * mask.numel())


def test_earlier_parameters_and_places_go_first_on_ties() -> None:
    scores = {"late": torch.ones(2, 2), "early": torch.ones(3)}
    assert prune_smallest(scores, 3 / 7)["late"].tolist() == [[1, 1], [1, 0]]
    scores = {name: scores[name] for name in ("early", "late")}
    found = prune_smallest(scores, 4 / 7)
    assert found["early"].all() and found["late"].tolist() == [[1, 0], [0, 0]]
    assert prune_counts(scores, {"early": 1, "late": 0})["early"].tolist() == [1, 0, 0]


def test_erk_is_equation_1_where_nothing_is_full() -> None:
    shapes = {"conv": (8, 4, 3, 3), "wide": (40, 40), "narrow": (10, 20)}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    counts = erk_counts(shapes, 0.8)
    assert sum(counts.values()) == round(0.8 * sum(sizes.values()))
    density = {name: 1 - counts[name] / sizes[name] for name in shapes}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    scale = [density[name] / raw[name] for name in shapes]
    assert scale == pytest.approx([scale[0]] * 3, rel=0.02)  # but for rounding


def test_erk_leaves_whole_what_would_be_more_than_all() -> None:
    counts = erk_counts({"tiny": (2, 2), "large": (100, 100)}, 0.5)
    assert counts == {"tiny": 0, "large": 5002}
    assert erk_counts({"a": (2, 2), "b": (3, 3)}, 0.0) == {"a": 0, "b": 0}
    assert erk_counts({"a": (2, 2), "b": (3, 3)}, 1.0) == {"a": 4, "b": 9}


def test_what_cannot_be_ranked_is_told() -> None:
    with pytest.raises(MethodError, match=r"1 of 2 scores of b are not numbers"):
        prune_smallest({"b": torch.tensor([1.0, math.nan])}, 0.5)
    with pytest.raises(ConfigError, match=r"found 1.5"):
        prune_smallest({"b": torch.ones(2)}, 1.5)
    with pytest.raises(
        ConfigError, match=r"unknown scope 'modle'. Did you mean 'model'"
    ):
        prune_smallest({"b": torch.ones(2)}, 0.5, per="modle")
