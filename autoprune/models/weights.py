"""A layer's weight, read and written as ``[out, in]`` however the model stores it.

``nn.Linear`` and embeddings as they are, other modules as their kind says, experts as
slices of their 3-D parameter.
"""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autoprune.errors import ModelError, PolicyError
from autoprune.models.kinds import kind_of
from autoprune.policy import Layer

MATRICES = (nn.Linear, Conv1D)
"""Modules that tracing looks for; their ``weight`` is a layer, their inputs tokens."""

_EXPERT = re.compile(r"(.+)\.([^.]+)\[(\d+)\]")


def read_weight(model: nn.Module, layer: Layer) -> Float[Tensor, "out in"]:
    """Give a layer's weight: a view of the parameter, without gradient.

    Raises:
        ModelError: If the model lacks the layer, or has it with another shape.
    """
    weight = find_weight(model, layer.name)
    if weight is None:
        raise ModelError(
            f"the model {type(model).__name__} has no layer {layer.name!r}. Take "
            "layers from its own inventory."
        )
    if tuple(weight.shape) != layer.shape:
        raise ModelError(
            f"layer {layer.name!r} has shape {tuple(weight.shape)} in the model, "
            f"expected {layer.shape}. Take layers from its own inventory."
        )
    return weight


def write_weight(
    model: nn.Module, layer: Layer, weight: Float[Tensor, "rows columns"]
) -> None:
    """Replace a layer's weight in place, rounded to the type that the model stores.

    Writing a tied embedding changes the head with it.

    Raises:
        PolicyError: If ``weight`` has another shape than the layer.
        ModelError: If the model lacks the layer, or has it with another shape.
    """
    if tuple(weight.shape) != layer.shape:
        raise PolicyError(
            f"weight for layer {layer.name!r} has shape {tuple(weight.shape)}, "
            f"expected (out, in) = {layer.shape}"
        )
    with torch.no_grad():
        read_weight(model, layer).copy_(weight)


def is_parameter(model: nn.Module, layer: Layer) -> bool:
    """Tell a layer that is a parameter as it stands from a slice or another view."""
    if expert_of(layer.name):
        return False
    kind = kind_of(model.get_submodule(layer.name))
    return kind is None or kind.whole


def find_weight(model: nn.Module, name: str) -> Float[Tensor, "out in"] | None:
    """Give the view of a layer's parameter by name; None if the model has none."""
    try:
        parameter = model.get_parameter(parameter_of(name))
    except AttributeError:
        return None
    return view_of_layer(model, name, parameter.detach())


def view_of_layer(
    model: nn.Module, name: str, tensor: Tensor
) -> Shaped[Tensor, "out in"] | None:
    """View a parameter, its gradient or its mask as one layer; None if it has no such.

    Args:
        model: The model.
        name: Of the layer.
        tensor: Of the shape of the layer's parameter.
    """
    expert = expert_of(name)
    module = model.get_submodule(expert[0] if expert else name)
    if not expert:
        kind = kind_of(module)
        return kind.matrix(module, tensor) if kind else tensor
    if tensor.dim() != 3 or expert[2] >= tensor.shape[0]:
        return None
    transposed = bool(getattr(module, "is_transposed", False))  # as in GPT-OSS
    return tensor[expert[2]].t() if transposed else tensor[expert[2]]


def expert_of(name: str) -> tuple[str, str, int] | None:
    """Split the name of an expert's layer; None for any other layer.

    Example:
        >>> expert_of("model.layers.0.mlp.experts.down_proj[3]")
        ('model.layers.0.mlp.experts', 'down_proj', 3)
    """
    match = _EXPERT.fullmatch(name)
    return (match[1], match[2], int(match[3])) if match else None


def parameter_of(name: str) -> str:
    """Name the parameter that holds a layer; experts share one.

    Example:
        >>> parameter_of("lm_head"), parameter_of("experts.down_proj[3]")
        ('lm_head.weight', 'experts.down_proj')
    """
    expert = expert_of(name)
    return f"{expert[0]}.{expert[1]}" if expert else f"{name}.weight"


def roles_of(paths: Sequence[str]) -> dict[str, str]:
    """Shorten paths to the fewest last parts that no other path ends with.

    Example:
        >>> roles_of(["attn.proj", "mlp.proj", "mlp.up"]).values()
        dict_values(['attn.proj', 'mlp.proj', 'up'])
    """
    parts = [path.split(".") for path in paths]
    ends = Counter(".".join(p[-n:]) for p in parts for n in range(1, len(p) + 1))
    roles = {}
    for path, split in zip(paths, parts, strict=True):
        tails = (".".join(split[-n:]) for n in range(1, len(split) + 1))
        roles[path] = next((tail for tail in tails if ends[tail] == 1), path)
    return roles


def dtype_name(tensor: Tensor) -> str:
    """Spell a tensor's type as layers and storage do: ``bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")
