"""Penalties that empty whole rows, filters, channels or units while a model is trained.

A unit is one slice of some parameters: a filter of a convolution, the scale of a
channel in its batch norm, or what belongs to one hidden unit of an MLP: rows of the
layers that write it and a column of the one that reads it. Later the emptiest units are
cut, a count over all of them, and masks hold what they are made of at zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from autoprune.compression.masks import pruned_count
from autoprune.errors import ConfigError, ModelError
from autoprune.models.weights import parameter_of, read_weight
from autoprune.policy import Layer, digest
from autoprune.training.choosing import check_sparsity, prune_counts, prune_smallest
from autoprune.training.masks import named_parameters

Parts = Mapping[str, int] | Sequence[Layer]
"""What units are made of: parameters by name, each with the axis that counts units.

Or the layers of a structure, which know where their units lie.
"""

_TINY = 1e-30
"""Keeps the share of an empty unit a number."""


class GroupLasso:
    """Pulls whole units to zero: ``strength * sum over units of sqrt(n) ||w_unit||``.

    The group lasso of Yuan and Lin (2006, Eq. 2.1), ``n`` being the weights of a unit;
    for filters and channels of networks Wen et al. 2016 (arXiv:1608.03665, Sec. 3).
    With the scales of batch norms as units of one weight it is their L1 norm: network
    slimming (Liu et al. 2017, arXiv:1708.06519, Eq. 1).

    Not by a subgradient, as in the last two, but by a proximal step after each of the
    optimizer's, ``w <- max(0, 1 - rate * strength * sqrt(n) / ||w||) w`` with its
    learning rate (Parikh and Boyd 2014, Sec. 6.5): units become exactly zero, where a
    subgradient leaves them to jump about it. As AdamW's decay it stays out of momentum
    and of what scales the gradient.

    Args:
        model: The model.
        units: For each name of a group of like units, what they are made of.
        strength: From 0.

    Raises:
        ModelError: If the model lacks a parameter, or the parts of a group count
            different numbers of units.
        ConfigError: If the strength is out of its range.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> lasso = GroupLasso(model, {"rows": {"weight": 0}}, strength=0.5)
        >>> lasso.shrink(2.0)
        >>> model.weight.data[1].tolist()
        [0.0, 0.0]
    """

    def __init__(
        self, model: nn.Module, units: Mapping[str, Parts], strength: float
    ) -> None:
        if not (0 <= strength and isfinite(strength)):
            raise ConfigError(f"the strength of a penalty is 0 or more, not {strength}")
        self.model, self.units, self.strength = model, dict(units), strength
        for group, parts in self.units.items():
            counts = {one.name: len(one.lines()) for one in _parts(model, parts)}
            if len(set(counts.values())) != 1:
                raise ModelError(
                    f"the parts of {group} count different numbers of units: {counts}. "
                    "Give for each parameter the axis that counts them."
                )

    @property
    def identity(self) -> dict[str, str]:
        """All that a training's end depends on of it, but the model."""
        each = {
            group: [(one.name, one.axis) for one in _parts(self.model, parts)]
            for group, parts in self.units.items()
        }
        return {"penalty of units": digest([self.strength, each])}

    def sizes(self, *, mean: bool = False) -> dict[str, Float[Tensor, " units"]]:
        """Give the L2 norm of every unit, by group.

        Args:
            mean: True for the root of the mean square in the place of that of the sum,
                so that units of unequal size can be compared.
        """
        return {
            group: self._norms(parts) / (self._weight(parts) if mean else 1.0)
            for group, parts in self.units.items()
        }

    def value(self) -> float:
        """Give the penalty."""
        sums = [
            self._weight(parts) * float(self._norms(parts).sum())
            for parts in self.units.values()
        ]
        return self.strength * sum(sums)

    @torch.no_grad()
    def shrink(self, rate: float) -> None:
        """Take a proximal step of a length: a learning rate."""
        for parts in self.units.values():
            pull = rate * self.strength * self._weight(parts)
            left = (1 - pull / self._norms(parts).clamp_min(_TINY)).clamp_min(0.0)
            for part in _parts(self.model, parts):
                lines = part.lines()
                shaped = left.view(-1, *[1] * (lines.dim() - 1))
                lines.mul_(shaped).masked_fill_(shaped == 0, 0.0)  # no -0.0

    @contextmanager
    def held(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Shrink after every step of an optimizer, by its learning rate.

        Raises:
            ModelError: If it does not train the parameters of the units.
        """
        first = _parts(self.model, next(iter(self.units.values())))[0].name
        trained = self.model.get_parameter(first)
        groups = [
            group
            for group in optimizer.param_groups
            if any(parameter is trained for parameter in group["params"])
        ]
        if not groups:
            raise ModelError(
                f"the optimizer does not train {first}, which a penalty is to shrink"
            )

        def after(*_: Any) -> None:
            self.shrink(float(groups[0]["lr"]))

        handle = optimizer.register_step_post_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def _weight(self, parts: Parts) -> float:
        """Give the root of the number of weights in one unit."""
        lines = [part.lines() for part in _parts(self.model, parts)]
        return sqrt(sum(one.numel() // len(one) for one in lines))

    def _norms(self, parts: Parts) -> Float[Tensor, " units"]:
        lines = [part.lines() for part in _parts(self.model, parts)]
        squares = [one.square().flatten(1).sum(1) for one in lines]
        return torch.stack(squares).sum(0).sqrt()


@dataclass(frozen=True, eq=False)
class _Part:
    """A tensor that units are part of.

    Attributes:
        name: Of the parameter.
        values: The parameter, or the matrix of its layer.
        axis: Along which units lie.
        unit: Lines of that axis in one unit.
    """

    name: str
    values: Tensor
    axis: int
    unit: int = 1

    def lines(self) -> Shaped[Tensor, "units ..."]:
        """View the weights of each unit, to be read and written."""
        first = self.values.movedim(self.axis, 0)
        found: Tensor = first.unflatten(0, (-1, self.unit))
        return found


def _parts(model: nn.Module, parts: Parts) -> list[_Part]:
    """Find what units are made of."""
    if isinstance(parts, Mapping):
        named = named_parameters(model, parts)
        return [_Part(name, p.detach(), parts[name]) for name, p in named.items()]
    found = []
    for layer in parts:
        if layer.cut is None:
            raise ModelError(
                f"the layer {layer.name!r} has no units, such as channels or heads. "
                "Leave it out."
            )
        axis = 0 if layer.cut.axis == "rows" else 1
        matrix, name = read_weight(model, layer), parameter_of(layer.name)
        found.append(_Part(name, matrix, axis, layer.cut.unit))
    return found


def keep_units(
    sizes: Mapping[str, Float[Tensor, " units"]], share: float, *, least: int = 1
) -> dict[str, Bool[Tensor, " units"]]:
    """Cut the smallest units of all groups together, but never all of one.

    Network slimming's global threshold (arXiv:1708.06519, Sec. 3), as a count.

    Args:
        sizes: Of each unit, by group, such as those of ``GroupLasso.sizes``; to be
            compared over groups, so means where units are not equally large.
        share: Of all units to cut, in [0, 1].
        least: Units that each group keeps, its largest.

    Returns:
        True for a unit that stays; ``round(share * n)`` are cut, earlier first on ties.

    Raises:
        ConfigError: If so many cannot be cut.
    """
    check_sparsity(share)
    counts = {name: max(0, len(size) - least) for name, size in sizes.items()}
    total = sum(len(size) for size in sizes.values())
    if pruned_count(total, share) > sum(counts.values()):
        raise ConfigError(
            f"{pruned_count(total, share)} of {total} units cannot be cut: with "
            f"{least} left in each group only {sum(counts.values())} may go"
        )
    free = prune_counts(sizes, counts)
    open_to = {n: size.masked_fill(~free[n], torch.inf) for n, size in sizes.items()}
    return {name: ~cut for name, cut in prune_smallest(open_to, share).items()}


def masks_of_units(
    model: nn.Module,
    units: Mapping[str, Mapping[str, int]],
    kept: Mapping[str, Bool[Tensor, " units"]],
) -> dict[str, Bool[Tensor, "..."]]:
    """Spread kept units over what they are made of, for ``FrozenMasks``.

    Args:
        model: The model.
        units: All that goes with a unit. That of a channel is more than what was
            penalised: its filter, its scale and its shift in the batch norm, and the
            column of each layer that reads it.
        kept: True for a unit that stays, by group.

    Returns:
        By parameter, True where a weight stays: in no unit that is cut.
    """
    masks: dict[str, Tensor] = {}
    for group, parts in units.items():
        for name, parameter in named_parameters(model, parts).items():
            own = _along(kept[group], parts[name], parameter).expand(parameter.shape)
            masks[name] = own & masks[name] if name in masks else own.clone()
    return masks


def _along(values: Tensor, axis: int, like: Tensor) -> Tensor:
    """Shape one value a unit so that it spreads over a parameter."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.view(shape)
