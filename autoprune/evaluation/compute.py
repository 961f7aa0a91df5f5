"""What a policy computes."""

from autoprune.compression.storage import Storage
from autoprune.evaluation.metric import Evidence, Metric, Scene
from autoprune.policy import Layer

FLOP_PER_WEIGHT = 2
"""One multiplication and one addition."""


class GflopPerToken(Metric):
    """Arithmetic of the kept weights, and of low-rank factors, for one token.

    What a kernel that skips every zero would compute: a floor, not a time. Attention's
    products of activations are not counted: no action here changes them.
    """

    name = "gflop_per_token"
    direction = "minimize"
    help = "1e9 floating-point operations a token in matrix products with weights"

    def measure(self, evidence: Evidence) -> float:
        """Add up layers and output head; an expert counts by how often it is used."""
        scene = evidence.scene
        layers = sum(self.price(la, s, scene) for la, s in evidence.storages.items())
        return layers + FLOP_PER_WEIGHT * scene.head_numel / 1e9

    def price(self, layer: Layer, storage: Storage, scene: Scene) -> float:
        """Price a layer by what it computes for one token, on average."""
        if layer.input is None and scene.head_numel:
            return 0.0  # an embedding that is only looked up; tied, it is the head
        return FLOP_PER_WEIGHT * storage.stored * layer.uses / 1e9

    def total_limit(self, limit: float, scene: Scene) -> float:
        """Take off the output head."""
        return limit - FLOP_PER_WEIGHT * scene.head_numel / 1e9
