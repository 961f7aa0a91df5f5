"""The factor of a Hessian that an error-compensated sweep reads.

SparseGPT and GPTQ take the upper Cholesky factor ``U`` of the inverse, ``H⁻¹ = Uᵀ U``,
by factorising, inverting and factorising again. The inverse of ``U`` is the Cholesky
factor of ``H`` with both axes reversed, so one factorisation and one inversion of a
triangle give the same in less than half of the time, and with less rounding.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from autoprune.errors import MethodError

DAMPING_LIMIT = 1.0
"""Most that is ever added to the diagonal, as a fraction of its mean."""

INVERSE_LEAF = 96
"""Size from which a triangle is inverted by halves (measured)."""

REVERSED_AT_ONCE = 2**18
"""Numbers that are copied when a matrix is turned round in place: they fit a cache."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Factor:
    """What a sweep needs of a damped Hessian; columns in the order of the sweep.

    Attributes:
        feedback: ``-U[i, j] / U[i, i]`` at ``[j, i]``: how column ``j`` makes good an
            error of 1 in the earlier column ``i``. Lower triangular.
        cost: ``1 / U[j, j]²``: the loss that an error of 1 in column ``j`` leaves after
            all later columns have made good what they can.
        dead: Columns whose input was always zero.
        order: The layer's column at each position of the sweep; None if unchanged.
    """

    feedback: Float[Tensor, "in in"]
    cost: Float[Tensor, " in"]
    dead: Bool[Tensor, " in"]
    order: Int[Tensor, " in"] | None = None


def factorise(
    hessian: Float[Tensor, "in in"],
    *,
    damping: float,
    act_order: bool,
    names: Sequence[str],
) -> Factor:
    """Damp a Hessian and factorise it.

    A Hessian that is not positive definite in float32 is tried in float64, then with
    ten times the damping, up to the mean of its diagonal.

    Args:
        hessian: ``Xᵀ X``; never written to.
        damping: Added to the diagonal, as a fraction of its mean.
        act_order: True to sweep columns in falling order of the diagonal.
        names: Layers that share the input, for messages.

    Raises:
        MethodError: If all inputs were zero, or no damping helps; names the layers.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        raise MethodError(
            f"the inputs of {', '.join(names)} were zero for every token (the mean "
            f"diagonal of the Hessian is {mean:g}). Gather statistics from more text, "
            "or use a method without statistics here: magnitude, rtn."
        )
    dead = diagonal == 0
    order = None
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
        hessian, dead = hessian[order][:, order], dead[order]
    tried = damping
    while (found := _reversed_cholesky(hessian, dead, tried * mean)) is None:
        if tried >= DAMPING_LIMIT:
            raise MethodError(
                f"the Hessian of {', '.join(names)} is not positive definite, even "
                f"with damping {tried:g} (asked: {damping:g}). Its statistics are "
                "unusable: gather them again, in float32 and from more tokens."
            )
        tried = min(DAMPING_LIMIT, max(tried * 10, 0.01))
    if tried > damping:
        log.warning(
            "damping raised from %g to %g: the Hessian of %s is not positive definite",
            damping,
            tried,
            ", ".join(names),
        )
    # A Hessian may take more than a block's weights: all of this is done in place.
    pivots = found.diagonal().clone()
    _invert(found)
    feedback = found.mul_(pivots[:, None]).neg_().t()
    _reverse(feedback.view(-1))  # both axes
    return Factor(feedback.float(), pivots.flip(0).square().float(), dead, order)


def _reversed_cholesky(
    hessian: Float[Tensor, "in in"], dead: Bool[Tensor, " in"], added: float
) -> Float[Tensor, "in in"] | None:
    """Factorise the Hessian with both axes reversed; None if not positive definite."""
    for dtype in (torch.float32, torch.float64):
        flipped = hessian.flip(0, 1).to(dtype).t()  # by columns, as LAPACK wants it
        diagonal = flipped.diagonal()
        # A dead column shares nothing with others: any positive pivot serves.
        diagonal.masked_fill_(dead.flip(0), float(diagonal.mean()))
        diagonal.add_(added)
        info = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(flipped, out=(flipped, info))
        if int(info) == 0 and bool(torch.isfinite(diagonal).all()):
            return flipped
    return None


def _reverse(numbers: Float[Tensor, " n"]) -> None:
    """Turn the order of a vector round in place, some numbers at a time."""
    half = len(numbers) // 2
    for start in range(0, half, REVERSED_AT_ONCE):
        stop = min(start + REVERSED_AT_ONCE, half)
        early = numbers[start:stop]
        late = numbers[len(numbers) - stop : len(numbers) - start]
        kept = early.flip(0)
        early.copy_(late.flip(0))
        late.copy_(kept)


def _invert(lower: Float[Tensor, "n n"]) -> None:
    """Invert a lower triangle in place, by halves: products instead of a full solve."""
    size = len(lower)
    if size <= INVERSE_LEAF:
        identity = torch.eye(size, dtype=lower.dtype)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, second = lower[:half, :half], lower[half:, half:]
    _invert(first)
    _invert(second)
    below = lower[half:, :half]
    torch.mm(second, below @ first, out=below).neg_()
