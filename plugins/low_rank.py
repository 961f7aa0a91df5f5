"""Low-rank factors: beside a compressed layer, or in the place of a dense one."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.compression import preconditions
from autoprune.compression.method import CompressionMethod, Parameter, Settings, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Factors, Variant
from autoprune.errors import MethodError
from autoprune.hookspecs import hookimpl
from autoprune.models.statistics import InputStatistics
from autoprune.policy import Layer, Value

RANK = Parameter("rank", int, None, "Columns of the left factor.", 1, 65536, example=16)
SIZE = Parameter(
    "size",
    float,
    None,
    "At most so many numbers in both factors, over those of the layer.",
    0,
    1,
    open_range=True,
)


@dataclass(eq=False)
class InputWeights:
    """What an error ``E`` of a layer costs: ``tr(E H Eᵀ)``.

    Attributes:
        hessian: ``H``, or its diagonal where the other entries are left out.
    """

    hessian: Float[Tensor, "in in"] | Float[Tensor, " in"]

    def gram(self, error: Float[Tensor, "out in"]) -> Float[Tensor, "out out"]:
        """Give ``E H Eᵀ``."""
        gram: Tensor = _times(error, self.hessian) @ error.t()
        return gram

    @cached_property
    def root(self) -> Float[Tensor, "in in"] | Float[Tensor, " in"]:
        """Give ``R`` with ``R Rᵀ = H``, from the eigenvectors of ``H``."""
        if self.hessian.dim() == 1:
            spread: Tensor = self.hessian.sqrt()
            return spread
        values, vectors = torch.linalg.eigh(self.hessian)
        root: Tensor = vectors * values.clamp(min=0).sqrt()
        return root


def leading_directions(
    error: Float[Tensor, "out in"], weights: InputWeights, rank: int
) -> Float[Tensor, "out rank"]:
    """Give the outputs in which an error costs most: left singular vectors of ``E R``.

    Projected on to them, ``E`` gives its best approximation of that rank (Eckart and
    Young), for ``(A Aᵀ E R)`` is the truncated decomposition of ``E R``: ``R`` never
    has to be inverted, and inputs that were never seen do no harm.
    """
    rows, columns = error.shape
    if rows <= columns:  # the smaller of two equal problems
        _, vectors = torch.linalg.eigh(weights.gram(error))
        leading: Tensor = vectors.flip(1)[:, :rank]
        return leading
    seen = _times(error, weights.root)
    _, vectors = torch.linalg.eigh(seen.t() @ seen)
    left: Tensor = seen @ vectors.flip(1)[:, :rank]
    unit: Tensor = left / left.norm(dim=0).clamp(min=torch.finfo(left.dtype).tiny)
    return unit


def best_factors(
    error: Float[Tensor, "out in"],
    weights: InputWeights,
    ranks: Sequence[int],
    dtype: torch.dtype,
) -> list[Factors]:
    """Give the factors of each rank whose product comes closest to an error.

    The left factor is rounded to the type that is stored before the right one is fitted
    to it, so that its rounding costs little.
    """
    error = error.double()
    directions = leading_directions(error, weights, max(ranks)).to(dtype)
    factors = []
    for rank in ranks:
        left = directions[:, :rank]
        right = torch.linalg.pinv(left.double()) @ error
        factors.append((left, right.to(dtype)))
    return factors


def _times(
    error: Float[Tensor, "out in"], weights: Tensor
) -> Float[Tensor, "out columns"]:
    return error * weights if weights.dim() == 1 else error @ weights


class LowRank(CompressionMethod):
    """What the methods here share: two factors, by rank or by size.

    Attributes:
        alone: True if the factors stand in the place of a dense layer, False if they
            make good what the steps before have lost.
    """

    alone: ClassVar[bool]
    parameters: ClassVar[tuple[Parameter, ...]] = (RANK, SIZE)

    def check(self, params: Mapping[str, Value]) -> Settings:
        """Complete and check the parameters.

        Raises:
            MethodError: If not exactly one of ``rank`` and ``size`` is named.
        """
        settings = super().check(params)
        rank, size = settings["rank"], settings["size"]
        if (rank is None) == (size is None):
            found = "neither" if rank is None else f"{rank} and {size}"
            raise MethodError(
                f"{self.name} takes either rank or size, found {found}. Write "
                f"{self.name}(rank=16) or {self.name}(size=0.1)."
            )
        return settings

    def refuses(
        self, layer: Layer, previous: Storage, settings: Settings
    ) -> str | None:
        """Say why a layer cannot be treated, or None."""
        if self.needs and (reason := preconditions.refuse_without_input(layer)):
            return reason
        if previous.low_rank is not None:
            return preconditions.LOW_RANK_IS_LAST
        rank, (rows, columns) = rank_of(layer.shape, settings), layer.shape
        if rank > min(rows, columns):
            return f"rank {rank} is larger than the smaller side of {rows} x {columns}"
        dense = previous == Storage.dense(layer)
        if not self.alone:
            return "it is dense: there is no error to make good" if dense else None
        if not dense:
            return f"{self.name} stands alone: to make good an error, use eora"
        if (numbers := rank * (rows + columns)) >= layer.numel:
            return f"rank {rank} stores {numbers} numbers, dense {layer.numel}"
        return None

    def storage(self, layer: Layer, previous: Storage, settings: Settings) -> Storage:
        """Declare what a variant stores."""
        return previous.factored(rank_of(layer.shape, settings), alone=self.alone)

    def compress(
        self,
        sources: Sequence[Source],
        statistics: InputStatistics,
        settings: Sequence[Settings],
    ) -> list[list[Variant]]:
        """Make variants for every setting; one decomposition serves all ranks."""
        errors = [self._error(source) for source in sources]
        found: dict[tuple[int, int], Variant] = {}
        for damping in dict.fromkeys(one.get("damping", 0.0) for one in settings):
            at = [i for i, s in enumerate(settings) if s.get("damping", 0.0) == damping]
            weights = self._weights(sources, statistics, damping)
            for row, (source, error) in enumerate(zip(sources, errors, strict=True)):
                ranks = [rank_of(source.layer.shape, settings[index]) for index in at]
                dtype = getattr(torch, source.variant.storage.dtype)
                made = best_factors(error, weights, ranks, dtype)
                for index, factors in zip(at, made, strict=True):
                    variant = source.variant.factored(factors, alone=self.alone)
                    found[row, index] = variant
        return [
            [found[row, index] for index in range(len(settings))]
            for row in range(len(sources))
        ]

    @abstractmethod
    def _weights(
        self, sources: Sequence[Source], statistics: InputStatistics, damping: float
    ) -> InputWeights:
        """Say what an error costs, in float64."""

    def _error(self, source: Source) -> Float[Tensor, "out in"]:
        """Give what the factors are to come close to."""
        weight = preconditions.finite_weight(source)
        if self.alone:
            return weight
        if source.dense is None:
            raise MethodError(
                f"{self.name} needs the dense weight of {source.layer.name}, to which "
                "it compares the compressed one: give it to Source(dense=...)"
            )
        return source.dense.float() - weight


def rank_of(shape: tuple[int, int], settings: Settings) -> int:
    """Tell the rank that a step gives a layer: as asked, or what ``size`` allows."""
    if settings["rank"] is not None:
        return int(settings["rank"])
    return max(1, int(settings["size"] * shape[0] * shape[1] / sum(shape)))


def _seen_outputs(
    sources: Sequence[Source], statistics: InputStatistics, damping: float
) -> InputWeights:
    """Count errors by what they do to outputs."""
    hessian = preconditions.finite_hessian(sources, statistics).double()
    added = damping * hessian.diagonal().mean()
    return InputWeights(hessian + added * torch.eye(len(hessian), dtype=hessian.dtype))


class Eora(LowRank):
    """Add the product of two factors that makes good most of an error at the outputs.

    The paper projects the error on to the eigenvectors of the Hessian, scales it with
    the roots of the eigenvalues, truncates its singular value decomposition and goes
    back; the result is the best of its rank for the layer's outputs. How we differ: the
    same product is found without going back, from the left singular vectors alone; the
    Hessian is damped, so that what few tokens have not shown counts a little.
    """

    name = "eora"
    reference = "Liu et al. 2024, arXiv:2410.21271"
    needs = frozenset({"hessian"})
    parameters = (RANK, SIZE, preconditions.DAMPING)
    alone = False

    def _weights(
        self, sources: Sequence[Source], statistics: InputStatistics, damping: float
    ) -> InputWeights:
        return _seen_outputs(sources, statistics, damping)


class SlimLora(LowRank):
    """Add the product of two factors that makes good an error, inputs weighed by size.

    As SLiM-LoRA, with a diagonal in the place of the whole Hessian; the paper's rank is
    a tenth of the smaller side. How we differ: an input's weight is its mean square;
    the factors themselves are not quantized.
    """

    name = "slim_lora"
    reference = "Mozaffari et al. 2024, SLiM, arXiv:2410.09615"
    needs = frozenset({"input_norm"})
    alone = False

    def _weights(
        self, sources: Sequence[Source], statistics: InputStatistics, damping: float
    ) -> InputWeights:
        norm = preconditions.finite_input_norm(sources, statistics)
        return InputWeights(norm.double().square())


class TruncatedSvd(LowRank):
    """Replace a layer by the two factors whose product is closest to its weight."""

    name = "svd"
    reference = "Eckart and Young 1936, The approximation of one matrix by another"
    alone = True

    def _weights(
        self, sources: Sequence[Source], statistics: InputStatistics, damping: float
    ) -> InputWeights:
        columns = sources[0].layer.shape[1]
        return InputWeights(torch.ones(columns, dtype=torch.float64))


class ActivationSvd(LowRank):
    """Replace a layer by the two factors whose product is closest at its outputs.

    As SVD-LLM, whose whitening by a root of the Hessian makes what is truncated equal
    to what is lost. How we differ: the root is never inverted (see ``eora``), and the
    Hessian is damped.
    """

    name = "activation_svd"
    reference = "Wang et al. 2024, SVD-LLM, arXiv:2403.07378"
    needs = frozenset({"hessian"})
    parameters = (RANK, SIZE, preconditions.DAMPING)
    alone = True

    def _weights(
        self, sources: Sequence[Source], statistics: InputStatistics, damping: float
    ) -> InputWeights:
        return _seen_outputs(sources, statistics, damping)


@hookimpl
def register_methods() -> list[CompressionMethod]:
    """Return the methods."""
    return [Eora(), SlimLora(), TruncatedSvd(), ActivationSvd()]
