"""Which weights of some parameters go: exact counts over one ranking or many."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.masks import pruned_count, smallest
from autoprune.errors import ConfigError, MethodError, unknown_name

SCOPES = ("model", "parameter")
"""Weights that compete: those of all named parameters, or those of each by itself."""


def prune_smallest(
    scores: Mapping[str, Float[Tensor, "..."]], sparsity: float, *, per: str = "model"
) -> dict[str, Bool[Tensor, "..."]]:
    """Mark the weights with the smallest scores.

    Args:
        scores: Importance of each weight, by parameter; larger is kept.
        sparsity: Share to mark, in [0, 1].
        per: One of ``SCOPES``.

    Returns:
        True for a marked weight: ``round(sparsity * n)`` of the ``n`` in each scope;
        on ties those of earlier parameters, then at earlier places.

    Raises:
        ConfigError: If the sparsity is out of its range or there is no such scope.
        MethodError: If a score is not a number.

    Example:
        >>> scores = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([[1.0], [3.0]])}
        >>> prune_smallest(scores, 0.25)["a"].tolist()
        [True, False]
    """
    check_sparsity(sparsity)
    if per not in SCOPES:
        raise ConfigError(unknown_name("scope", per, SCOPES))
    sizes = {name: score.numel() for name, score in scores.items()}
    if per == "parameter":
        counts = {name: pruned_count(size, sparsity) for name, size in sizes.items()}
        return prune_counts(scores, counts)
    count = pruned_count(sum(sizes.values()), sparsity)
    flat = torch.cat([flat_scores(name, score) for name, score in scores.items()])
    marked = smallest(flat[None], count)[0].split(list(sizes.values()))
    return {
        name: part.view(score.shape).to(score.device)
        for (name, score), part in zip(scores.items(), marked, strict=True)
    }


def prune_counts(
    scores: Mapping[str, Float[Tensor, "..."]], counts: Mapping[str, int]
) -> dict[str, Bool[Tensor, "..."]]:
    """Mark so many of the smallest scores of each parameter, earlier first on ties."""
    return {
        name: smallest(flat_scores(name, score)[None], counts[name])
        .view(score.shape)
        .to(score.device)
        for name, score in scores.items()
    }


def erk_counts(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, int]:
    """Tell how many weights of each parameter go, small ones being left denser.

    Erdős-Rényi-Kernel (Evci et al. 2020, arXiv:1911.11134, Sec. 3): the share that
    stays goes with the sum of a parameter's dimensions over their product. What would
    be more than all stays whole, and the others give for it. Rounding goes to the
    largest remainders, so that the sum is exactly ``round(sparsity * n)``.

    Args:
        shapes: Of the parameters.
        sparsity: Share of all weights to go, in [0, 1].

    Example:
        >>> erk_counts({"small": (4, 4), "large": (40, 40)}, 0.9)
        {'small': 1, 'large': 1453}
    """
    check_sparsity(sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = pruned_count(sum(sizes.values()), sparsity)
    whole: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in whole]
        room = sum(sizes[name] for name in rest) - total  # what stays of the rest
        sums = sum(sum(shapes[name]) for name in rest)
        kept = {name: room * sum(shapes[name]) / sums for name in rest}
        full = {name for name in rest if kept[name] > sizes[name]}
        if not full:
            break
        whole |= full
    wanted = {name: sizes[name] - kept.get(name, sizes[name]) for name in shapes}
    counts = {name: math.floor(number) for name, number in wanted.items()}
    by_rest = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    for name in by_rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def check_sparsity(sparsity: float) -> None:
    """See that a sparsity is a share.

    Raises:
        ConfigError: If not.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ConfigError(f"a sparsity is a share in [0, 1], found {sparsity}")


def flat_scores(name: str, score: Tensor) -> Float[Tensor, " weights"]:
    """Lay scores out in a row, where and as numpy can rank them.

    Raises:
        MethodError: If a score is not a number; names whose it is.
    """
    score = score.detach().flatten().cpu()
    if score.dtype not in (torch.float32, torch.float64):
        score = score.float()
    if bad := int(score.isnan().sum()):
        raise MethodError(
            f"{bad} of {score.numel()} scores of {name} are not numbers, so that they "
            "cannot be ranked. See what the model gives on this batch."
        )
    return score
