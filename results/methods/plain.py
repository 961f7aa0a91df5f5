"""SparseGPT as the paper describes it: one layer and one level at a time.

The rival in benchmarks and the oracle in tests. Written from the mathematics of
Frantar and Alistarh, "SparseGPT" (arXiv:2301.00774), Algorithm 1: damp the Hessian,
invert it through its Cholesky factor, factorise the inverse, then go through the
columns in blocks of 128. A block's mask is chosen by sorting its scores; each column's
error is spread over the later columns of the block at once, and over all columns after
the block when it ends.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def sparsegpt(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    *,
    sparsity: float = 0.0,
    keep: int = 0,
    of: int = 0,
    damping: float = 0.01,
    blocksize: int = 128,
) -> Float[Tensor, "out in"]:
    """Prune one layer.

    Args:
        weight: Of the layer; left untouched.
        hessian: ``Xᵀ X`` of its inputs; left untouched.
        sparsity: Fraction to remove of every block of columns, if ``of`` is 0.
        keep: Weights kept of every ``of`` consecutive ones of a row.
        of: Size of the groups of an N:M pattern; 0 for an unstructured mask.
        damping: Part of the mean diagonal that is added to the diagonal.
        blocksize: Columns whose mask is chosen at once.

    Returns:
        The pruned weight, in float32.
    """
    weight = weight.float().clone()
    columns = weight.shape[1]
    hessian = hessian.float().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    weight[:, dead] = 0.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)

    for first in range(0, columns, blocksize):
        last = min(first + blocksize, columns)
        block = weight[:, first:last].clone()
        factor = upper[first:last, first:last]
        errors = torch.zeros_like(block)
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if not of:
            scores = block**2 / factor.diagonal() ** 2
            # As many as bring the columns up to here to their share of the layer.
            count = round(sparsity * len(block) * last) - round(
                sparsity * len(block) * first
            )
            if count:
                limit = scores.flatten().sort().values[count - 1]
                pruned = scores <= limit
        for column in range(last - first):
            if of and (first + column) % of == 0:
                part = slice(column, column + of)
                scores = block[:, part] ** 2 / factor.diagonal()[part] ** 2
                smallest = scores.topk(of - keep, dim=1, largest=False).indices
                pruned.scatter_(1, column + smallest, True)
            current = block[:, column].clone()
            kept = torch.where(pruned[:, column], 0.0, current)
            error = (current - kept) / factor[column, column]
            block[:, column] = kept
            block[:, column + 1 :] -= torch.outer(error, factor[column, column + 1 :])
            errors[:, column] = error
        weight[:, first:last] = block
        weight[:, last:] -= errors @ upper[first:last, last:]
    return weight


def output_error(
    original: Float[Tensor, "out in"],
    changed: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
) -> float:
    """Give the squared error of a layer's outputs, ``tr(D H Dᵀ)``, over all tokens."""
    difference = (original - changed).double()
    return float(((difference @ hessian.double()) * difference).sum())
