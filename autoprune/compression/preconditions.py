"""What built-in methods ask for and refuse: their common parameters and checks."""

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.checks import require_finite
from autoprune.compression.masks import (
    kept_by_pattern,
    kept_by_sparsity,
    kept_by_tiles,
    pruned_count,
)
from autoprune.compression.method import Parameter, Settings, Source, keep_of
from autoprune.compression.storage import BITMAP, Storage
from autoprune.compression.tiles import refuse_tiles, tile_of
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer

log = logging.getLogger(__name__)

SPARSITY = Parameter(
    "sparsity",
    float,
    None,
    "Fraction of the weights to remove.",
    0,
    1,
    open_range=True,
    example=0.5,
)
PATTERN = Parameter(
    "pattern",
    str,
    None,
    "N:M, N kept of every M weights of a row.",
    pattern=True,
    example="2:4",
)
BITS = Parameter("bits", int, None, "Bits of a code.", 2, 8, required=True, example=4)
GROUP = Parameter(
    "group",
    int,
    None,
    "Weights of a row that share a scale; a row if none.",
    2,
    65536,
    example=64,
)
SYMMETRIC = Parameter("symmetric", bool, False, "No zero points are stored.")
DAMPING = Parameter(
    "damping",
    float,
    0.01,
    "Added to the Hessian, as a part of its mean diagonal.",
    0,
    1,
)

LOW_RANK_IS_LAST = (
    "it already has low-rank factors: they are the last step, put this one before"
)


def check_sparsity_or_pattern(method: str, settings: Settings) -> Settings:
    """Return the settings if they name exactly one of ``sparsity`` and ``pattern``.

    Raises:
        MethodError: If they name both or none.
    """
    sparsity, pattern = settings["sparsity"], settings["pattern"]
    if (sparsity is None) == (pattern is None):
        found = "neither" if pattern is None else f"{sparsity} and {pattern}"
        raise MethodError(
            f"{method} takes either sparsity or pattern, found {found}. Write "
            f"{method}(sparsity=0.5) or {method}(pattern=2:4)."
        )
    return settings


def refuse_pruning(layer: Layer, previous: Storage, settings: Settings) -> str | None:
    """Say why a layer cannot be pruned, or None if it can."""
    if previous.low_rank is not None:
        return LOW_RANK_IS_LAST
    if previous.bits is not None:
        return f"already quantized to {previous.bits} bits: prune before quantizing"
    if previous.mask is not None:
        return (
            f"already pruned ({previous.mask}, {previous.sparsity:.0%} zeros): "
            "prune once, as far as wanted"
        )
    if settings["pattern"] is None:
        return refuse_tiles(layer, settings)
    _, of = keep_of(settings["pattern"])
    columns = layer.shape[1]
    if columns < of:
        return f"its {columns} inputs are fewer than the {of} of {settings['pattern']}"
    if columns % of:
        return f"{of} of {settings['pattern']} does not divide its {columns} inputs"
    return None


def refuse_quantization(
    layer: Layer, previous: Storage, settings: Settings
) -> str | None:
    """Say why a layer cannot be quantized, or None if it can."""
    if previous.low_rank is not None:
        return LOW_RANK_IS_LAST
    if previous.bits is not None:
        return f"already quantized to {previous.bits} bits: quantize once"
    if previous.kept == 0 and previous.low_rank is None:
        return (
            "nothing is left to quantize, every weight is removed: leave this step out"
        )
    group, columns = settings["group"], layer.shape[1]
    if group is not None and columns % group:
        return f"group {group} does not divide its {columns} inputs"
    return None


def refuse_without_input(layer: Layer) -> str | None:
    """Say why a method that needs statistics cannot treat a layer, or None."""
    if layer.input is None:
        return "it has no inputs to take statistics of: use magnitude or rtn"
    return None


def pruned_storage(previous: Storage, settings: Settings) -> Storage:
    """Declare what is stored after pruning by ``sparsity`` or ``pattern``.

    ``per=row`` counts in every row, or row of tiles; anything else in the whole layer.
    """
    if settings["pattern"] is not None:
        keep, of = keep_of(settings["pattern"])
        kept, permuted = previous.numel // of * keep, bool(settings.get("permute"))
        return previous.masked(kept, settings["pattern"], permuted=permuted)
    high, wide = tile_of(previous.shape, settings)
    rows, columns = previous.shape[0] // high, previous.shape[1] // wide
    if settings.get("per") == "row":
        removed = rows * pruned_count(columns, settings["sparsity"])
    else:
        removed = pruned_count(rows * columns, settings["sparsity"])
    mask = f"{high}x{wide}" if settings.get("tile") else BITMAP
    return previous.masked(previous.numel - removed * high * wide, mask)


