"""The shape of a compressed model: all of it that time depends on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

DENSE = "dense"
"""The format of a matrix that is multiplied in the workload's own type."""

SPARSE = "2:4"
"""The format of a matrix of which two of any four weights in a row are zeros."""


NORM, ROPE, GATE, ADD = ELEMENTWISE = ("rms_norm", "rope", "silu_mul", "add")
"""Operations that go number by number: norms, rotations, gates, sums."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One product of activations with a weight.

    Attributes:
        name: Of the layer, for people.
        n: Outputs, after what is removed as a whole.
        k: Inputs, likewise.
        format: How the weight is stored and multiplied: ``dense``; ``int8`` and
            ``fp8-row`` or ``fp8-tensor`` with activations in the same type;
            ``int4-g64`` for the weight alone in groups; ``2:4``; ``2:4+int8``.
            Zeros without such a pattern are ``dense``: no kernel skips them.
        uses: How often one token passes: experts chosen over experts there are.
    """

    name: str
    n: int
    k: int
    format: str = DENSE
    uses: float = 1.0


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention of one block.

    Attributes:
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
    """

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block.

    Attributes:
        linears: Its products, without those of which nothing is left.
        attention: None where no head is left.
        parts: Share of a whole block's other work that is left, from 0 to 1: half
            belongs to the attention, half to the MLP. A block without any costs none.
        channels: Width of the MLP, after what is removed; 0 where nothing is left.
    """

    linears: tuple[Linear, ...]
    attention: Attention | None
    parts: float = 1.0
    channels: int = 0

    def elementwise(self, hidden: int) -> tuple[tuple[str, int], ...]:
        """List the operations that go number by number, each with its width."""
        found: tuple[tuple[str, int], ...] = ()
        if self.attention is not None:
            found += of_attention(self.attention, hidden)
        return found + (of_mlp(self.channels, hidden) if self.channels else ())


def of_attention(attention: Attention, hidden: int) -> tuple[tuple[str, int], ...]:
    """List what goes number by number around an attention."""
    heads = attention.heads + attention.kv_heads
    turned = (ROPE, heads * attention.head_dim)
    return (NORM, hidden), turned, (ADD, hidden)


def of_mlp(channels: int, hidden: int) -> tuple[tuple[str, int], ...]:
    """List what goes number by number around an MLP."""
    return (NORM, hidden), (GATE, channels), (ADD, hidden)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A whole model.

    Attributes:
        blocks: In order.
        head: The output layer, which reads the last position of each sequence; None
            for a model without one.
        hidden: Width of the hidden state.
    """

    blocks: tuple[Block, ...]
    head: Linear | None
    hidden: int

    def in_format(self, format: str) -> "ModelShape":
        """Give the shape with every matrix of the blocks in one format."""
        blocks = (
            replace(
                block, linears=tuple(replace(x, format=format) for x in block.linears)
            )
            for block in self.blocks
        )
        return replace(self, blocks=tuple(blocks))


def llama_shape(
    *,
    hidden: int,
    width: int | Sequence[int],
    heads: int,
    kv_heads: int,
    vocabulary: int,
    blocks: int,
    head_dim: int | None = None,
    formats: Sequence[str] = (DENSE,),
) -> ModelShape:
    """Build the shape of a model of Llama's kind.

    Args:
        hidden: Width of the hidden state.
        width: Channels of the MLP; a sequence gives each block its own.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        vocabulary: Rows of the head.
        blocks: How many.
        head_dim: Width of a head; ``hidden / heads`` by default.
        formats: Of the blocks' matrices, in turns.
    """
    dim = head_dim or hidden // heads
    widths = [width] * blocks if isinstance(width, int) else list(width)
    made = []
    for index, channels in enumerate(widths):
        sizes = {
            "q_proj": (heads * dim, hidden),
            "k_proj": (kv_heads * dim, hidden),
            "v_proj": (kv_heads * dim, hidden),
            "o_proj": (hidden, heads * dim),
            "gate_proj": (channels, hidden),
            "up_proj": (channels, hidden),
            "down_proj": (hidden, channels),
        }
        kind = formats[index % len(formats)]
        linears = tuple(
            Linear(f"blocks.{index}.{name}", n, k, kind)
            for name, (n, k) in sizes.items()
        )
        attention = Attention(heads, kv_heads, dim)
        made.append(Block(linears, attention, channels=channels))
    head = Linear("head", vocabulary, hidden)
    return ModelShape(tuple(made), head, hidden)
