"""What a description of a model family says: where blocks, sites and structures are."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SiteRule:
    """One site of every block.

    Attributes:
        name: Name of the site inside its block: ``qkv``.
        layers: Paths relative to the block, of modules (``self_attn.q_proj``) or of
            3-D parameters that hold one layer an expert (``mlp.experts.down_proj``).
        one_input: True if all modules read the same activations, as q, k and v do.
    """

    name: str
    layers: tuple[str, ...]
    one_input: bool = True


@dataclass(frozen=True, slots=True)
class StructureRule:
    """One structure of every block, whose units may be removed as a whole.

    Attributes:
        name: Name of its site inside the block: ``mlp``.
        kind: ``channels`` or ``heads``.
        makers: Paths of the modules whose rows make the units.
        takers: Paths of the modules whose columns take them.
        units: How many units there are; None for as many channels as the taker has
            columns, or as many groups of heads as the model's configuration says.
    """

    name: str
    kind: str
    makers: tuple[str, ...]
    takers: tuple[str, ...]
    units: int | None = None


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
        blocks: Path of the ``nn.ModuleList`` of blocks: ``model.layers``.
        sites: The sites of every block, in the block's order.
        embedding: Path of the token embedding, a site of its own; None to leave it.
        structures: What every block's layers make together; None to have it traced.
        hidden: How the hidden state may be rotated; None if it may not.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    sites: tuple[SiteRule, ...]
    embedding: str | None = None
    structures: tuple[StructureRule, ...] | None = None
    hidden: HiddenRule | None = None
