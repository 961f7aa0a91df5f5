"""Finds what a description of a model family names, or says what is there instead."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.architecture import Architecture
from autoprune.models.kinds import kind_of, layer_classes
from autoprune.policy import Layer


def block_paths(model: nn.Module, architecture: Architecture) -> tuple[str, ...]:
    """List the paths of a model's blocks, in order.

    Raises:
        ModelError: If there is no list of blocks, or no block fits the pattern.
    """
    if "*" not in architecture.blocks:
        blocks = find(model, architecture, architecture.blocks, nn.ModuleList)
        return tuple(f"{architecture.blocks}.{index}" for index in range(len(blocks)))
    wanted = architecture.blocks.split(".")
    fitting = (name for name, _ in model.named_modules() if _fits(name, wanted))
    if found := tuple(fitting):
        return found
    raise ModelError(
        f"architecture {architecture.name!r} describes blocks as "
        f"{architecture.blocks!r}, but no module of the model {type(model).__name__} "
        "has such a path. Correct the description."
    )


def find(model: nn.Module, architecture: Architecture, path: str, *kinds: type) -> Any:
    """Find a part of a model by its path.

    Raises:
        ModelError: If the model lacks it, or it is of no such class.
    """
    found = _at(model, path)
    if isinstance(found, kinds):
        return found
    has = "lacks" if found is None else f"has as a {type(found).__name__}"
    raise ModelError(
        f"architecture {architecture.name!r} describes {path!r} as "
        f"{' or '.join(kind.__name__ for kind in kinds)}, which the model "
        f"{type(model).__name__} {has}. Correct the description, or leave its plugin "
        "out to get one site a layer."
    )


def find_layer(model: nn.Module, architecture: Architecture, path: str) -> Any:
    """Find a module that holds a layer, or a parameter of experts.

    Raises:
        ModelError: If the model lacks it, or it is no layer; tells why.
    """
    found = find(model, architecture, path, *layer_classes(), nn.Parameter)
    kind = None if isinstance(found, nn.Parameter) else kind_of(found)
    if kind and (why := kind.refuses(found)):
        raise ModelError(
            f"architecture {architecture.name!r} describes {path!r} as a layer, but "
            f"{why}. Leave it out of the description."
        )
    return found


def has_all(model: nn.Module, block: str, paths: Sequence[str]) -> bool:
    """Tell whether a block has all of these parts."""
    return all(_at(model, f"{block}.{path}") is not None for path in paths)


def norm_scale(model: nn.Module, layer: Layer) -> Float[Tensor, " out"] | None:
    """Give the factors by which the norm behind a layer scales its outputs, if any."""
    norm: Any = None if layer.norm is None else _at(model, layer.norm)
    return None if norm is None or norm.weight is None else norm.weight.detach()


def _at(model: nn.Module, path: str) -> Any:
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _fits(name: str, wanted: Sequence[str]) -> bool:
    """Tell whether a path is of a pattern, in which ``*`` stands for one number."""
    parts = name.split(".")
    return len(parts) == len(wanted) and all(
        part.isdecimal() if pattern == "*" else part == pattern
        for part, pattern in zip(parts, wanted, strict=True)
    )
