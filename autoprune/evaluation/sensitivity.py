"""What a layer's variants cost by themselves, without gradients.

``output_errors`` needs no evaluation, ``replacement_costs`` one each.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.bank import VariantBank
from autoprune.evaluation.fisher import Wanted, made_dense
from autoprune.evaluation.teacher import Teacher
from autoprune.models.biases import bias_of
from autoprune.models.blocks import BlockRunner
from autoprune.models.prefix import Prefix
from autoprune.models.statistics import (
    NO_STATISTICS,
    Gathering,
    InputStatistics,
    exact_products,
)
from autoprune.policy import DENSE, Action, Layer

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


def output_errors(
    bank: VariantBank, wanted: Wanted, progress: Progress | None = None
) -> dict[Layer, Float[np.ndarray, " actions"]]:
    """Tell how much each variant changes what its layer gives, relative to all of it.

    That is ``tr(D H Dᵀ) / tr(W H Wᵀ)`` with ``D = W_variant - W`` and ``H`` the Hessian
    of the layer's inputs in the bank: the layer-wise error that SparseGPT and GPTQ
    minimise (arXiv:2301.00774, Eq. 1), over the output's own power; a bias that the
    variant brings is part of what it gives. Where a layer has
    no inputs to speak of (an embedding, an expert that no token reaches) it is the
    relative error of the weight. Layers stored in bfloat16 are multiplied in bfloat16
    units.

    Args:
        bank: Whose variants and whose inputs; missing variants are made.
        wanted: Layers with their actions.
        progress: Called with the blocks done and the blocks to do.

    Raises:
        MethodError: If a step refuses a layer.
        StoreError: If variants cannot be written or read.
    """
    pairs = [(layer, action) for layer, acts in wanted.items() for action in acts]
    bank.make([*pairs, *bank.reference.items()])
    found = {
        layer: _relative_errors(bank, layer, actions, NO_STATISTICS)
        for layer, actions in wanted.items()
        if layer.input is None or layer.block is None
    }
    blocks = {la.block for la in wanted if la not in found and la.block is not None}
    tell = progress or (lambda done, total: None)
    with made_dense(bank):
        # As the bank itself passes over the blocks, so that the inputs are the same.
        bank.put({la: a for la, a in bank.reference.items() if la.block is None})
        model, ids = bank.stitched.model, bank.tokens.ids
        runner = BlockRunner(model, bank.inventory, ids, batch=bank.batch)
        hidden = runner.start()
        for block in range(max(blocks, default=-1) + 1):
            tell(block, max(blocks) + 1)
            here = [la for la in wanted if la.block == block and la not in found]
            widths = {str(layer.input): layer.shape[1] for layer in here}
            needs = {"hessian", "input_sum"}
            sums = {name: Gathering(needs, n) for name, n in widths.items()}
            add = partial(_add, sums)
            after = runner.collect(block, hidden, add, inputs=sums)
            for layer in here:
                read = sums[str(layer.input)].result()
                found[layer] = _relative_errors(bank, layer, wanted[layer], read)
            reference = _reference_of(bank, block)
            for layer, action in reference.items():
                bank.stitched.write(layer, action, bank.weight(layer, action))
            hidden = runner.run(block, hidden) if reference else after
    return {layer: found[layer] for layer in wanted}


def replacement_costs(
    bank: VariantBank,
    teacher: Teacher,
    changes: Iterable[Mapping[Layer, Action]],
    windows: Sequence[int],
    *,
    base: Mapping[Layer, Action] | None = None,
) -> Iterator[float]:
    """Measure how much the KL grows when few layers change, one evaluation a change.

    Blocks before the first changed one are not run again.

    Args:
        bank: Whose variants; missing ones are made.
        teacher: The dense model on a split.
        changes: Actions of the layers that change, each time from the base.
        windows: Indices of the windows of the split.
        base: Action of every other layer; dense where it names none.

    Yields:
        KL with the change less KL of the base, change by change.

    Raises:
        MethodError: If a step refuses a layer.
        StoreError: If variants cannot be written or read.
    """
    start = dict.fromkeys(bank.stitched.layers, DENSE) | dict(base or {})
    prefix = Prefix(bank.inventory)
    prefix.move(start)

    def kl_of(actions: Mapping[Layer, Action]) -> float:
        bank.put(actions)
        unchanged = prefix.unchanged(actions)
        return teacher.measure(
            bank.stitched.model, windows, prefix=prefix, unchanged=unchanged
        ).mean_kl

    before = kl_of(start)
    for change in changes:
        yield kl_of({**start, **change}) - before


def _relative_errors(
    bank: VariantBank, layer: Layer, actions: Sequence[Action], read: InputStatistics
) -> Float[np.ndarray, " actions"]:
    weight, hessian = bank.stitched.dense_weight(layer), read.hessian
    with exact_products(weight):
        power = _power(weight.float(), hessian)
        if hessian is not None and power <= 0:  # no token came this way
            hessian = None
            power = _power(weight.float(), None)
        errors = []
        for action in actions:
            given = bank.weight(layer, action)
            change = given.float() - weight.float()
            lost = _power(change, hessian)
            bias = bias_of(given)
            if bias is not None and hessian is not None and read.input_sum is not None:
                # Over all tokens, |D x + b|² = |D x|² + 2 b · D x + |b|².
                drift = 2 * change @ read.input_sum + read.tokens * bias.float()
                lost += float(bias.double() @ drift.double())
            errors.append(lost / power if power else 0.0)
    return np.array(errors)


def _power(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"] | None
) -> float:
    product = weight if hessian is None else weight @ hessian
    return float((product * weight).sum(dtype=torch.float64))


def _reference_of(bank: VariantBank, block: int) -> dict[Layer, Action]:
    return {
        layer: action
        for layer, action in bank.reference.items()
        if layer.block == block and action.steps
    }


def _add(sums: Mapping[str, Gathering], name: str, inputs: Tensor) -> None:
    sums[name].add(inputs)
