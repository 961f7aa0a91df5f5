"""What is kept of the dense model, as numbers."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_scenes import evidence, tiny_scene

from autoprune.evaluation.fidelity import Kl, Perplexity, QualityDrop
from autoprune.evaluation.metric import Evidence
from autoprune.evaluation.quality import Quality


def quality(kl: float, perplexity: float) -> Quality:
    return Quality(torch.full((2,), kl), torch.full((2,), math.log(perplexity)))


@pytest.fixture
def found() -> Evidence:
    scene = replace(tiny_scene("llama"), dense=quality(0.0, 8.0))
    return replace(evidence(scene), quality=quality(0.25, 10.0))


def test_values(found: Evidence) -> None:
    assert Kl().measure(found) == 0.25
    assert Perplexity().measure(found) == pytest.approx(10.0)
    assert QualityDrop().measure(found) == pytest.approx(0.25)


def test_the_dense_model_drops_nothing(found: Evidence) -> None:
    dense = replace(found, quality=found.scene.dense)
    assert QualityDrop().measure(dense) == 0.0
    assert Kl().measure(dense) == 0.0


def test_divergence_is_infinite(found: Evidence) -> None:
    lost = replace(found, quality=Quality(torch.ones(2), torch.full((2,), 1e6)))
    assert Perplexity().measure(lost) == math.inf
    assert QualityDrop().measure(lost) == math.inf


def test_they_all_need_the_model(found: Evidence) -> None:
    for metric in (Kl(), Perplexity(), QualityDrop()):
        assert metric.needs_model
        assert metric.direction == "minimize"
        with pytest.raises(AssertionError, match="ran without it"):
            metric.measure(replace(found, quality=None))
