"""What a variant stores, declared without making it: the base of every size.

Sizes are exact because declared storages and packed variants share one table of parts.
"""

from dataclasses import dataclass, replace
from math import ceil, prod

from autoprune.policy import Layer

BITMAP = "bitmap"
"""Mask of one bit a weight, for any pattern of zeros."""

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
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
        mask: None if all are kept, ``bitmap``, or the ``N:M`` pattern it follows.
        bits: Bits of a code; None for unquantized values.
        group: Weights of a row that share a scale; None for a whole row.
        symmetric: True if there are no zero points.
    """

    shape: tuple[int, int]
    dtype: str
    kept: int
    mask: str | None = None
    bits: int | None = None
    group: int | None = None
    symmetric: bool = False

    @classmethod
    def dense(cls, layer: Layer) -> "Storage":
        """Declare the untouched layer."""
        return cls(layer.shape, layer.dtype, layer.numel)

    def masked(self, kept: int, mask: str) -> "Storage":
        """Declare the same with only ``kept`` weights left."""
        return replace(self, kept=kept, mask=mask)

    def quantized(self, bits: int, group: int | None, symmetric: bool) -> "Storage":
        """Declare the same with codes in the place of values."""
        return replace(self, bits=bits, group=group, symmetric=symmetric)

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
        ``zeros`` of every row and group. Codes, zero points and the mask are packed
        without gaps, least significant bit first.
        """
        parts: dict[str, Part] = {}
        if self.bits is None:
            shape = self.shape if self.mask is None else (self.kept,)
            parts["values"] = Part(self.dtype, shape)
        else:
            scales = (self.shape[0], self.groups)
            parts["codes"] = Part("uint8", (packed_bytes(self.kept, self.bits),))
            parts["scales"] = Part(self.dtype, scales)
            if not self.symmetric:
                count = packed_bytes(scales[0] * scales[1], self.bits)
                parts["zeros"] = Part("uint8", (count,))
        if self.mask is not None:
            bits = self.index_bits
            size = (
                packed_bytes(self.kept, bits) if bits else packed_bytes(self.numel, 1)
            )
            parts["mask"] = Part("uint8", (size,))
        return parts

    @property
    def index_bits(self) -> int:
        """Bits that tell where in its M each kept weight of an ``N:M`` pattern stands.

        2 for 2:4; 0 where a bitmap is no larger than the indices, as for 4:8.
        """
        if self.mask is None or self.mask == BITMAP:
            return 0
        keep, of = (int(number) for number in self.mask.split(":"))
        bits = (of - 1).bit_length()
        return bits if keep * bits <= of else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def packed_bytes(count: int, bits: int) -> int:
    """Count the bytes of ``count`` numbers of ``bits`` bits, packed without gaps."""
    return (count * bits + 7) // 8
