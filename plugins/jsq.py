"""JSQ: zeros that keep the range of outputs small, then smoothing and 8 bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.masks import kth_smallest
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.rounding import round_to_grid, smoothing
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value

WINDOW = 2048
"""Tokens over which the paper takes a norm: what its rho is weighed against."""

EXTREMES = 16
"""Tokens looked at for each end of an output's range: one weight less seldom makes
another token the largest or the smallest."""


class Jsq(CompressionMethod):
    """Remove weights by ``|w| * ||x|| + rho * s``, smooth the rest and round it.

    The sensitivity ``s`` of a weight is the range that its output has over tokens once
    the weight is gone: what would leave outliers behind, which 8-bit activations cannot
    hold, stays. Activations are clipped at the size that a share ``clip`` of them
    reaches, then give norms, ranges and SmoothQuant's scales; the runtime rounds them
    to 8 bits, token by token, as for ``smoothquant``. How we differ: ranges are taken
    over a sample of tokens and not over positions averaged between windows; a norm is
    that of a window of 2048 tokens whatever the text, so that ``rho`` means the same;
    counts are exact; each layer has its own scales, and stores them.
    """

    name = "jsq"
    reference = (
        "Guo et al. 2024, Compressing large language models by joint sparsification "
        "and quantization, ICML"
    )
    needs = frozenset({"input_max", "input_norm", "input_rows"})
    parameters = (
        preconditions.SPARSITY,
        preconditions.PATTERN,
        Parameter("rho", float, 2.1, "Weight of the sensitivity.", 0, 1000),
        Parameter("clip", float, 0.01, "Share of the activations to clip.", 0, 0.5),
        Parameter("alpha", float, 0.5, "How much moves from inputs to weights.", 0, 1),
        Parameter("bits", int, 8, "Bits of a code.", 2, 8),
        preconditions.GROUP,
    )

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        settings = super().check(params)
        return preconditions.check_sparsity_or_pattern(self.name, settings)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        reason = preconditions.refuse_without_input(layer)
        reason = reason or preconditions.refuse_pruning(layer, previous, settings)
        if reason:
            return reason
        pruned = preconditions.pruned_storage(previous, _by_row(settings))
        return preconditions.refuse_quantization(layer, pruned, settings)

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        pruned = preconditions.pruned_storage(previous, _by_row(settings))
        return pruned.quantized(
            settings["bits"], settings["group"], symmetric=True, channel_scales=True
        )

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting."""
        shares = dict.fromkeys(one["clip"] for one in settings)
        inputs = {share: clipped(sources, statistics, share) for share in shares}
        made = []
        for source in sources:
            weight = preconditions.finite_weight(source)
            ranges = {
                share: sensitivity(weight, inputs[share].rows)
                for share in dict.fromkeys(s["clip"] for s in settings if s["rho"])
            }
            variants = []
            for one in settings:
                seen = inputs[one["clip"]]
                scores = weight.abs() * seen.norm
                if one["rho"]:
                    scores += one["rho"] * ranges[one["clip"]]
                variants.append(_make(source, scores, seen.largest, one))
            made.append(variants)
        return made


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known of a layer's inputs, clipped.

    Attributes:
        norm: L2 norm of each input over a window.
        largest: Largest size of each input.
        rows: What some tokens gave.
    """

    norm: Float[Tensor, " in"]
    largest: Float[Tensor, " in"]
    rows: Float[Tensor, "rows in"]


def clipped(
    sources: Sequence[Source], statistics: InputStatistics, share: float
) -> Inputs:
    """Clip inputs at the size that a share of them reaches.

    Norms come from all tokens; by how much clipping shortens them, from the sample.
    """
    rows = preconditions.finite_input_rows(sources, statistics)
    norm = preconditions.finite_input_norm(sources, statistics)
    norm = norm * (WINDOW / max(statistics.tokens, 1)) ** 0.5
    largest = preconditions.finite_input_max(sources, statistics)
    level = clipping_level(rows, share)
    if level == inf:
        return Inputs(norm, largest, rows)
    shorter = rows.clamp(-level, level)
    before = rows.norm(dim=0)
    left = torch.where(before > 0, shorter.norm(dim=0) / before, 1.0)
    return Inputs(norm * left, largest.clamp(max=level), shorter)


def clipping_level(rows: Float[Tensor, "rows in"], share: float) -> float:
    """Give the size that a share of all activations reaches; infinity for none.

    Example:
        >>> clipping_level(torch.tensor([[1.0, -8.0], [2.0, 4.0]]), 0.5)
        4.0
    """
    sizes = rows.abs().view(1, -1)
    count = round(share * sizes.numel())
    return float(kth_smallest(sizes, sizes.numel() - count + 1)) if count else inf


def sensitivity(
    weight: Float[Tensor, "out in"], rows: Float[Tensor, "rows in"]
) -> Float[Tensor, "out in"]:
    """Tell the range over tokens that an output has without each of its weights.

    Args:
        weight: The weight.
        rows: Inputs, one token a row.

    Returns:
        ``max_t(y_t - w x_t) - min_t(y_t - w x_t)``, with the ends looked for among the
        ``EXTREMES`` tokens of the largest and of the smallest outputs.
    """
    outputs = rows @ weight.t()
    count = min(EXTREMES, len(rows))
    ends = []
    for sign in (1, -1):
        signed, tokens = (sign * outputs).topk(count, dim=0)
        end = torch.full_like(weight, -inf)
        for y, token in zip(signed, tokens, strict=True):
            without = y[:, None] - sign * weight * rows[token]
            torch.maximum(end, without, out=end)
        ends.append(end)
    return ends[0] + ends[1]


def _make(
    source: Source,
    scores: Float[Tensor, "out in"],
    largest_input: Float[Tensor, " in"],
    settings: Settings,
) -> Variant:
    pruned = preconditions.pruned_variant(source, scores, _by_row(settings))
    weight = pruned.weight.float()
    scales = smoothing(largest_input, weight.abs().amax(0), settings["alpha"])
    scales = scales.to(pruned.weight.dtype).float()  # as they are stored
    return round_to_grid(
        pruned,
        weight * scales,
        bits=settings["bits"],
        group=settings["group"],
        symmetric=True,
        channel_scales=scales,
    )


def _by_row(settings: Settings) -> Settings:
    return {**settings, "per": "row"}


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Jsq()]
