"""Where a policy acts: layers, and the sites that they make up. Without torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the units of a structure lie in one of its layers.

    The units are the channels of an MLP, or the heads of an attention in groups that
    share keys and values. One unit is ``unit`` consecutive rows of the layers that make
    it, and as many columns of the layer that takes it. Of the hidden state, units are
    so many directions, and an embedding makes them as columns.

    Attributes:
        kind: ``channels``, ``heads``, ``hidden`` or ``stream``.
        axis: ``rows`` of a layer that makes units, ``columns`` of one that takes them.
        unit: Rows or columns of one unit.
        units: How many units there are.
    """

    kind: str
    axis: str
    unit: int
    units: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight matrix, always seen as ``[out, in]``.

    Attributes:
        name: Path of the parameter in the model, without ``.weight``; a slice of a
            3-D parameter of experts carries its index, ``...down_proj[3]``.
        shape: ``(out, in)``.
        dtype: Type of the stored weight, as torch spells it: ``"bfloat16"``.
        block: Index of the decoder block; None outside of all blocks.
        role: What the layer is in its block: ``q_proj``, ``down_proj`` ...
        input: Layers with equal ``input`` read the same activations and share their
            statistics; None where there are none to take (an embedding).
        uses: How often one token passes: 1, or experts chosen over experts there are;
            of a convolution, how many patches of one image.
        cut: Where the units of its structure lie; None if it is part of none.
        hidden: Where the directions of the hidden state lie, or the channels of a
            residual stream; None where the model does not allow to remove them.
        norm: Path of the norm that scales each of its outputs by a factor of its own;
            None if none is known.
        kernel: Columns of one input channel, which stand side by side: the places of a
            convolution's kernel.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    block: int | None
    role: str
    input: str | None
    uses: float = 1.0
    cut: Cut | None = field(default=None, compare=False)
    hidden: Cut | None = field(default=None, compare=False)
    norm: str | None = field(default=None, compare=False)
    kernel: int = field(default=1, compare=False)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Site:
    """A place where a policy acts: layers that share one action.

    Attributes:
        name: Unique, dotted: ``blocks.3.qkv``. Never holds a ``/``: Ray would nest it.
        layers: The layers, in the model's order.
        kind: What is acted on: ``weights`` for matrices as a whole; ``channels`` or
            ``heads`` where units of all layers go together; ``block``; ``embedding``;
            ``stream`` for the channels that several blocks share; ``hidden`` for the
            whole model, whose layers share the hidden state.
    """

    name: str
    layers: tuple[Layer, ...]
    kind: str = "weights"

    @property
    def numel(self) -> int:
        """Number of weights in all layers."""
        return sum(one.numel for one in self.layers)

    def part(self, layer: Layer) -> str:
        """Name the site that one of the layers has alone where none are fused."""
        last = layer.name.rpartition(".")[2].replace("[", ".").rstrip("]")
        return f"{self.name}.{last}" if len(self.layers) > 1 else self.name