def pruned_variant(
    source: Source, scores: Float[Tensor, "rows columns"], settings: Settings
) -> Variant:
    """Remove what has the smallest scores, as ``pruned_storage`` declares it.

    Args:
        source: The layer; what is kept of it stays as it is.
        scores: Importance of each weight, or of each tile where ``settings`` name one.
        settings: ``sparsity`` or ``pattern``, ``per`` and perhaps ``tile``.
    """
    variant, pattern = source.variant, settings["pattern"]
    if pattern is not None:
        kept = kept_by_pattern(scores, pattern)
    elif settings.get("tile"):
        high, wide = tile_of(variant.storage.shape, settings)
        pattern, sparsity = f"{high}x{wide}", settings["sparsity"]
        kept = kept_by_tiles(scores, sparsity, (high, wide), per=settings["per"])
    else:
        kept = kept_by_sparsity(scores, settings["sparsity"], per=settings["per"])
    return variant.pruned(variant.weight, kept, pattern=pattern)


def quantized_storage(previous: Storage, settings: Settings) -> Storage:
    """Declare what is stored after quantization by ``bits`` and ``group``."""
    return previous.quantized(
        settings["bits"], settings["group"], settings["symmetric"]
    )


def finite_weight(source: Source) -> Float[Tensor, "out in"]:
    """Give the weight of a source in float32.

    Raises:
        MethodError: If it holds NaN or infinity; names the layer.
    """
    weight = source.variant.weight.float()
    require_finite(weight, "weight", source.layer.name)
    return weight


def finite_hessian(
    sources: Sequence[Source], statistics: InputStatistics
) -> Float[Tensor, "in in"]:
    """Give the Hessian of the common input.

    Raises:
        MethodError: If it is missing, has another size or holds NaN or infinity, or if
            all inputs were zero.
    """
    found = _checked(statistics.hessian, "Hessian", sources)
    if not found.diagonal().any():
        names = ", ".join(source.layer.name for source in sources)
        raise MethodError(
            f"the inputs of {names} were zero for every token (of {statistics.tokens})."
            " Gather statistics from more text, or use magnitude or rtn here."
        )
    return found


def finite_input_norm(
    sources: Sequence[Source], statistics: InputStatistics
) -> Float[Tensor, " in"]:
    """Give the L2 norm of each input over all tokens.

    Inputs that were all zero count alike, as those of an expert that no token reached:
    weights are then compared by their size, not by their place.

    Raises:
        MethodError: If it is missing, has another size or holds NaN or infinity.
    """
    found = _checked(statistics.square_sum, "sum of squares", sources)
    if not found.any():
        names = ", ".join(source.layer.name for source in sources)
        log.warning(
            "the inputs of %s were zero for every token: all count alike", names
        )
        return torch.ones_like(found)
    return found.sqrt()


def finite_input_abs_mean(
    sources: Sequence[Source], statistics: InputStatistics
) -> Float[Tensor, " in"]:
    """Give the mean size of each input over all tokens.

    Raises:
        MethodError: If it is missing, has another size or holds NaN or infinity.
    """
    total = _checked(statistics.abs_sum, "sum of sizes", sources)
    return total / max(statistics.tokens, 1)


def finite_input_max(
    sources: Sequence[Source], statistics: InputStatistics
) -> Float[Tensor, " in"]:
    """Give the largest size of each input over all tokens.

    Raises:
        MethodError: If it is missing, has another size or holds NaN or infinity.
    """
    return _checked(statistics.abs_max, "largest size", sources)


def finite_input_mean(
    sources: Sequence[Source], statistics: InputStatistics
) -> Float[Tensor, " in"]:
    """Give the mean of each input over all tokens.

    Raises:
        MethodError: If it is missing, has another size or holds NaN or infinity.
    """
    total = _checked(statistics.input_sum, "sum", sources)
    return total / max(statistics.tokens, 1)


def finite_input_rows(
    sources: Sequence[Source], statistics: InputStatistics
) -> Float[Tensor, "rows in"]:
    """Give what some tokens gave each input; one token of zeros where none came.

    Raises:
        MethodError: If it is missing, has another size or holds NaN or infinity.
    """
    found = statistics.input_rows
    if found is not None and not len(found):
        found = found.new_zeros(1, found.shape[1])
    return _checked(found, "sample of tokens", sources)


def _checked(found: Tensor | None, what: str, sources: Sequence[Source]) -> Tensor:
    names = ", ".join(source.layer.name for source in sources)
    columns = sources[0].layer.shape[1]
    if found is None:
        raise MethodError(f"the {what} of the inputs of {names} was not gathered")
    if found.shape[-1] != columns:
        raise MethodError(
            f"the {what} has {found.shape[-1]} inputs, but {names} has {columns}"
        )
    require_finite(found, f"{what} of the inputs", names)
    return found
