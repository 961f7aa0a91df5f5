"""Numbers that a method may compute with."""

import torch
from torch import Tensor

from autoprune.errors import MethodError


def require_finite(numbers: Tensor, what: str, where: str) -> None:
    """Check that there is no NaN and no infinity among some numbers.

    Args:
        numbers: At least one.
        what: What they are.
        where: Of which layers.

    Raises:
        MethodError: If there is; names what it is, where, and how many.
    """
    # Both ends are cheaper to find than a mask of all numbers, and NaN reaches both.
    low, high = numbers.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        count = int((~torch.isfinite(numbers)).sum())
        raise MethodError(
            f"the {what} of {where} holds NaN or infinity in {count} of "
            f"{numbers.numel()} places. Check the checkpoint and the statistics."
        )
