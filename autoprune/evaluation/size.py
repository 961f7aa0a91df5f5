"""What a policy stores: bytes, ratios, bits, sparsity. Exact, and without a model."""

import math

from autoprune.compression.storage import Storage
from autoprune.evaluation.metric import Evidence, Metric, Scene
from autoprune.policy import Layer


class SizeBytes(Metric):
    """Bytes of the weight file in the export target."""

    name = "size_bytes"
    direction = "minimize"
    help = "bytes of the exported weight file: scales, zero points, masks, all tensors"

    def measure(self, evidence: Evidence) -> float:
        """Count the bytes of the file that the export would write."""
        scene = evidence.scene
        return float(scene.exporter.size_bytes(evidence.storages, scene.untouched))

    def price(self, layer: Layer, storage: Storage, scene: Scene) -> float:
        """Price a layer with its share of the header."""
        return float(scene.exporter.layer_bytes(layer, storage))

    def total_limit(self, limit: float, scene: Scene) -> float:
        """Take off what is written for every policy."""
        return limit - scene.exporter.size_bytes({}, scene.untouched)


class CompressionRatio(SizeBytes):
    """How many times smaller than the dense model in the same target."""

    name = "compression_ratio"
    direction = "maximize"  # type: ignore[assignment]
    help = "size of the dense model over size of the compressed one, same export target"

    def measure(self, evidence: Evidence) -> float:
        """Divide the dense size by the policy's."""
        return evidence.scene.dense_bytes / super().measure(evidence)

    def total_limit(self, limit: float, scene: Scene) -> float:
        """Turn a smallest ratio into most bytes."""
        most = scene.dense_bytes / limit if limit > 0 else math.inf
        return super().total_limit(most, scene)


class BitsPerWeight(Metric):
    """Stored bits a weight in the blocks, as the field counts them."""

    name = "bits_per_weight"
    direction = "minimize"
    help = "stored bits a weight in the blocks, embeddings aside (dense: 16 in bf16)"

    def measure(self, evidence: Evidence) -> float:
        """Divide all stored bits by all weights, zeros included."""
        pairs = evidence.storages.items()
        bits = sum(self.price(layer, s, evidence.scene) for layer, s in pairs)
        return bits / evidence.scene.block_numel

    def price(self, layer: Layer, storage: Storage, scene: Scene) -> float:
        """Price a layer by its bits."""
        return 0.0 if layer.block is None else storage.nbytes * 8.0

    def total_limit(self, limit: float, scene: Scene) -> float:
        """Turn bits a weight into bits."""
        return limit * scene.block_numel


class Sparsity(Metric):
    """Fraction of zeros in the blocks, as the field counts it."""

    name = "sparsity"
    direction = "maximize"
    help = "zeros over weights in the blocks, embeddings aside"

    def measure(self, evidence: Evidence) -> float:
        """Count zeros by masks, not by values."""
        pairs = evidence.storages.items()
        kept = sum(self.price(layer, s, evidence.scene) for layer, s in pairs)
        return 1 - kept / evidence.scene.block_numel

    def price(self, layer: Layer, storage: Storage, scene: Scene) -> float:
        """Price a layer by the weights it keeps."""
        return 0.0 if layer.block is None else float(storage.stored)

    def total_limit(self, limit: float, scene: Scene) -> float:
        """Turn a least sparsity into most kept weights."""
        return (1 - limit) * scene.block_numel


class ModelSparsity(Metric):
    """Fraction of zeros in the whole model."""

    name = "model_sparsity"
    direction = "maximize"
    help = "zeros over all parameters of the model, embeddings and norms included"

    def measure(self, evidence: Evidence) -> float:
        """Count zeros by masks, not by values."""
        scene = evidence.scene
        numel = sum(layer.numel for layer in scene.layers)
        kept = sum(storage.stored for storage in evidence.storages.values())
        return (numel - kept) / (numel + self._others(scene))

    def price(self, layer: Layer, storage: Storage, scene: Scene) -> float:
        """Price a layer by the weights it keeps."""
        return float(storage.stored)

    def total_limit(self, limit: float, scene: Scene) -> float:
        """Turn a least sparsity into most kept weights."""
        numel = sum(layer.numel for layer in scene.layers)
        return numel - limit * (numel + self._others(scene))

    def _others(self, scene: Scene) -> int:
        return sum(part.numel for part in scene.untouched.values())
