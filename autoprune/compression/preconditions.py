"""What built-in methods ask for and refuse: their common parameters and checks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression.masks import pruned_count
from autoprune.compression.method import Parameter, Settings, Source, keep_of
from autoprune.compression.storage import BITMAP, Storage
from autoprune.errors import MethodError
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer

SPARSITY = Parameter(
    "sparsity", float, None, "Fraction of the weights to remove.", 0, 1, open_range=True
)
PATTERN = Parameter(
    "pattern", str, None, "N:M, N kept of every M weights of a row.", pattern=True
)
BITS = Parameter("bits", int, None, "Bits of a code.", 2, 8, required=True)
GROUP = Parameter(
    "group", int, None, "Weights of a row that share a scale; a row if none.", 2, 65536
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
    if previous.bits is not None:
        return f"already quantized to {previous.bits} bits: prune before quantizing"
    if previous.mask is not None:
        return (
            f"already pruned ({previous.mask}, {previous.sparsity:.0%} zeros): "
            "prune once, as far as wanted"
        )
    if settings["pattern"] is None:
        return None
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
    if previous.bits is not None:
        return f"already quantized to {previous.bits} bits: quantize once"
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

    ``per=row`` counts in every row, anything else in the whole layer.
    """
    if settings["pattern"] is not None:
        keep, of = keep_of(settings["pattern"])
        return previous.masked(previous.numel // of * keep, settings["pattern"])
    rows, columns = previous.shape
    if settings.get("per") == "row":
        removed = rows * pruned_count(columns, settings["sparsity"])
    else:
        removed = pruned_count(previous.numel, settings["sparsity"])
    return previous.masked(previous.numel - removed, BITMAP)


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
    _require_finite(weight, "weight", source.layer.name)
    return weight


def finite_hessian(
    sources: Sequence[Source], statistics: InputStatistics
) -> Float[Tensor, "in in"]:
    """Give the Hessian of the common input.

    Raises:
        MethodError: If it is missing, has another size or holds NaN or infinity.
    """
    return _checked(statistics.hessian, "Hessian", sources)


def finite_input_norm(
    sources: Sequence[Source], statistics: InputStatistics
) -> Float[Tensor, " in"]:
    """Give the L2 norm of each input over all tokens.

    Raises:
        MethodError: If it is missing, has another size or holds NaN or infinity.
    """
    return _checked(statistics.square_sum, "sum of squares", sources).sqrt()


def _checked(found: Tensor | None, what: str, sources: Sequence[Source]) -> Tensor:
    names = ", ".join(source.layer.name for source in sources)
    columns = sources[0].layer.shape[1]
    if found is None:
        raise MethodError(f"the {what} of the inputs of {names} was not gathered")
    if found.shape[-1] != columns:
        raise MethodError(
            f"the {what} has {found.shape[-1]} inputs, but {names} has {columns}"
        )
    _require_finite(found, f"{what} of the inputs", names)
    return found


def _require_finite(numbers: Tensor, what: str, where: str) -> None:
    # Both ends are cheaper to find than a mask of all numbers, and NaN reaches both.
    low, high = numbers.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        count = int((~torch.isfinite(numbers)).sum())
        raise MethodError(
            f"the {what} of {where} holds NaN or infinity in {count} of "
            f"{numbers.numel()} places. Check the checkpoint and the statistics."
        )
