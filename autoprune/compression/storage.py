"""What a variant stores, declared without making it: the base of every size.

Sizes are exact because declared storages and packed variants share one table of parts.
"""

from dataclasses import dataclass, replace
from math import ceil, prod

from torch import nn

from autoprune.compression.formats import FORMATS, INTEGERS
from autoprune.models.layers import Inventory, untouched_parameters
from autoprune.policy import Layer

BITMAP = "bitmap"
"""Mask of one bit a weight, for any pattern of zeros."""

Tile = tuple[int, int]
"""Rows and columns of a tile; ``1x8`` in text."""

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "float8_e4m3fn": 1,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element, by the name of its type."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a stored variant: its type by name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Storage:
    """What one variant of a layer stores.

    Attributes:
        shape: ``(out, in)``.
        dtype: Type of unquantized values and of scales.
        kept: Number of weights that are stored; the others are zeros.
        mask: None if all are kept, ``bitmap``, the ``N:M`` pattern that it follows, or
            the ``RxC`` tiles that are kept or removed as a whole.
        bits: Bits of a code; None for unquantized values.
        group: Weights of a row that share a scale; None for a whole row.
        symmetric: True if there are no zero points.
        code: What codes mean, by the name of a format; see ``formats``.
        channel_scales: True if each input has a scale of its own beside the codes.
        low_rank: Rank of two factors whose product is added; None without. Where
            ``kept`` is 0 without a mask, the product is all there is.
        units: How many units of its structure are kept, the same ones in all layers of
            the site; None if the layer's zeros are its own.
        hidden: How many directions of the hidden state the layer has to do with, the
            same ones in all layers of the model, told in the old basis: the weight is
            as large as ever until it is rotated and cut. None if with all.
        bias: True if something is added to the layer's bias.
        permuted: True if the mask follows its ``N:M`` pattern in an order of the
            columns that is stored with it, not in the layer's own.
    """

    shape: tuple[int, int]
    dtype: str
    kept: int
    mask: str | None = None
    bits: int | None = None
    group: int | None = None
    symmetric: bool = False
    code: str = INTEGERS
    channel_scales: bool = False
    low_rank: int | None = None
    units: int | None = None
    hidden: int | None = None
    bias: bool = False
    permuted: bool = False

    @classmethod
    def dense(cls, layer: Layer) -> "Storage":
        """Declare the untouched layer."""
        return cls(layer.shape, layer.dtype, layer.numel)

    def masked(
        self, kept: int, mask: str, *, units: int | None = None, permuted: bool = False
    ) -> "Storage":
        """Declare the same with only ``kept`` weights left, or so many whole units."""
        return replace(self, kept=kept, mask=mask, units=units, permuted=permuted)

    def narrowed(self, layer: Layer, hidden: int) -> "Storage":
        """Declare the same with so many directions of the hidden state left."""
        assert layer.hidden is not None, layer.name
        width = layer.shape[0] if layer.hidden.axis == "rows" else layer.shape[1]
        return replace(self, kept=self.numel // width * hidden, hidden=hidden)

    def biased(self) -> "Storage":
        """Declare the same with something added to the layer's bias."""
        return replace(self, bias=True)

    def quantized(
        self,
        bits: int,
        group: int | None,
        symmetric: bool,
        *,
        code: str = INTEGERS,
        channel_scales: bool = False,
    ) -> "Storage":
        """Declare the same with codes in the place of values."""
        return replace(
            self,
            bits=bits,
            group=group,
            symmetric=symmetric,
            code=code,
            channel_scales=channel_scales,
        )

    def coded(self, code: str, group: int | None) -> "Storage":
        """Declare the same with codes of a code book, by the name of its format."""
        bits = FORMATS[code].bits
        assert bits is not None, f"{code} has no code book"
        return self.quantized(bits, group, symmetric=True, code=code)

    def factored(self, rank: int, *, alone: bool = False) -> "Storage":
        """Declare the same with two low-rank factors beside it, or ``alone``."""
        base = replace(self, kept=0) if alone else self
        return replace(base, low_rank=rank)

    @property
    def stored(self) -> int:
        """Number of weights and of factors' numbers: all that a token meets."""
        return self.kept + (self.low_rank or 0) * sum(self.shape)

    @property
    def is_factored_alone(self) -> bool:
        """True if there is nothing but the product of two factors."""
        return self.low_rank is not None and not self.kept and self.mask is None

    @property
    def numel(self) -> int:
        """Number of weights, kept or not."""
        return self.shape[0] * self.shape[1]

    @property
    def groups(self) -> int:
        """Number of scales a row; 0 without quantization."""
        if self.bits is None:
            return 0
        return ceil(self.shape[1] / self.group) if self.group else 1

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zeros, in [0, 1]."""
        return 1 - self.kept / self.numel

    @property
    def parts(self) -> dict[str, Part]:
        """The tensors, by name, as the store and the ``packed`` target hold them.

        ``values`` or ``codes`` of the kept weights row by row; ``mask``; ``scales`` and
        ``zeros`` of every row and group; ``tensor_scale``; ``channel_scales`` of every
        input. Codes, whole zero points and the mask are packed without gaps, least
        significant bit first. ``low_rank_a`` and ``low_rank_b`` are the factors.
        ``added_bias`` is added to the layer's own. Where there is an ``order``, values,
        codes and mask are stored with their columns in it.
        """
        parts: dict[str, Part] = {}
        if self.bias:
            parts["added_bias"] = Part(self.dtype, (self.shape[0],))
        if self.low_rank is not None:
            rows, columns = self.shape
            parts["low_rank_a"] = Part(self.dtype, (rows, self.low_rank))
            parts["low_rank_b"] = Part(self.dtype, (self.low_rank, columns))
        if self.is_factored_alone:
            return parts
        if self.bits is None:
            shape = self.shape if self.mask is None else (self.kept,)
            parts["values"] = Part(self.dtype, shape)
        else:
            parts["codes"] = Part("uint8", (packed_bytes(self.kept, self.bits),))
            parts |= self._scale_parts(self.bits)
        if self.mask is not None:
            bits = self.index_bits
            tiles = self.numel // prod(self.tile)
            size = packed_bytes(self.kept, bits) if bits else packed_bytes(tiles, 1)
            parts["mask"] = Part("uint8", (size,))
        if self.permuted:
            parts["order"] = Part(self.order_dtype, (self.shape[1],))
        return parts

    @property
    def order_dtype(self) -> str:
        """Type of the column numbers of an order: the smallest that holds them."""
        return "int16" if self.shape[1] <= 1 << 15 else "int32"

    def _scale_parts(self, bits: int) -> dict[str, Part]:
        """Name what turns codes into weights."""
        form, shape = FORMATS[self.code], (self.shape[0], self.groups)
        parts: dict[str, Part] = {}
        if form.scales != "none":
            dtype = self.dtype if form.scales == "layer" else "uint8"
            parts["scales"] = Part(dtype, shape)
        if form.float_zeros:
            parts["zeros"] = Part(self.dtype, shape)
        elif not self.symmetric:
            count = packed_bytes(shape[0] * shape[1], bits)
            parts["zeros"] = Part("uint8", (count,))
        if form.tensor_scale:
            parts["tensor_scale"] = Part("float32", (1,))
        if self.channel_scales:
            parts["channel_scales"] = Part(self.dtype, (self.shape[1],))
        return parts

    @property
    def index_bits(self) -> int:
        """Bits that tell where in its M each kept weight of an ``N:M`` pattern stands.

        2 for 2:4; 0 where a bitmap is no larger than the indices, as for 4:8.
        """
        if self.mask is None or ":" not in self.mask:
            return 0
        keep, of = (int(number) for number in self.mask.split(":"))
        bits = (of - 1).bit_length()
        return bits if keep * bits <= of else 0

    @property
    def tile(self) -> Tile:
        """Rows and columns of the weights that share one bit of the mask.

        A single weight unless the mask names a tile, as ``16x16`` or ``1x8`` do.
        """
        if self.mask is None or self.mask == BITMAP or ":" in self.mask:
            return 1, 1
        rows, columns = (int(number) for number in self.mask.split("x"))
        fits = not (self.shape[0] % rows or self.shape[1] % columns)
        assert fits, f"tiles of {self.mask} do not fill {self.shape}"
        return rows, columns

    @property
    def nbytes(self) -> int:
        """Bytes of all parts; of a layer that is to be cut, after the cut."""
        if self.hidden is not None:
            return self.kept * ITEM_BYTES[self.dtype]
        return sum(part.nbytes for part in self.parts.values())


def untouched_parts(model: nn.Module, inventory: Inventory) -> dict[str, Part]:
    """List what a checkpoint stores beside the layers; see ``untouched_parameters``."""
    found = untouched_parameters(model, inventory)
    return {name: Part(*about) for name, about in found.items()}


def packed_bytes(count: int, bits: int) -> int:
    """Count the bytes of ``count`` numbers of ``bits`` bits, packed without gaps."""
    return (count * bits + 7) // 8
