"""What people should know of a policy that is written in compressed-tensors."""

from collections import Counter
from collections.abc import Iterator, Mapping

from autoprune.compression.storage import Storage
from autoprune.policy import Layer
from autoprune.targets.compressed_tensors_schemes import SERVED_BITS, Scheme

Schemes = Mapping[Layer, Scheme | None]
"""How each layer is quantized; None where it is not."""

_MARLIN = 128
"""Inputs of a layer that SGLang's kernel for packed integers takes are multiples."""


def notes_of(
    schemes: Schemes, storages: Mapping[Layer, Storage], *, everywhere: bool
) -> list[str]:
    """Tell what is quantized how, what runtimes add, and what takes its full size.

    Args:
        schemes: How each layer is quantized.
        storages: What each layer stores.
        everywhere: True if SGLang has to load them as well as vLLM.
    """
    counts = Counter(scheme.name for scheme in schemes.values() if scheme)
    told = ", ".join(f"{count} layers {name}" for name, count in counts.items())
    return [
        told or "nothing is quantized: a plain folder",
        *_of_inputs(schemes),
        *_of_zeros(storages),
        *_of_kernels(schemes, everywhere=everywhere),
    ]


def _of_inputs(schemes: Schemes) -> Iterator[str]:
    """Tell of layers whose activations are rounded."""
    rounded = [one for one in schemes.values() if one and one.rounds_inputs]
    if rounded:
        yield (
            f"{len(rounded)} layers run with activations rounded to 8 bits, which no "
            "figure here contains; rtn(bits=8, group=128) rounds weights alone"
        )
    if any(scheme.strategy == "tensor" for scheme in rounded):
        yield (
            "where a matrix has one scale, runtimes round fused layers again to the "
            "largest of theirs, and transformers rounds the scale; fp8(per=row) is "
            "kept as it is"
        )


def _of_zeros(storages: Mapping[Layer, Storage]) -> Iterator[str]:
    """Tell of what the format has no smaller form for."""
    own = [one for one in storages.values() if one.mask and one.units is None]
    if masked := sum(one.kept > 0 for one in own):
        yield f"{masked} pruned layers keep their zeros at full size"
    if low := sum(one.low_rank is not None for one in storages.values()):
        yield f"{low} products of low rank are written as values of full size"


def _of_kernels(schemes: Schemes, *, everywhere: bool) -> Iterator[str]:
    """Tell of layers that only some kernels run."""
    packed = {
        layer: scheme
        for layer, scheme in schemes.items()
        if scheme and scheme.format == "pack-quantized"
    }
    if odd := {scheme.bits for scheme in packed.values()} - set(SERVED_BITS):
        bits = ", ".join(map(str, sorted(odd)))
        yield (
            f"{bits} bits: packed as compressed-tensors 0.18 and later do; in vLLM "
            "only Humming's kernels run them"
        )
    narrow = sum(layer.shape[1] % _MARLIN > 0 for layer in packed)
    if narrow and everywhere:
        yield (
            f"{narrow} packed layers have inputs that are no multiple of {_MARLIN}, "
            "which vLLM pads and SGLang's kernel may not take"
        )
