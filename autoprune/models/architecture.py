"""What a description of a model family says: where blocks, sites and structures are."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class SiteRule:
    """One site of every block.

    Attributes:
        name: Name of the site inside its block: ``qkv``.
        layers: Paths relative to the block, of modules (``self_attn.q_proj``) or of
            3-D parameters that hold one layer an expert (``mlp.experts.down_proj``).
        one_input: True if all modules read the same activations, as q, k and v do.
        optional: True if some blocks lack it, as a shortcut that is the identity.
    """

    name: str
    layers: tuple[str, ...]
    one_input: bool = True
    optional: bool = False


@dataclass(frozen=True, slots=True)
class StructureRule:
    """One structure of every block, whose units may be removed as a whole.

    Attributes:
        name: Name of its site inside the block: ``mlp``.
        kind: ``channels`` or ``heads``.
        makers: Paths of the modules whose rows make the units.
        takers: Paths of the modules whose columns take them.
        units: How many units there are; None for as many channels as the taker reads,
            or as many groups of heads as the model's configuration says.
        norms: Path of the norm behind each maker, which scales its rows one by one;
            empty if there are none.
    """

    name: str
    kind: str
    makers: tuple[str, ...]
    takers: tuple[str, ...]
    units: int | None = None
    norms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamRule:
    """Channels that several blocks write to and read from: a residual stream.

    Attributes:
        name: Name of its site: ``stages.1.stream``.
        makers: Names of the layers in the model whose rows are added to it.
        takers: Names of all layers that read it.
    """

    name: str
    makers: tuple[str, ...]
    takers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HiddenRule:
    """Who reads and who writes the hidden state that passes from block to block.

    Only for families in which nothing else touches it, and whose norms divide by its
    root mean square and do no more than scale: these may be told of it in another
    basis.

    Attributes:
        model_types: Values of ``model.config.model_type`` of which that is true.
        readers: Path of each norm of a block, with the paths of the layers behind it.
        writers: Paths of the layers whose outputs are added to the hidden state.
        norm: Path in the model of the norm before the head.
    """

    model_types: tuple[str, ...]
    readers: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    norm: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """Where the blocks and sites of a model family are.

    Attributes:
        name: Unique, lower case.
        model_types: Values of ``model.config.model_type`` that it describes.
        blocks: Path of the ``nn.ModuleList`` of blocks: ``model.layers``; where they
            are in several lists, a pattern of the blocks, ``stages.*.layers.*``.
        sites: The sites of every block, in the block's order.
        embedding: Path of the token embedding, a site of its own; None to leave it.
        structures: What every block's layers make together; None to have it traced.
        hidden: How the hidden state may be rotated; None if it may not.
        streams: Finds the residual streams of a model whose channels may go; None if
            there are none.
        settings: Values that the model's configuration has to have, too, by name.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    sites: tuple[SiteRule, ...]
    embedding: str | None = None
    structures: tuple[StructureRule, ...] | None = None
    hidden: HiddenRule | None = None
    streams: Callable[[nn.Module], tuple[StreamRule, ...]] | None = None
    settings: tuple[tuple[str, object], ...] = ()

    def fits(self, model: object) -> bool:
        """Tell whether a model is of the family that is described."""
        config = getattr(model, "config", None)
        return getattr(config, "model_type", None) in self.model_types and all(
            getattr(config, name, None) == value for name, value in self.settings
        )
