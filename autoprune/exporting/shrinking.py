"""Makes a smaller model of the same class: fewer blocks, fewer channels and heads.

Whatever is kept is the same in every block, as plain checkpoints want it.
"""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from autoprune.exporting.rotating import narrowed_config
from autoprune.models.hidden import HIDDEN
from autoprune.models.layers import Inventory
from autoprune.models.structures import BLOCK
from autoprune.models.weights import parameter_of, view_of_layer
from autoprune.policy import Layer

Units = Int[Tensor, " kept"]
"""Indices of the units that stay, in order."""

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
"""What families call the number of channels of an MLP."""


@dataclass(frozen=True, slots=True)
class Remains:
    """What stays of a model.

    Attributes:
        blocks: Indices of the blocks that stay.
        units: For each kind of structure that is cut, how many units stay in it, in
            every block.
        biases: Settings that are switched on, because a layer gets a bias.
    """

    blocks: tuple[int, ...]
    units: tuple[tuple[str, int], ...] = ()
    biases: tuple[str, ...] = ()


def shrunk_config(config: Any, remains: Remains, inventory: Inventory) -> Any:
    """Give the configuration of the smaller model.

    Args:
        config: The model's.
        remains: What stays.
        inventory: The model's layers.

    Raises:
        Exception: Of any type, if the class of the configuration cannot say it.
    """
    small = deepcopy(config)
    text = small.get_text_config()
    for name in remains.biases:
        setattr(text, name, True)
    if len(remains.blocks) < len(inventory.blocks):
        _leave_blocks(text, remains.blocks, len(inventory.blocks))
    for kind, units in remains.units:
        if kind == HIDDEN:
            assert inventory.hidden is not None
            narrowed_config(text, inventory.hidden, units)
            continue
        first = next(g.layers[0] for g in inventory.groups if g.kind == kind)
        if kind == "channels":
            setattr(text, _width_of(text), units)
            continue
        assert first.cut is not None, first.name
        heads = text.num_attention_heads
        text.head_dim = first.shape[0] // heads
        text.num_attention_heads = heads // first.cut.units * units
        if hasattr(text, "num_key_value_heads"):
            text.num_key_value_heads = units
    type(small).from_dict(small.to_dict())  # speaks up where a reader would
    return small


def _width_of(text: Any) -> str:
    """Name the setting that tells the channels of an MLP."""
    if found := [name for name in _WIDTHS if hasattr(text, name)]:
        return found[0]
    raise ValueError(
        f"{type(text).__name__} has no setting for the channels of an MLP, such as "
        f"{_WIDTHS[0]}"
    )


def _leave_blocks(text: Any, blocks: Collection[int], count: int) -> None:
    """Cut whatever the configuration lists block by block."""
    for name, value in list(vars(text).items()):
        if name.endswith("layer_idx") and value:
            raise ValueError(f"{name} lets blocks depend on their number")
        if "layer" not in name or not isinstance(value, list | tuple | dict):
            continue
        if value and (isinstance(value, dict) or len(value) != count):
            raise ValueError(f"{name} in the configuration names blocks by number")
        if value:
            setattr(text, name, [value[block] for block in blocks])
    text.num_hidden_layers = len(blocks)


def skeleton(model: Any, config: Any) -> Any:
    """Build a model of the same class without any weights.

    Args:
        model: A model of the class.
        config: Of the new one.
    """
    with torch.device("meta"):
        empty = type(model)(config)
    if hasattr(model, "_weight_conversions"):  # how transformers names it on disk
        empty._weight_conversions = model._weight_conversions
    return empty


def shrunk_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    remains: Remains,
    *,
    inventory: Inventory,
    kept: Mapping[Layer, Units],
) -> dict[str, Tensor]:
    """Cut tensors, leave those of lost blocks out, and count the blocks anew.

    Args:
        model: Whose tensors they are; its weights are not looked at.
        state: The tensors, by the names that they have in memory.
        remains: What stays.
        inventory: The model's layers.
        kept: The units that stay, of every layer that is cut.
    """
    small = dict(state)
    for layer, units in kept.items():
        assert layer.cut is not None, layer.name
        places = units[:, None] * layer.cut.unit + torch.arange(layer.cut.unit)
        rows = layer.cut.axis == "rows"
        name, bias = parameter_of(layer.name), f"{layer.name}.bias"
        lines = places.flatten().to(small[name].device)
        weight = view_of_layer(model, layer.name, small[name])
        assert weight is not None, name
        cut = weight.index_select(0 if rows else 1, lines)
        viewed_back = view_of_layer(model, layer.name, cut)
        assert viewed_back is not None, name
        small[name] = viewed_back.contiguous()
        if rows and bias in small:
            small[bias] = small[bias].index_select(0, lines)
    named = ((_renumbered(name, remains, inventory), small[name]) for name in small)
    return {name: tensor for name, tensor in named if name is not None}


def _renumbered(name: str, remains: Remains, inventory: Inventory) -> str | None:
    """Tell what a tensor is called in the smaller model; None if it is left out."""
    stem = inventory.blocks[0].rpartition(".")[0] + "."
    if not name.startswith(stem):
        return name
    index, _, rest = name.removeprefix(stem).partition(".")
    if int(index) not in remains.blocks:
        return None
    return f"{stem}{remains.blocks.index(int(index))}.{rest}"


def passing_blocks(model: Any, inventory: Inventory) -> frozenset[int]:
    """Find the blocks that hand on what they read once all their layers are zeros.

    Biases and norms behind the sum may make something of nothing, so each block is
    seen at work: once, on a few tokens, with zeros that share the memory of one layer.
    Of a model without weights, those count that have no biases.

    Args:
        model: The dense model.
        inventory: Its layers.
    """
    text = getattr(model, "main_input_name", None) == "input_ids"
    if not text or not any(group.kind == BLOCK for group in inventory.groups):
        return frozenset()
    if next(model.parameters()).is_meta:  # nothing can be seen at work
        each = enumerate(map(model.get_submodule, inventory.blocks))
        return frozenset(index for index, block in each if not _has_bias(block))
    names = {parameter_of(la.name) for la in inventory.layers if la.block is not None}
    shapes = {name: model.get_parameter(name) for name in sorted(names)}
    none = {
        one.dtype: one.new_zeros(max(each.numel() for each in shapes.values()))
        for one in shapes.values()
    }
    zeros = {
        name: none[one.dtype][: one.numel()].view(one.shape)
        for name, one in shapes.items()
    }
    passing: set[int] = set()

    def watch(index: int) -> Any:
        def compare(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if torch.equal(before, after):
                passing.add(index)

        return compare

    blocks = [model.get_submodule(path) for path in inventory.blocks]
    handles = [
        block.register_forward_hook(watch(index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    ids = torch.arange(4)[None] % model.get_input_embeddings().weight.shape[0]
    try:
        with torch.no_grad():
            torch.func.functional_call(model, zeros, kwargs={"input_ids": ids})
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(passing)


def _has_bias(block: Any) -> bool:
    return any(name.endswith("bias") for name, _ in block.named_parameters())
