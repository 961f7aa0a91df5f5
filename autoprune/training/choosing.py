"""Which weights of some parameters go: exact counts over one ranking or many."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.masks import kept_by_pattern, pruned_count, smallest
from autoprune.compression.storage import BITMAP, Storage
from autoprune.errors import ConfigError, MethodError, unknown_name
from autoprune.policy import Layer

SCOPES = ("model", "parameter")
"""Weights that compete: those of all named parameters, or those of each by itself."""

UNITS = "units"
"""Pattern of zeros that go with a channel, head or filter as a whole."""


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
    flat = torch.cat([_flat(name, score) for name, score in scores.items()])
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
        name: smallest(_flat(name, score)[None], counts[name])
        .view(score.shape)
        .to(score.device)
        for name, score in scores.items()
    }


@dataclass(frozen=True, slots=True)
class Goal:
    """How a matrix is to be pruned at the end.

    Attributes:
        pruned: So many weights go, or units.
        pattern: ``N:M`` if weights go in groups of M columns, ``units``, or None if
            from anywhere.
    """

    pruned: int
    pattern: str | None = None

    @classmethod
    def of(cls, layer: Layer, storage: Storage) -> "Goal | None":
        """Read it from what a layer is to store; None if only a method can prune so.

        That is to tiles, in permuted columns, or with more stored than weights and
        mask.
        """
        more = storage.hidden, storage.bits, storage.low_rank
        if more != (None, None, None) or storage.permuted or storage.bias:
            return None
        if storage.units is not None:
            cut = layer.cut  # not that of a residual stream
            if not cut or storage.kept * cut.units != layer.numel * storage.units:
                return None
            return cls(cut.units - storage.units, UNITS)
        if storage.mask == BITMAP:
            return cls(storage.numel - storage.kept)
        if storage.mask is not None and ":" in storage.mask:
            return cls(storage.numel - storage.kept, storage.mask)
        return None


def prune_towards(
    scores: Float[Tensor, "out ..."], goal: Goal, share: float = 1.0
) -> Bool[Tensor, "out ..."]:
    """Mark the smallest scores on the way to a goal: ``round(share * pruned)`` of them.

    Of an ``N:M`` pattern only those are marked that may go at its end.

    Example:
        >>> prune_towards(torch.tensor([[1.0, 2.0, 8.0, 9.0]]), Goal(2, "1:2")).tolist()
        [[True, False, True, False]]
    """
    flat = _flat("a parameter", scores).view(len(scores), -1)
    if goal.pattern is not None:
        flat = flat.masked_fill(kept_by_pattern(flat, goal.pattern), math.inf)
    count = pruned_count(goal.pruned, share)
    return smallest(flat.view(1, -1), count).view(scores.shape).to(scores.device)


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


def _flat(name: str, score: Tensor) -> Float[Tensor, " weights"]:
    """Lay scores out in a row, where and as numpy can rank them."""
    score = score.detach().flatten().cpu()
    if score.dtype not in (torch.float32, torch.float64):
        score = score.float()
    if bad := int(score.isnan().sum()):
        raise MethodError(
            f"{bad} of {score.numel()} scores of {name} are not numbers, so that they "
            "cannot be ranked. See what the model gives on this batch."
        )
    return score
