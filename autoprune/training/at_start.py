"""Masks made before a training, of parameters that nothing has trained yet.

All give for each named parameter True where a weight stays, as ``FrozenMasks`` of
``of_parameters`` and ``MovingMasks`` take it; ``round(sparsity * n)`` of the ``n``
weights go. A loss is a function without arguments: the model's mean loss on one batch,
with a graph. The model is left as it was: values, gradients, flags, modes, buffers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoprune.errors import ConfigError, ModelError, unknown_name
from autoprune.training.choosing import (
    erk_counts,
    prune_counts,
    prune_smallest,
)
from autoprune.training.masks import named_parameters

Kept = dict[str, Bool[Tensor, "..."]]
"""By parameter, True where a weight stays."""

Scores = dict[str, Float[Tensor, "..."]]
"""By parameter, how important each weight is; larger is kept."""

Loss = Callable[[], Float[Tensor, ""]]

LAYOUTS = ("uniform", "erk")
"""How random pruning spreads over parameters."""


def keep_largest(scores: Mapping[str, Tensor], sparsity: float) -> Kept:
    """Keep the weights with the largest scores of all parameters together."""
    return kept_of(prune_smallest(scores, sparsity))


def keep_random(
    model: nn.Module,
    names: Iterable[str],
    sparsity: float,
    *,
    layout: str = "erk",
    generator: torch.Generator,
) -> Kept:
    """Keep random weights: the control of all others.

    Args:
        model: The model.
        names: Of the parameters.
        sparsity: Share of their weights to go, in [0, 1].
        layout: ``uniform`` takes that share of each parameter, rounded; ``erk`` leaves
            small ones denser, see ``choosing.erk_counts``.
        generator: Of the random numbers, on the CPU.
    """
    named = named_parameters(model, names)
    scores = {
        name: torch.rand(parameter.shape, generator=generator)
        for name, parameter in named.items()
    }
    if layout == "uniform":
        return kept_of(prune_smallest(scores, sparsity, per="parameter"))
    if layout != "erk":
        raise ConfigError(unknown_name("layout", layout, LAYOUTS))
    counts = erk_counts({name: one.shape for name, one in scores.items()}, sparsity)
    return kept_of(prune_counts(scores, counts))


def magnitude_scores(model: nn.Module, names: Iterable[str]) -> Scores:
    """Score weights by their sizes, ``|w|``."""
    named = named_parameters(model, names)
    return {name: parameter.detach().abs() for name, parameter in named.items()}


def snip_scores(model: nn.Module, names: Iterable[str], loss: Loss) -> Scores:
    """Score weights by what the loss feels of their removal, ``|g w|``.

    SNIP (Lee et al. 2019, arXiv:1810.02340, Sec. 4). How we differ: the paper
    divides by the sum of all scores, which changes no order.
    """
    with undisturbed(model, names) as named:
        gradients = _loss_gradients(loss(), named)
    return {n: (g * named[n].detach()).abs() for n, g in gradients.items()}


def grasp_scores(model: nn.Module, names: Iterable[str], loss: Loss) -> Scores:
    """Score weights by what the norm of the gradient rests on them, ``w (H g)``.

    GraSP (Wang et al. 2020, arXiv:2002.07376, Sec. 4): a removal changes
    ``g g`` by ``-w (H g)``, to first order, and those that raise it most go. Scores may
    be negative. ``H g`` is exact, by a backward pass through a backward pass.

    Args:
        model: The model.
        names: Of the parameters that ``H`` and ``g`` are taken over.
        loss: The loss. The authors' code divides logits by 200 in it
            (``models.gradients.TEMPERATURE``).
    """
    # The fast kernels of attention have no second derivative.
    with undisturbed(model, names) as named, sdpa_kernel(SDPBackend.MATH):
        gradients = _loss_gradients(loss(), named, create_graph=True)
        half_norm = torch.stack([g.square().sum() for g in gradients.values()]).sum()
        products = gradients_of(half_norm / 2, named)
    return {name: named[name].detach() * hg for name, hg in products.items()}


def kept_of(pruned: Mapping[str, Tensor]) -> Kept:
    """Give what stays where what goes is given."""
    return {name: ~mask for name, mask in pruned.items()}


def gradients_of(
    value: Float[Tensor, ""],
    named: Mapping[str, nn.Parameter],
    *,
    create_graph: bool = False,
) -> Scores:
    """Differentiate a number by parameters; zeros where it does not depend on them.

    Raises:
        ModelError: If it depends on none.
    """
    if not value.requires_grad:
        raise ModelError(
            f"what is given depends on none of {len(named)} parameters, first "
            f"{next(iter(named))}. Compute it anew in each call, with a graph."
        )
    found = torch.autograd.grad(
        value,
        list(named.values()),
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(named, found, strict=True))


def _loss_gradients(
    loss: Tensor, named: Mapping[str, nn.Parameter], *, create_graph: bool = False
) -> Scores:
    """Give gradients of a loss, which has to depend on all of the parameters."""
    found = gradients_of(loss, named, create_graph=create_graph)
    for name, gradient in found.items():
        if not bool(gradient.any()):
            raise ModelError(
                f"the gradient of {name} is zero for every weight: the loss does not "
                "depend on it. Leave it out, or give another loss."
            )
    return found


@contextmanager
def undisturbed(
    model: nn.Module, names: Iterable[str]
) -> Iterator[dict[str, nn.Parameter]]:
    """Let only some parameters have gradients for a while; then all is as before."""
    named = named_parameters(model, names)
    with ExitStack() as undo, torch.enable_grad():
        for buffer in model.buffers():
            undo.callback(buffer.data.copy_, buffer.detach().clone())
        chosen = set(named.values())
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(parameter in chosen)
        yield named
