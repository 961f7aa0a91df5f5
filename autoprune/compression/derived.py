"""What follows from a layer's dense weight: made again, instead of stored.

A variant that only prunes has the dense weight's values wherever its mask is True, and
one that only rounds has the code that is nearest to the dense weight on its grid. Such
values and codes are not stored: mask, scales and zero points are the recipe, and what
they leave of the dense weight is compared with a checksum whenever it is made again.
Whether it is so is seen in the numbers, so no method has to declare it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from autoprune.compression.files import checksum
from autoprune.compression.formats import INTEGERS
from autoprune.compression.grids import nearest_codes
from autoprune.compression.selection import as_integers
from autoprune.compression.variant import Variant

_NUMBERS = 2**20
"""Weights that are taken at a time: they stay in the cache."""


@dataclass(frozen=True, slots=True)
class Derived:
    """What was left out.

    Attributes:
        name: ``values`` or ``codes``.
        sha256: Its checksum.
    """

    name: str
    sha256: str


def derived_from(variant: Variant, dense: Tensor) -> Derived | None:
    """Tell what of a variant follows from its layer's dense weight; None if nothing.

    Args:
        variant: The variant.
        dense: The layer's dense weight, ``[out, in]``, in its own type.
    """
    storage = variant.storage
    full = variant.codes if variant.values is None else variant.values
    fits = tuple(dense.shape) == storage.shape and dense.dtype == getattr(
        torch, storage.dtype
    )
    if full is None or not fits or not _follows(variant, full, dense):
        return None
    name = "codes" if variant.values is None else "values"
    return Derived(name, checksum({name: full}))


def with_derived(variant: Variant, derived: Derived, dense: Tensor) -> Variant | None:
    """Complete a variant from a weight.

    Args:
        variant: As it was unpacked, without values and codes.
        derived: What was left out.
        dense: The layer's dense weight.

    Returns:
        The variant; None if it comes out differently.
    """
    rounded = derived.name == "codes"
    full = torch.cat([made for _, made in _rows(variant, rounded, dense)])
    if checksum({derived.name: full}) != derived.sha256:
        return None
    return replace(variant, codes=full) if rounded else replace(variant, values=full)


def _follows(variant: Variant, full: Tensor, dense: Tensor) -> bool:
    rounded = variant.values is None
    if rounded and (variant.storage.code != INTEGERS or variant.scales is None):
        return False  # a code book: to find the nearest takes longer than to read it
    return all(  # bit by bit: +0.0 and -0.0 are not the same
        np.array_equal(as_integers(made), as_integers(full[rows]))
        for rows, made in _rows(variant, rounded, dense)
    )


def _rows(
    variant: Variant, rounded: bool, dense: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Make values or codes from a dense weight, some rows at a time."""
    step = max(1, _NUMBERS // dense.shape[1])
    for start in range(0, dense.shape[0], step):
        rows = slice(start, start + step)
        made = _codes(variant, rows, dense[rows]) if rounded else dense[rows]
        if variant.mask is not None:
            # Numpy multiplies bits by ten times the speed of torch's ``where``.
            kept = as_integers(made) * variant.mask[rows].numpy()
            made = torch.from_numpy(kept).view(made.dtype)
        yield rows, made


def _codes(variant: Variant, rows: slice, dense: Tensor) -> Tensor:
    """Round rows of a dense weight to the nearest code of their group's grid."""
    bits = variant.storage.bits
    assert variant.scales is not None and bits is not None
    weight, scales = dense.float(), variant.scales[rows].float()
    if variant.channel_scales is not None:
        weight = weight * variant.channel_scales.float()
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if variant.zeros is not None:
        zeros = variant.zeros[rows].float()
    return nearest_codes(weight, scales, zeros, bits=bits)
