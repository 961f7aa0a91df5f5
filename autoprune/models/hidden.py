"""The hidden state that all blocks read and write, where a model lets it be rotated.

A norm that divides by the root mean square sees only the length of a vector, which no
rotation changes; what it scales by can move into the layers behind it. So the hidden
state may be told in any orthonormal basis, if all that read and write it are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

from torch import nn

from autoprune.models.architecture import Architecture, HiddenRule
from autoprune.models.weights import parameter_of
from autoprune.policy import Layer
from autoprune.sites import Cut

HIDDEN = "hidden"
"""Kind and name of the site that is the whole model, and kind of its units."""

KERNEL = 8
"""Widths are a multiple of so many directions, as in the paper of SliceGPT."""


@dataclass(frozen=True, slots=True)
class HiddenState:
    """Where a model reads, writes and norms its hidden state.

    Attributes:
        width: How many directions it has.
        readers: Path of each norm inside of blocks, with the names of the layers that
            read what it gives.
        writers: Names of the layers whose outputs are added to it.
        embedding: Name of the layer that it begins with.
        norm: Path of the norm before the head.
        head: Name of the layer that makes logits.
        tied: True if the head's weight is the embedding's.
    """

    width: int
    readers: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    embedding: str
    norm: str
    head: str
    tied: bool

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of all norms."""
        return (*(norm for norm, _ in self.readers), self.norm)


def hidden_state(
    model: Any, architecture: Architecture, blocks: int
) -> HiddenState | None:
    """Find the hidden state of a model; None if it cannot be rotated.

    Every parameter as wide as the hidden state has to be known: a bias of a writer, a
    router or another norm would see the rotation.

    Args:
        model: The model.
        architecture: Its description.
        blocks: How many blocks it has.
    """
    rule, embedding = architecture.hidden, architecture.embedding
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if rule is None or embedding is None or kind not in rule.model_types:
        return None
    if not isinstance(head, nn.Linear):
        return None
    table = model.get_submodule(embedding).weight
    found = HiddenState(
        width=table.shape[1],
        readers=tuple(_readers(architecture, rule, blocks)),
        writers=tuple(
            f"{architecture.blocks}.{block}.{path}"
            for block in range(blocks)
            for path in rule.writers
        ),
        embedding=embedding,
        norm=rule.norm,
        head=next(name for name, one in model.named_modules() if one is head),
        tied=head.weight is table,
    )
    return found if _is_complete(model, found) else None


def hidden_cuts(
    state: HiddenState, layers: Mapping[str, Layer], heads: int
) -> dict[str, Cut]:
    """Tell where in each layer the directions of the hidden state lie.

    Args:
        state: The hidden state.
        layers: The layers by name.
        heads: Heads of an attention: checkpoints want a multiple of them as width.
    """
    wanted = (lcm(KERNEL, heads), heads, KERNEL)
    unit = next((size for size in wanted if state.width % size == 0), 1)
    units = state.width // unit
    read = {name for _, names in state.readers for name in names}
    axes = dict.fromkeys(read | {state.embedding}, "columns")
    axes |= dict.fromkeys(state.writers, "rows")
    return {
        name: Cut(HIDDEN, axis, unit, units)
        for name, axis in axes.items()
        if name in layers
    }


def _readers(
    architecture: Architecture, rule: HiddenRule, blocks: int
) -> Iterator[tuple[str, tuple[str, ...]]]:
    for block in range(blocks):
        stem = f"{architecture.blocks}.{block}"
        for norm, paths in rule.readers:
            yield f"{stem}.{norm}", tuple(f"{stem}.{path}" for path in paths)


def _is_complete(model: nn.Module, state: HiddenState) -> bool:
    """Tell whether all parameters are there, and no other is as wide."""
    readers = [name for _, names in state.readers for name in names]
    layers = [*readers, *state.writers, state.embedding, state.head, *state.norms]
    known = {parameter_of(name) for name in layers}
    # Biases behind a reader are of another basis, however many they are.
    biases = {f"{name}.bias" for name in (*readers, state.head)}
    named = dict(model.named_parameters(remove_duplicate=False))
    others = named.keys() - known - biases
    strange = any(state.width in named[name].shape for name in others)
    return known <= named.keys() and not strange
