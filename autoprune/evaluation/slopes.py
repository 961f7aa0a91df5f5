"""What every variant would change, to first order, from one backward pass.

At a compressed model the gradient ``g`` of the KL to the dense model is far from zero.
``<g, W_variant - W_now>`` then prices every variant of a layer at once. Gradients of
``log q(y)`` with labels ``y`` that the model itself draws give what grows with the
square of a change: half their mean square is the diagonal of the KL's second-order term
(the Gauss-Newton matrix is the Fisher matrix of the model at which it is taken).
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.evaluation.pricing import LayerSlopes as LayerSlopes
from autoprune.evaluation.pricing import Pricing
from autoprune.evaluation.teacher import Teacher
from autoprune.models.statistics import exact_products
from autoprune.policy import Layer

GROUP = 2048
"""Tokens that pass at a time: what a backward pass has to hold grows with them."""


def measure_slopes(
    model: nn.Module,
    teacher: Teacher,
    variants: Mapping[Layer, Sequence[Float[Tensor, "out in"]]],
    windows: Sequence[int],
    *,
    draws: int = 0,
    drawn: int | None = None,
    sampled: int = 0,
    apart: bool = False,
    seed: int = 0,
) -> dict[Layer, LayerSlopes]:
    """Price variants by the gradient at a model as it stands.

    Args:
        model: The model, with a policy's variants on it; left as it was.
        teacher: The dense model on a split.
        variants: For each layer the weights to price.
        windows: Indices of the windows of the split that the gradient is taken on.
        draws: How often labels are drawn for a window.
        drawn: For so many of the windows, from the first; None for all.
        sampled: Positions of every pass whose pairs make ``crossed``; 0 for none.
        apart: Also make ``apart`` from the drawn labels.
        seed: Of the labels; those of a window depend on nothing else.

    Returns:
        Slopes of every layer's variants, in their order.
    """
    pricing = Pricing(model, variants, sampled=sampled, apart=apart)
    drawn = len(windows) if drawn is None else drawn
    # What is priced by its parameter's gradient has one figure for all that pass.
    whole = all(pricing.module_of(layer) for layer in variants)
    group = max(1, GROUP // teacher.windows.ids.shape[1]) if whole else 1
    with pricing.listening(), torch.enable_grad():
        for part, times in _passes(windows, group, drawn, draws):
            batch = teacher.batch_of(part)
            features = teacher.task.features(model, batch)
            pricing.counts = batch.scored.sum(1)
            pull, of_head = teacher.pull(
                model, features, part, head=bool(pricing.of_head)
            )
            # The pull is that of the mean; each window's own is as many times larger.
            pricing.backward(features, pull * len(part), keep=times > 0)
            if of_head is not None:
                pricing.add_of_head(of_head)
            sizes = zip(part, pricing.counts.tolist(), strict=True)
            chances = [_chances(seed, window, (times, n)) for window, n in sizes]
            for draw, chance in enumerate(torch.cat(chances, 1)):
                push = _push(teacher, model, features, chance)
                pricing.backward(features, push, keep=draw < times - 1, score=True)
            pricing.sort_draws(len(part), times)
    return pricing.result()


def _passes(
    windows: Sequence[int], group: int, drawn: int, draws: int
) -> Iterator[tuple[list[int], int]]:
    """Part windows into passes; tell how often each draws labels."""
    for some, times in ((windows[:drawn], draws), (windows[drawn:], 0)):
        for at in range(0, len(some), group):
            yield list(some[at : at + group]), times


def _chances(seed: int, window: int, shape: tuple[int, int]) -> Tensor:
    """Draw numbers for a window, the same whoever takes which other windows."""
    (own,) = np.random.SeedSequence([seed, window]).generate_state(1)
    return torch.rand(shape, generator=torch.Generator().manual_seed(int(own)))


def _push(
    teacher: Teacher,
    model: nn.Module,
    features: Float[Tensor, "positions hidden"],
    chance: Float[Tensor, " positions"],
) -> Float[Tensor, "positions hidden"]:
    """Give the gradient of the log-likelihood of labels that the model draws itself.

    Args:
        teacher: The dense model.
        model: The model.
        features: What its head reads.
        chance: Where in the model's distribution each label lies, from 0 to 1: one
            number a position, so that how windows pass together changes no label.
    """
    leaf = features.detach().requires_grad_()
    with exact_products(features):
        for rows, logits in teacher.task.head(model).in_chunks(leaf):
            log_q = logits.log_softmax(-1)
            below = log_q.detach().exp().cumsum(-1)
            at = chance[rows, None] * below[:, -1:]
            drawn = torch.searchsorted(below, at).clamp_(max=below.shape[1] - 1)
            log_q.gather(1, drawn).sum().backward()
    assert leaf.grad is not None
    return leaf.grad
