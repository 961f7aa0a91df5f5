"""The second-order KL of variants at the dense model, from its gradients.

One backward pass prices all variants together; at the dense model the KL has no first
order, and the Gauss-Newton matrix is the Fisher matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.bank import VariantBank
from autoprune.compression.memory import memory_bytes
from autoprune.evaluation.slopes import LayerSlopes, measure_slopes
from autoprune.evaluation.teacher import Teacher
from autoprune.policy import Action, Layer

Wanted = Mapping[Layer, Sequence[Action]]
"""For each layer the actions whose cost is asked for."""


def score_rows(
    bank: VariantBank,
    teacher: Teacher,
    wanted: Wanted,
    windows: Sequence[int],
    *,
    draws: int = 1,
    seed: int = 0,
) -> dict[Layer, Float[np.ndarray, "rows actions"]]:
    """Tell how each variant moves the dense model's log-likelihood of its own words.

    Rows are windows with labels that the dense model draws, so half the mean square of
    a column is the second-order KL of its variant, and half the mean square of a sum of
    columns is that of several variants together: the Fisher matrix of the dense model,
    seen along the changes that a bank offers, its mixed terms included.

    Args:
        bank: Whose variants; missing ones are made.
        teacher: The dense model on a split.
        wanted: Layers with their actions.
        windows: Indices of the windows of the split.
        draws: How often labels are drawn for every window.
        seed: Of the labels. Rows of two calls with equal windows, draws and seed belong
            together, column by column.

    Raises:
        MethodError: If a step refuses a layer.
        StoreError: If variants cannot be written or read.
    """
    measure = partial(measure_slopes, draws=draws, seed=seed)
    found = _priced(bank, teacher, wanted, windows, measure)
    empty = np.empty((len(windows) * draws, 0), dtype=np.float32)
    return {
        layer: torch.cat([p.score for p in parts], 1).numpy() if parts else empty
        for layer, parts in found.items()
    }


def output_squares(
    bank: VariantBank,
    teacher: Teacher,
    wanted: Wanted,
    windows: Sequence[int],
    *,
    draws: int = 1,
    seed: int = 0,
) -> dict[Layer, Float[np.ndarray, " actions"]]:
    """Tell the second-order KL of each variant, by the diagonal in a layer's outputs.

    That is half the mean over positions of the sum of ``(g_to (dW x_t)_o)²``, with
    ``g`` the gradient of the log-likelihood of words that the dense model draws by what
    the layer gives. What changes of different numbers do to each other is left out, so
    it is biased; but every number of every position tells of it, so it is far less
    noisy than ``score_rows`` on as much text.

    The score of AutoQuantize in NVIDIA's Model Optimizer
    (``modelopt.torch.quantization.algorithms.AutoQuantizeGradientSearcher``: the Fisher
    information of a layer's output in the place of the Hessian) but for the labels,
    which are those of the text there.

    Args:
        bank: Whose variants; missing ones are made.
        teacher: The dense model on a split.
        wanted: Layers with their actions.
        windows: Indices of the windows of the split.
        draws: How often labels are drawn for every window.
        seed: Of the labels.

    Raises:
        MethodError: If a step refuses a layer.
        StoreError: If variants cannot be written or read.
    """
    measure = partial(measure_slopes, draws=draws, seed=seed, apart=True)
    found = _priced(bank, teacher, wanted, windows, measure)
    return {
        layer: torch.cat([p.apart for p in parts]).double().numpy()
        if parts
        else np.empty(0)
        for layer, parts in found.items()
    }


@contextmanager
def made_dense(bank: VariantBank) -> Iterator[None]:
    """Make a bank's model dense for a while, then put back what the bank had on it."""
    bank.stitched.claim(bank.name)
    before = dict(bank.stitched.actions)
    bank.stitched.restore()
    try:
        yield
    finally:
        bank.put(before)


def _priced(
    bank: VariantBank,
    teacher: Teacher,
    wanted: Wanted,
    windows: Sequence[int],
    measure: Callable[..., Mapping[Layer, LayerSlopes]],
) -> dict[Layer, list[LayerSlopes]]:
    """Price variants at the dense model, as many at a time as fit into memory."""
    pairs = [(layer, action) for layer, acts in wanted.items() for action in acts]
    bank.make(pairs)
    found: dict[Layer, list[LayerSlopes]] = {layer: [] for layer in wanted}
    with made_dense(bank):
        for part in _parts_that_fit(pairs, memory_bytes()):
            variants: dict[Layer, list[Tensor]] = {}
            for layer, action in part:
                variants.setdefault(layer, []).append(bank.weight(layer, action))
            priced = measure(bank.stitched.model, teacher, variants, windows)
            for layer, own in priced.items():
                found[layer].append(own)
    return found


def _parts_that_fit(
    pairs: Sequence[tuple[Layer, Action]], cap_bytes: int
) -> Iterator[list[tuple[Layer, Action]]]:
    """Cut pairs where their weights, four bytes each at most, would pass the cap."""
    part: list[tuple[Layer, Action]] = []
    held = 0
    for layer, action in pairs:
        size = 4 * layer.numel
        if part and held + size > cap_bytes:
            yield part
            part, held = [], 0
        part.append((layer, action))
        held += size
    if part:
        yield part
