"""What a policy keeps of the dense model's quality, as metrics."""

from autoprune.evaluation.metric import Evidence, Metric
from autoprune.evaluation.quality import Quality


def _quality(evidence: Evidence) -> Quality:
    assert evidence.quality is not None, "a metric that needs the model ran without it"
    return evidence.quality


class Kl(Metric):
    """Divergence from the dense model: what a search minimises by default."""

    name = "kl"
    direction = "minimize"
    needs_model = True
    help = "KL(dense || compressed) in nats a token"

    def measure(self, evidence: Evidence) -> float:
        """Average over tokens."""
        return _quality(evidence).mean_kl


class Perplexity(Metric):
    """Exponential of the mean loss over labels."""

    name = "perplexity"
    direction = "minimize"
    needs_model = True
    help = "exp of the mean negative log-likelihood a token"

    def measure(self, evidence: Evidence) -> float:
        """Average over tokens, then take the exponential."""
        return _quality(evidence).perplexity


class QualityDrop(Metric):
    """How much of the dense model's perplexity is lost, as a fraction."""

    name = "quality_drop"
    direction = "minimize"
    needs_model = True
    help = "perplexity over the dense model's on the same tokens, minus 1"

    def measure(self, evidence: Evidence) -> float:
        """Compare perplexities."""
        assert evidence.scene.dense is not None
        dense = evidence.scene.dense.perplexity
        return _quality(evidence).perplexity / dense - 1
