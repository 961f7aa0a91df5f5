"""Optimal Brain Compression: weights go one by one, each at the least exact cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autoprune.compression import preconditions, tiles
from autoprune.compression.factor import factorise
from autoprune.compression.grids import fit_grid
from autoprune.compression.masks import pruned_count
from autoprune.compression.method import CompressionMethod, Settings, Source, keep_of
from autoprune.compression.obs import (
    Grid,
    Trace,
    best_on_support,
    counts_of_layer,
    inverse_and_hessian,
    remove_greedily,
    round_greedily,
)
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value

MOST_COLUMNS = 1536
"""Widest layer that is treated: a row takes time in the cube of its width, some 17 ms
at 576 columns and 0.25 s at 1536 (measured on one core, until nothing is left)."""


class Obc(CompressionMethod):
    """Remove, row by row, the weight whose loss the others can make good best; repeat.

    Every removal updates all that is left of the row and the row's own inverse
    Hessian (ExactOBS), so that the others are always the best for their support. Rows
    of a layer then give up their cheapest removals together, so that some lose more
    than others; ``per=row`` takes the same number of each. With ``bits`` the survivors
    are rounded in the same greedy way (OBQ), and zeros stay zeros; with ``bits`` alone
    nothing is pruned. Without dependence between inputs it does what ``obd`` does.

    How we differ: the Hessian is damped by default, and the weights of a level are
    solved for on their support once it is known, which is where the updates lead.

    The greedy order of rounding leaves the costliest weights for last, when nobody is
    left to make up for them: on random layers ``gptq`` with ``act_order`` errs less.
    """

    name = "obc"
    reference = "Frantar and Alistarh 2022, arXiv:2208.11580, Sec. 4 and 5"
    needs = frozenset({"hessian"})
    parameters = (
        preconditions.SPARSITY,
        preconditions.PATTERN,
        replace(tiles.PER, default="layer"),
        replace(
            preconditions.BITS, required=False, help="Bits of a code, if quantized."
        ),
        preconditions.GROUP,
        preconditions.SYMMETRIC,
        preconditions.DAMPING,
    )

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters."""
        settings = super().check(params)
        tiles.check_granularity(self.name, params, {**settings, "tile": None})
        if settings["bits"] is None:
            for name in ("group", "symmetric"):
                if name in params:
                    raise MethodError(
                        f"obc({name}={params[name]}) has no effect without bits. "
                        "Name bits too, or leave it out."
                    )
        if settings["bits"] is not None and not _prunes(settings):
            return settings
        return preconditions.check_sparsity_or_pattern(self.name, settings)

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        reason = preconditions.refuse_without_input(layer)
        if reason is None and _prunes(settings):
            reason = preconditions.refuse_pruning(layer, previous, settings)
        if reason is None and settings["bits"] is not None:
            reason = preconditions.refuse_quantization(layer, previous, settings)
        if reason is None and layer.shape[1] > MOST_COLUMNS:
            return (
                f"its {layer.shape[1]} inputs are more than the {MOST_COLUMNS} that "
                "removing weights one by one is fast enough for: use sparsegpt"
            )
        return reason

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        if _prunes(settings):
            previous = preconditions.pruned_storage(previous, settings)
        if settings["bits"] is None:
            return previous
        return preconditions.quantized_storage(previous, settings)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting; all sparsities come from one run."""
        hessian = preconditions.finite_hessian(sources, statistics)
        weights = torch.cat([preconditions.finite_weight(s) for s in sources]).double()
        found: dict[int, list[Variant]] = {}
        for damping in dict.fromkeys(one["damping"] for one in settings):
            at = [i for i, one in enumerate(settings) if one["damping"] == damping]
            factor = factorise(
                hessian,
                damping=damping,
                act_order=False,
                names=[source.layer.name for source in sources],
            )
            problem = _Problem(
                weights.masked_fill(factor.dead, 0.0), *inverse_and_hessian(factor)
            )
            traces = problem.traces([settings[index] for index in at])
            for index in at:
                found[index] = problem.solve(sources, settings[index], traces)
        by_setting = [found[index] for index in range(len(settings))]
        return [list(variants) for variants in zip(*by_setting, strict=True)]


@dataclass(frozen=True, eq=False)
class _Problem:
    """Stacked layers with their damped Hessian and its inverse, all in float64."""

    weights: Float[Tensor, "rows in"]
    inverse: Float[Tensor, "in in"]
    hessian: Float[Tensor, "in in"]

    def traces(self, settings: Sequence[Settings]) -> dict[str | None, Trace]:
        """Run once for all sparsities, and once for every pattern."""
        columns, steps = self.weights.shape[1], dict[str | None, int]()
        for one in filter(_prunes, settings):
            pattern = one["pattern"]
            if pattern is not None:
                keep, of = keep_of(pattern)
                needed = columns // of * (of - keep)
            elif one["per"] == "row":
                needed = pruned_count(columns, one["sparsity"])
            else:  # a row may have to give up all
                needed = columns
            steps[pattern] = max(needed, steps.get(pattern, 0))
        return {
            pattern: remove_greedily(
                self.weights, self.inverse, needed, pattern=pattern
            )
            for pattern, needed in steps.items()
        }

    def solve(
        self,
        sources: Sequence[Source],
        settings: Settings,
        traces: Mapping[str | None, Trace],
    ) -> list[Variant]:
        """Make one variant of each layer."""
        spans = [source.layer.shape[0] for source in sources]
        variants = [source.variant for source in sources]
        if _prunes(settings):
            pattern = settings["pattern"]
            kept = self._kept(traces[pattern], spans, settings)
            weights = best_on_support(self.weights, kept, self.hessian)
            parts = zip(variants, weights.split(spans), kept.split(spans), strict=True)
            variants = [v.pruned(w, k, pattern=pattern) for v, w, k in parts]
        else:
            weights, kept = self.weights, _masks(variants)
        if settings["bits"] is None:
            return variants
        parts = zip(variants, weights.split(spans), kept.split(spans), strict=True)
        return [self._round(v, w, k, settings) for v, w, k in parts]

    def _kept(
        self, trace: Trace, spans: Sequence[int], settings: Settings
    ) -> Bool[Tensor, "rows in"]:
        columns = self.weights.shape[1]
        steps = trace.losses.shape[1]
        if settings["pattern"] is not None:
            counts = torch.full((sum(spans),), steps)
        elif settings["per"] == "row":
            counts = torch.full(
                (sum(spans),), pruned_count(columns, settings["sparsity"])
            )
        else:
            counts = torch.cat(
                [
                    counts_of_layer(
                        losses, pruned_count(losses.numel(), settings["sparsity"])
                    )
                    for losses in trace.losses.split(list(spans))
                ]
            )
        return trace.kept(counts, columns)

    def _round(
        self,
        variant: Variant,
        weight: Float[Tensor, "out in"],
        kept: Bool[Tensor, "out in"],
        settings: Settings,
    ) -> Variant:
        bits, group = settings["bits"], settings["group"]
        symmetric = settings["symmetric"]
        scales, zeros = fit_grid(
            weight.float(),
            bits=bits,
            group=group,
            symmetric=symmetric,
            dtype=getattr(torch, variant.storage.dtype),
        )
        size = group or weight.shape[1]
        step, zero = (part.repeat_interleave(size, dim=1) for part in (scales, zeros))
        grid = Grid(step, -zero, 2**bits - 1 - zero)
        multiples = round_greedily(weight, kept, self.hessian, grid)
        return variant.quantized(
            (multiples + zero).byte(),
            scales,
            None if symmetric else zeros.byte(),
            bits=bits,
            group=group,
        )


def _prunes(settings: Settings) -> bool:
    return settings["sparsity"] is not None or settings["pattern"] is not None


def _masks(variants: Sequence[Variant]) -> Bool[Tensor, "rows in"]:
    """Stack what earlier steps have kept."""
    shapes = [variant.storage.shape for variant in variants]
    return torch.cat(
        [
            torch.ones(shape, dtype=torch.bool) if v.mask is None else v.mask
            for v, shape in zip(variants, shapes, strict=True)
        ]
    )


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the method."""
    return [Obc()]
