"""What the codes of a variant mean: grids of integers, and code books of floats.

A format is data: sizes are priced from it without torch, and variants are read by it.
"""

from dataclasses import dataclass
from math import nan
from statistics import NormalDist

INTEGERS = "int"
"""Evenly spaced codes with whole zero points: the format of RTN and GPTQ."""


@dataclass(frozen=True, slots=True)
class Format:
    """What codes mean, and what is stored beside them.

    Attributes:
        values: Number that each code means, before scales; empty where a code is the
            number itself, less a zero point.
        bits: Bits of a code; None where an action chooses.
        group: Weights that share a scale; None where an action chooses.
        scales: Type of the scale of each group: ``layer`` for the layer's own,
            ``e8m0`` or ``e4m3`` for one byte, ``none`` if only the tensor has one.
        float_zeros: True for zero points in the layer's type, which need not be whole.
        tensor_scale: True for one more scale, in float32, over the whole tensor.
    """

    values: tuple[float, ...] = ()
    bits: int | None = None
    group: int | None = None
    scales: str = "layer"
    float_zeros: bool = False
    tensor_scale: bool = False

    @property
    def signed(self) -> bool:
        """True if the highest bit of a code is a sign and the rest a magnitude."""
        return bool(self.values) and self.values[0] == 0

    @property
    def levels(self) -> tuple[float, ...]:
        """Numbers in rising order: all of them, or the magnitudes if ``signed``."""
        if not self.signed:
            return self.values
        half = self.values[: len(self.values) // 2]
        return tuple(value for value in half if value == value)  # NaN is no level

    @property
    def top(self) -> float:
        """The largest number."""
        return self.levels[-1]


def float_values(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """List what the codes of a small float mean: sign, exponent, mantissa.

    An exponent of zero means numbers below the smallest normal one, evenly spaced down
    to zero.

    Example:
        >>> float_values(2, 1, bias=1)[:8]
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    parts = 2**mantissa_bits
    magnitudes = [
        (parts * (exponent > 0) + mantissa) / parts * 2.0 ** (max(exponent, 1) - bias)
        for exponent in range(2**exponent_bits)
        for mantissa in range(parts)
    ]
    return magnitudes + [-magnitude for magnitude in magnitudes]


def normal_quantiles() -> list[float]:
    """List the 16 numbers of NF4: quantiles of a normal distribution, with a zero.

    Seven quantiles below zero and eight above, scaled to [-1, 1]; how far from 0 and 1
    the outermost probabilities lie is the mean of half a step of 15 and of 16 numbers
    (Dettmers et al. 2023, arXiv:2305.14314, Sec. 3).
    """
    outer = 1 - (1 / 30 + 1 / 32) / 2
    below, above = (
        [NormalDist().inv_cdf(outer + (0.5 - outer) * i / n) for i in range(n)]
        for n in (7, 8)
    )
    top = above[0]
    return [-q / top for q in below] + [0.0] + [q / top for q in reversed(above)]


def _e4m3() -> tuple[float, ...]:
    """Spell E4M3 as hardware does: no infinity, and all ones is no number."""
    values = float_values(4, 3, bias=7)
    values[0x7F] = values[0xFF] = nan
    return tuple(values)


_E4M3, _E2M1 = _e4m3(), tuple(float_values(2, 1, bias=1))

FORMATS = {
    INTEGERS: Format(),
    "int_float_zero": Format(float_zeros=True),
    "int_tensor": Format(scales="none", tensor_scale=True),
    "fp8_e4m3": Format(_E4M3, bits=8),
    "fp8_e4m3_tensor": Format(_E4M3, bits=8, scales="none", tensor_scale=True),
    "nf4": Format(tuple(normal_quantiles()), bits=4),
    "mxfp4": Format(_E2M1, bits=4, group=32, scales="e8m0"),
    "nvfp4": Format(_E2M1, bits=4, group=16, scales="e4m3", tensor_scale=True),
}
"""Formats of codes, by name."""
