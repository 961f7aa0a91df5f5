"""The scores of AutoQuantize and AutoScheme, the rivals of the search benchmark.

Written from what NVIDIA's ModelOpt (``AutoQuantizeGradientSearcher``) and Intel's
AutoRound (``auto_scheme/delta_loss.py``) do, over any variants of a bank instead of
formats that they round to themselves. Both then choose by a program under one limit on
bits, as ``autoprune.searching.allocation`` does exactly. A tied embedding is scored as
an embedding only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from autoprune.compression.bank import VariantBank
from autoprune.errors import ModelError
from autoprune.evaluation.teacher import Teacher
from autoprune.models.statistics import exact_products
from autoprune.models.weights import MATRICES, find_weight, parameter_of, view_of_layer
from autoprune.policy import Action, Layer
from autoprune.searching.space import SearchSpace

Scores = dict[tuple[Layer, Action], float]


def autoquantize_costs(
    bank: VariantBank, teacher: Teacher, space: SearchSpace, windows: Sequence[int]
) -> NDArray[np.float64]:
    """Score every choice as AutoQuantize does, ``[sites, choices]``; inf where none.

    That is the sum over tokens and outputs of ``(g * dY)²``: ``g`` the gradient of the
    loss by what the layer gives in the dense model, ``dY`` what the variant changes in
    it; the diagonal of the Fisher matrix of outputs, with labels from the text itself.

    Args:
        bank: Whose variants; missing ones are made.
        teacher: The dense model on a split.
        space: What may be chosen.
        windows: Indices of the windows of the split; each is a batch.
    """
    wanted = _wanted(space)
    bank.make((layer, action) for layer, acts in wanted.items() for action in acts)
    scores: Scores = {}
    with _dense(bank) as model:
        weights = {la: bank.stitched.dense_weight(la).clone() for la in wanted}

        def hear(layer: Layer, module: nn.Module, args: Any, output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(partial(score, layer, args[0].detach()))

        def score(layer: Layer, read: Tensor, gradient: Tensor) -> None:
            for action in wanted[layer]:
                change = bank.weight(layer, action) - weights[layer]
                with exact_products(read):
                    moved = _output(model, layer, read, change)
                    found = float((moved * gradient.float()).square().sum())
                scores[layer, action] = scores.get((layer, action), 0.0) + found

        handles = [
            model.get_submodule(layer.name).register_forward_hook(partial(hear, layer))
            for layer in wanted
        ]
        try:
            _backward(model, teacher, windows)
        finally:
            for handle in handles:
                handle.remove()
    return _laid_out(space, scores)


def autoscheme_costs(
    bank: VariantBank, teacher: Teacher, space: SearchSpace, windows: Sequence[int]
) -> NDArray[np.float64]:
    """Score every choice as AutoScheme does, ``[sites, choices]``; inf where none.

    That is the sum over weights of ``|g * dW|``, batch by batch. ``g`` is the gradient
    of the loss in the model that has this very action everywhere: one forward and
    backward pass for each option and batch. Its part of activations is left out, as no
    variant here rounds them.

    Args:
        bank: Whose variants; missing ones are made.
        teacher: The dense model on a split.
        space: What may be chosen.
        windows: Indices of the windows of the split; each is a batch.
    """
    wanted = _wanted(space)
    bank.make((layer, action) for layer, acts in wanted.items() for action in acts)
    scores: Scores = {}
    options = dict.fromkeys(action for acts in wanted.values() for action in acts)
    with _dense(bank) as model:
        dense = {la: bank.stitched.dense_weight(la).clone() for la in wanted}

        def score(action: Action, layer: Layer, parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            gradient = view_of_layer(model, layer.name, parameter.grad)
            now = find_weight(model, layer.name)
            assert gradient is not None and now is not None
            moved = gradient.float() * (now - dense[layer]).float()
            found = float(moved.abs().sum())
            scores[layer, action] = scores.get((layer, action), 0.0) + found
            parameter.grad = None

        for option in options:
            layers = [layer for layer, acts in wanted.items() if option in acts]
            bank.put(dict.fromkeys(layers, option))
            with _listening(model, layers, partial(score, option)):
                _backward(model, teacher, windows)
    return _laid_out(space, scores)


@contextmanager
def _listening(
    model: nn.Module, layers: Sequence[Layer], hook: Callable[..., None]
) -> Iterator[None]:
    """Hear of the gradients of layers' parameters for a while."""
    parameters = [model.get_parameter(parameter_of(layer.name)) for layer in layers]
    handles = [
        parameter.requires_grad_().register_post_accumulate_grad_hook(
            partial(hook, layer)
        )
        for layer, parameter in zip(layers, parameters, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(False)


def _backward(model: nn.Module, teacher: Teacher, windows: Sequence[int]) -> None:
    """Send back the gradient of each window's mean loss on its own next tokens."""
    with torch.enable_grad():
        for window in windows:
            batch = teacher.batch_of([window])
            features = teacher.task.features(model, batch)
            leaf = features.detach().requires_grad_()
            count = len(batch.labels)
            with exact_products(features):
                for rows, logits in teacher.task.head(model).in_chunks(leaf):
                    loss = functional.cross_entropy(
                        logits, batch.labels[rows], reduction="sum"
                    )
                    (loss / count).backward()
            assert leaf.grad is not None
            features.backward(leaf.grad.to(features.dtype))


def _output(model: nn.Module, layer: Layer, read: Tensor, change: Tensor) -> Tensor:
    """Give what a change of weight adds to what a layer gives."""
    module = model.get_submodule(layer.name)
    if isinstance(module, nn.Embedding):
        return functional.embedding(read, change.float())
    if not isinstance(module, MATRICES):
        raise ModelError(f"{layer.name} is a {type(module).__name__}: not scored here")
    return read.float() @ change.float().T


def _wanted(space: SearchSpace) -> dict[Layer, list[Action]]:
    return {
        layer: found
        for site in space.sites
        for layer in site.layers
        if (found := [action for action in space.choices[site.name] if action.steps])
    }


def _laid_out(
    space: SearchSpace, scores: Mapping[tuple[Layer, Action], float]
) -> NDArray[np.float64]:
    width = max(len(actions) for actions in space.choices.values())
    costs = np.full((len(space.sites), width), np.inf)
    for row, site in enumerate(space.sites):
        for column, action in enumerate(space.choices[site.name]):
            found = (scores.get((layer, action), 0.0) for layer in site.layers)
            costs[row, column] = sum(found)
    return costs


@contextmanager
def _dense(bank: VariantBank) -> Iterator[nn.Module]:
    """Give the dense model, and leave it dense."""
    bank.stitched.claim(bank.name)
    bank.stitched.restore()
    try:
        yield bank.stitched.model
    finally:
        bank.stitched.restore()
