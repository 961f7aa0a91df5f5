"""Which weights to remove: exact counts, with ties decided by position.

Ties are common (a bfloat16 weight has 8 significant bits), and a threshold alone then
removes too many or too few. Selection costs O(n): no full sort.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression.method import keep_of
from autoprune.compression.storage import Tile

SORT_FROM = 16
"""Size of N:M groups from which sorting beats comparing every pair (measured)."""


def pruned_count(count: int, sparsity: float) -> int:
    """Tell how many of ``count`` weights a sparsity removes: the nearest number.

    Example:
        >>> pruned_count(100, 0.29)
        29
    """
    return round(sparsity * count)


def smallest(
    scores: Float[Tensor, "rows columns"], count: int
) -> Bool[Tensor, "rows columns"]:
    """Mark the ``count`` smallest scores of each row, earlier columns first on ties.

    Each row competes only with itself, as in Wanda (arXiv:2306.11695, Sec. 3). Unlike
    thresholding, ties never push a row past the count.

    Example:
        >>> smallest(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 2)
        tensor([[False,  True,  True, False]])
    """
    if count == 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    limit = kth_smallest(scores, count)[:, None]
    marked = scores <= limit
    tied = (marked.sum(1) > count).nonzero()[:, 0]
    if len(tied):
        below, equal = scores[tied] < limit[tied], scores[tied] == limit[tied]
        room = count - below.sum(1, keepdim=True)
        marked[tied] = below | (equal & (equal.cumsum(1) <= room))
    return marked


def kth_smallest(
    scores: Float[Tensor, "rows columns"], count: int
) -> Float[Tensor, " rows"]:
    """Give the ``count``-th smallest score of each row, counted from 1.

    numpy selects with vector instructions: 8 to 14 times faster than
    ``torch.kthvalue`` on rows of 576 and on tiles of 200 thousand (measured).
    """
    parts = np.partition(scores.numpy(), count - 1, axis=1)
    return torch.from_numpy(parts[:, count - 1].copy())


def kept_by_sparsity(
    scores: Float[Tensor, "out in"], sparsity: float, *, per: str
) -> Bool[Tensor, "out in"]:
    """Mark the weights to keep when a fraction of a row or of the layer is removed.

    Args:
        scores: Importance of each weight; larger is kept.
        sparsity: Fraction to remove, in [0, 1].
        per: ``row``: the same count of every row; ``layer``: all weights compete.
    """
    compared = scores if per == "row" else scores.reshape(1, -1)
    count = pruned_count(compared.shape[1], sparsity)
    return ~smallest(compared, count).view(scores.shape)


def kept_by_tiles(
    scores: Float[Tensor, "rows columns"], sparsity: float, tile: Tile, *, per: str
) -> Bool[Tensor, "out in"]:
    """Mark the weights to keep when a fraction of all tiles is removed.

    Args:
        scores: Importance of each tile; larger is kept, earlier equals go first.
        sparsity: Fraction of the tiles to remove, in [0, 1].
        tile: Rows and columns of a tile.
        per: ``row``: the same count of every row of tiles; ``layer``: all compete.

    Example:
        >>> kept_by_tiles(torch.tensor([[3.0, 1.0]]), 0.5, (1, 2), per="row")
        tensor([[ True,  True, False, False]])
    """
    rows, columns = tile
    kept = kept_by_sparsity(scores, sparsity, per=per)[:, None, :, None]
    full = kept.expand(-1, rows, -1, columns)
    return full.reshape(scores.shape[0] * rows, scores.shape[1] * columns)


def in_tiles(
    weight: Float[Tensor, "out in"], tile: Tile
) -> Float[Tensor, "rows columns size"]:
    """Line up the weights of each tile, for whatever sums them to a score.

    In float64: sums of equal tiles are then equal, wherever the tiles lie, and ties are
    decided by position.

    Args:
        weight: Weights, or importance of each.
        tile: Rows and columns of a tile, which divide the matrix.

    Example:
        >>> in_tiles(torch.arange(8.0).view(2, 4), (2, 2)).int().tolist()
        [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    rows, columns = tile
    cut = weight.double().view(weight.shape[0] // rows, rows, -1, columns)
    return cut.transpose(1, 2).reshape(cut.shape[0], cut.shape[2], rows * columns)


def kept_by_pattern(
    scores: Float[Tensor, "out in"], pattern: str
) -> Bool[Tensor, "out in"]:
    """Mark the N largest scores of every M consecutive columns of a row.

    Args:
        scores: Importance of each weight; larger is kept.
        pattern: ``N:M``, with M dividing the columns.
    """
    keep, of = keep_of(pattern)
    grouped = scores.reshape(-1, of)
    if of >= SORT_FROM:
        return ~smallest(grouped, of - keep).view(scores.shape)
    kept = kept_of_group(grouped.t().contiguous(), keep)
    return kept.t().reshape(scores.shape)


def kept_of_group(
    scores: Float[Tensor, "of groups"], keep: int
) -> Bool[Tensor, "of groups"]:
    """Mark the ``keep`` largest scores of each column; earlier equals go first.

    Groups lie along the first axis, so that every operation runs over long rows.
    """
    of = scores.shape[0]
    if of >= SORT_FROM:
        return ~smallest(scores.t().contiguous(), of - keep).t()
    # The rank of a score: how many of its group go before it. Numbers start as if every
    # later one did, and each comparison corrects both of its sides.
    parts = scores.unbind(0)
    ranks = [
        torch.full_like(parts[0], of - 1 - at, dtype=torch.uint8) for at in range(of)
    ]
    for second in range(1, of):
        for first in range(second):
            goes_first = (parts[first] <= parts[second]).view(torch.uint8)
            ranks[first] -= goes_first
            ranks[second] += goes_first
    return torch.stack(ranks) >= of - keep
