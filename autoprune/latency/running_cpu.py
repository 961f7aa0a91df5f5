"""The products of a CPU: plain, with 8-bit activations, with 8- and 4-bit weights."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from autoprune.latency.kernels import GROUPS, Kernel
from autoprune.latency.rounding import to_groups, to_rows


def missing(kernel: Kernel) -> str | None:
    """Say why a kernel cannot run on this CPU; None if nothing is against it."""
    engine = kernel.name.removeprefix("cpu.int8.")
    if engine == kernel.name:
        return None
    known = torch.backends.quantized.supported_engines
    if engine not in known:
        return f"this torch has no engine {engine!r}, only {', '.join(known)}"
    if not hasattr(torch.ops.quantized, "linear_dynamic"):
        return "this torch has no quantized.linear_dynamic any more"
    return None


def _plain(kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    packed = weight.to(getattr(torch, kernel.dtype), copy=True)
    return partial(_linear, packed)


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)


def _dynamic(kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    """Pack for int8 x int8 with activations quantized at every call.

    By the operators under ``torch.ao.quantization``, which is to go. The engine decides
    how the weight is packed, and the packed weight knows from then on.
    """
    codes, scales = to_rows(weight, 127)
    with _engine(kernel.name.rpartition(".")[2]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tells that quantized tensors are to go
        zeros = torch.zeros(len(scales), dtype=torch.long)
        stored = torch._make_per_channel_quantized_tensor(
            codes.to(torch.int8), scales.double(), zeros, 0
        )
        packed = torch.ops.quantized.linear_prepack(stored, None)
    # Without VNNI sums of two products may overflow 16 bits: activations get 7 bits.
    narrow = not getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    return partial(_run_dynamic, packed, narrow)


def _run_dynamic(packed: object, narrow: bool, x: Tensor) -> Tensor:
    found: Tensor = torch.ops.quantized.linear_dynamic(x, packed, narrow)
    return found


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """Set the engine of quantized operators, which is global, for a block."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _eight(kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    codes, scales = to_rows(weight, 127)
    dtype = getattr(torch, kernel.dtype)
    return partial(_run_eight, codes.to(torch.int8), scales.to(dtype))


def _run_eight(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x, codes, scales)


def _four(kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    group = int(kernel.name.rpartition(".g")[2])
    codes, scales_zeros = to_groups(weight, group)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    dtype = getattr(torch, kernel.dtype)
    return partial(_run_four, packed, group, scales_zeros.to(dtype))


def _run_four(packed: Tensor, group: int, scales_zeros: Tensor, x: Tensor) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, packed, group, scales_zeros)


MAKERS = {
    **{f"cpu.linear.{short}": _plain for short in ("fp32", "fp16", "bf16")},
    "cpu.int8.onednn": _dynamic,
    "cpu.int8.x86": _dynamic,
    "cpu.int8pack_mm": _eight,
    **{f"cpu.int4pack_mm.g{group}": _four for group in GROUPS},
}
