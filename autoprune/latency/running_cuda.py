"""The products of a GPU without sparsity, by what torch itself brings."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from autoprune.latency.kernels import GROUPS, Kernel
from autoprune.latency.rounding import (
    FP8,
    FP8_TOP,
    fp8_activations,
    int8_activations,
    to_groups,
    to_rows,
)


def _plain(kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    packed = weight.to(getattr(torch, kernel.dtype), copy=True)
    return partial(_linear, packed)


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return linear(x, weight)


def _int8(kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    codes, scales = to_rows(weight, 127)
    dtype = getattr(torch, kernel.dtype)
    return partial(_run_int8, codes.to(torch.int8), scales.to(dtype), kernel.pad_m)


def _run_int8(weight: Tensor, scales: Tensor, pad_m: int, x: Tensor) -> Tensor:
    """Quantize, multiply in int8, scale back: W8A8 with a scale a token."""
    codes, of_rows = int8_activations(x)
    m = len(x)
    sums = torch._int_mm(padded(codes, pad_m), weight.t()).narrow(0, 0, m)
    return scaled_back(sums, of_rows, x.dtype).mul_(scales)


def padded(x: Tensor, multiple: int) -> Tensor:
    """Append rows of zeros up to a multiple."""
    short = -len(x) % multiple
    return pad(x, (0, 0, 0, short)) if short else x


def scaled_back(sums: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply by scales into a type, contiguous, in one pass."""
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    return torch.mul(sums, scales, out=out)


def _fp8_tensor(_kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    scale = (weight.abs().amax() / FP8_TOP).float()
    return partial(_run_fp8, (weight / scale).to(FP8), scale, False)


def _fp8_row(_kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    scales = (weight.abs().amax(1, keepdim=True) / FP8_TOP).float()
    codes = (weight / scales).to(FP8)
    return partial(_run_fp8, codes, scales.t().contiguous(), True)


def _run_fp8(weight: Tensor, scales: Tensor, by_row: bool, x: Tensor) -> Tensor:
    codes, own = fp8_activations(x, by_row=by_row)
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=own,
        scale_b=scales,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )


def _four(kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    group = int(kernel.name.rpartition(".g")[2])
    codes, scales_zeros = to_groups(weight, group)
    even, odd = codes.to(torch.uint8).reshape(len(codes), -1, 2).unbind(-1)
    pairs = (even << 4) | odd  # the even input in the high half
    # Tiles of 16 inputs that are packed side by side: as many as the inputs allow.
    tiles = 8 if weight.shape[1] % 128 == 0 else 4
    packed = torch._convert_weight_to_int4pack(pairs, tiles)
    return partial(_run_four, packed, group, scales_zeros.to(torch.bfloat16))


def _run_four(packed: Tensor, group: int, scales_zeros: Tensor, x: Tensor) -> Tensor:
    return torch._weight_int4pack_mm(x, packed, group, scales_zeros)


MAKERS = {
    **{f"torch.mm.{short}": _plain for short in ("fp32", "fp16", "bf16")},
    "torch.int_mm": _int8,
    "torch.scaled_mm.tensor": _fp8_tensor,
    "torch.scaled_mm.row": _fp8_row,
    **{f"torch.int4pack_mm.g{group}": _four for group in GROUPS},
}
