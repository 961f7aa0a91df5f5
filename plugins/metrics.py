"""The built-in metrics: quality, size and compute."""

from autoprune.evaluation.compute import GflopPerToken
from autoprune.evaluation.fidelity import Kl, Perplexity, QualityDrop
from autoprune.evaluation.metric import Metric
from autoprune.evaluation.size import (
    BitsPerWeight,
    CompressionRatio,
    ModelSparsity,
    SizeBytes,
    Sparsity,
)
from autoprune.hookspecs import hookimpl


@hookimpl
def register_metrics() -> list[Metric]:
    """Register them."""
    return [
        Kl(),
        Perplexity(),
        QualityDrop(),
        SizeBytes(),
        CompressionRatio(),
        BitsPerWeight(),
        Sparsity(),
        ModelSparsity(),
        GflopPerToken(),
    ]
