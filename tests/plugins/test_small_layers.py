"""Layers smaller than a pattern, a group, a tile or a rank: refused, or done right."""

from dataclasses import replace

import pytest
import torch

from autoprune.compression.actions import Actions
from autoprune.compression.examples import (
    example_action,
    example_layer,
    example_steps,
)
from autoprune.compression.making import Making
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.hidden import HIDDEN
from autoprune.models.structures import STREAM
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer
from autoprune.sites import Cut
from autoprune.testing import tiny_source, tiny_statistics

METHODS = {
    name: method
    for name, method in load_plugins().methods.items()
    if not method.kinds & {HIDDEN, STREAM}  # their width is not a layer's own
}
ACTIONS = Actions(METHODS)
ALONE = {name: example_action(method, METHODS) for name, method in METHODS.items()}
SHAPES = [(1, 1), (1, 2), (2, 3), (3, 5), (5, 16), (16, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_layer_that_is_too_small_is_refused_or_done(
    name: str, shape: tuple[int, int]
) -> None:
    method, columns = METHODS[name], shape[1]
    *before, _ = ALONE[name].steps
    cut = Cut(
        "heads" if method.kinds == {"heads"} else "channels", "columns", columns, 1
    )
    layer = replace(example_layer(method), name="layers.3.small", shape=shape, cut=cut)
    for step in example_steps(method):
        action = Action((*before, step))
        try:
            declared = ACTIONS.storage(layer, action)
        except MethodError as error:
            assert "layers.3.small cannot take" in str(error)
            assert str(action) in str(error)
            continue
        variant = small_variant(layer, action)
        assert variant.storage == declared
        assert torch.isfinite(variant.weight).all()


def small_variant(layer: Layer, action: Action) -> Variant:
    source = replace(tiny_source(layer.shape), layer=layer)
    statistics = tiny_statistics(layer.shape[1])
    made = Making(ACTIONS).grow([source], {action: action.steps}, statistics)
    (variant,) = dict(made)[action]
    return variant


@pytest.mark.parametrize(
    ("action", "shape", "reason"),
    [
        ("wanda(pattern=2:4)", (8, 6), "4 of 2:4 does not divide its 6 inputs"),
        ("wanda(pattern=2:4)", (8, 2), "its 2 inputs are fewer than the 4 of 2:4"),
        ("gptq(bits=4, group=64)", (8, 32), "group 64 does not divide its 32 inputs"),
        ("mxfp4", (8, 16), "group 32 does not divide its 16 inputs"),
        (
            "magnitude(sparsity=0.5, tile=16x16)",
            (8, 32),
            "tiles of 16x16 do not divide its 8x32 weights",
        ),
        (
            "rtn(bits=4) + eora(rank=16)",
            (8, 32),
            "rank 16 is larger than the smaller side of 8 x 32",
        ),
    ],
)
def test_what_does_not_fit_is_said(
    action: str, shape: tuple[int, int], reason: str
) -> None:
    layer = replace(example_layer(METHODS["rtn"]), shape=shape)
    assert ACTIONS.refuses(layer, Action.parse(action)) == reason
