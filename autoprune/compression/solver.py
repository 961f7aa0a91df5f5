"""Settings of SparseGPT and GPTQ made into sweeps, and sweeps into variants."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.checks import require_finite
from autoprune.compression.factor import Factor, factorise
from autoprune.compression.heap import give_back_free_memory
from autoprune.compression.method import Settings, Source
from autoprune.compression.preconditions import finite_hessian
from autoprune.compression.stack import Rule, Swept
from autoprune.compression.sweep import sweep
from autoprune.compression.variant import Variant
from autoprune.models.statistics import InputStatistics


def solve(
    sources: Sequence[Source],
    statistics: InputStatistics,
    settings: Sequence[Settings],
) -> list[list[Variant]]:
    """Prune, quantize or both, with errors made good by later columns.

    Settings of equal damping and order share one factorisation; those that also choose
    masks and groups in the same way share one sweep.

    Args:
        sources: Layers with equal ``input``, each with its variant so far.
        statistics: Of their common input, with its Hessian.
        settings: Name ``bits``, ``group``, ``symmetric`` and ``damping``; perhaps
            ``sparsity``, ``pattern`` and ``act_order``.

    Returns:
        For each layer, its variants in the order of ``settings``.

    Raises:
        MethodError: If weights or Hessian are not finite, or no damping helps.
    """
    hessian = finite_hessian(sources, statistics)
    weights = [_finite(source) for source in sources]
    by_type: dict[torch.dtype, list[int]] = {}
    for layer, source in enumerate(sources):
        dtype = getattr(torch, source.variant.storage.dtype)
        by_type.setdefault(dtype, []).append(layer)
    factors: dict[tuple[float, bool], Factor] = {}
    found: dict[tuple[int, int], Variant] = {}
    for (damping, act_order), at in _alike(settings):
        if (damping, act_order) not in factors:
            factors[damping, act_order] = factorise(
                hessian,
                damping=damping,
                act_order=act_order,
                names=[source.layer.name for source in sources],
            )
            # What factorising has left would count beside the sweep, which takes most.
            give_back_free_memory(after=hessian.nbytes)
        rules = [_rule(settings[index]) for index in at]
        for dtype, layers in by_type.items():
            swept = sweep(
                [weights[layer] for layer in layers],
                factors[damping, act_order],
                rules,
                kept=[sources[layer].variant.mask for layer in layers],
                dtype=dtype,
            )
            for layer, results in zip(layers, swept, strict=True):
                for index, rule in zip(at, rules, strict=True):
                    # Taken out, so that not all settings are in memory twice.
                    result = results.pop(0)
                    found[layer, index] = _variant(sources[layer], rule, result)
    return [
        [found[layer, index] for index in range(len(settings))]
        for layer in range(len(sources))
    ]


def _finite(source: Source) -> Float[Tensor, "out in"]:
    """Give the weight of a source in its own type: a sweep turns it to float32."""
    weight = source.variant.weight
    require_finite(weight, "weight", source.layer.name)
    return weight


def _alike(
    settings: Sequence[Settings],
) -> list[tuple[tuple[float, bool], list[int]]]:
    """Group the indices of settings that can share a sweep."""
    groups: dict[tuple[float, bool, tuple[object, ...]], list[int]] = {}
    for index, one in enumerate(settings):
        key = one["damping"], one.get("act_order", False), _rule(one).kind
        groups.setdefault(key, []).append(index)
    return [(key[:2], at) for key, at in groups.items()]


def _rule(settings: Settings) -> Rule:
    return Rule(
        sparsity=settings.get("sparsity"),
        pattern=settings.get("pattern"),
        bits=settings["bits"],
        group=settings["group"],
        symmetric=settings["symmetric"],
    )


def _variant(source: Source, rule: Rule, swept: Swept) -> Variant:
    variant = source.variant
    if rule.sparsity is not None or rule.pattern is not None:
        assert swept.kept is not None
        weight = variant.weight if swept.weight is None else swept.weight
        variant = variant.pruned(weight, swept.kept, pattern=rule.pattern)
    if swept.codes is None:
        return variant
    assert rule.bits is not None and swept.scales is not None
    return variant.quantized(
        swept.codes, swept.scales, swept.zeros, bits=rule.bits, group=rule.group
    )
