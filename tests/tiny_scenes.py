"""What metrics measure in: the scene of a tiny model, and policies on it."""

from collections.abc import Mapping

from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.packed import Packed
from tiny_models import tiny
from torch import nn

from autoprune.compression.storage import Part, Storage
from autoprune.evaluation.metric import Evidence, Scene
from autoprune.models.layers import Inventory, inventory, untouched_parameters
from autoprune.models.task import output_layer
from autoprune.policy import Layer


def scene_of(model: nn.Module) -> Scene:
    """Make the scene of a model, exported as ``packed``."""
    found: Inventory = inventory(model, register_architectures())
    untouched = {
        name: Part(*about) for name, about in untouched_parameters(model, found).items()
    }
    head = 0 if found.tied else output_layer(model).weight.numel()
    return Scene(found.layers, untouched, Packed(), head)


def tiny_scene(kind: str) -> Scene:
    """Make the scene of the tiny model of a type."""
    return scene_of(tiny(kind))


def half(scene: Scene) -> dict[Layer, Storage]:
    """Keep half of the weights of every layer in a block."""
    return {
        layer: dense if layer.block is None else dense.masked(dense.kept // 2, "bitmap")
        for layer, dense in scene.dense_storages.items()
    }


def evidence(scene: Scene, storages: Mapping[Layer, Storage] | None = None) -> Evidence:
    """Give what is known of a policy before its model has run; dense by default."""
    return Evidence(scene, scene.dense_storages if storages is None else storages)
