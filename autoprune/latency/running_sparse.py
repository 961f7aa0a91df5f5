"""The products of a GPU with 2:4 weights: by cuSPARSELt, and torchao's where it is.

cuSPARSELt takes the sparse matrix first: ``y = x W^T`` is run as ``(W x^T)^T``. Its
algorithms differ by much, and their numbers mean other things in other versions.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from autoprune.errors import ProfileError
from autoprune.latency.kernels import Kernel
from autoprune.latency.rounding import (
    FP8,
    FP8_TOP,
    fp8_activations,
    int8_activations,
    to_rows,
)
from autoprune.latency.running_cuda import padded, scaled_back

MOST_ALGORITHMS = 64
"""Algorithms tried at most, whatever the library says of their number."""


def missing(kernel: Kernel) -> str | None:
    """Say why a sparse kernel cannot run here; None if nothing is against it."""
    if kernel.name.startswith("torchao"):
        if find_spec("torchao") is None:
            return "torchao is not installed"
        try:
            _torchao()
        except ProfileError as error:
            return str(error)
        if not hasattr(torch.ops.torchao, "to_sparse_semi_structured_cutlass_sm9x_f8"):
            return "this torchao has no 2:4 kernel for fp8"
        return None
    if not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    return None


def compress(weight: Tensor) -> Tensor:
    """Pack a matrix with two zeros in any four: values, then indices."""
    # A clone: the packing kernel misreads a tensor that starts inside of a storage.
    return torch._cslt_compress(weight.clone(memory_format=torch.contiguous_format))


class SparseProduct:
    """A product by cuSPARSELt, with a choice of algorithm.

    Args:
        kernel: One of the ``cslt`` kernels.
        packed: The weight.
        scales: The weight's own: none for 16 bits, one a row for int8, one for fp8.

    Attributes:
        algorithm: Which one runs; 0 is the library's default.
    """

    def __init__(self, kernel: Kernel, packed: Tensor, scales: Tensor | None) -> None:
        self.algorithm = 0
        self._packed, self._scales, self._pad_m = packed, scales, kernel.pad_m
        self._int8 = kernel.math == "int8"
        # The transposed result spares a copy; where it is refused, it is copied.
        self._transposes = True

    def __call__(self, x: Tensor) -> Tensor:
        """Give ``x @ weight.T``."""
        m = len(x)
        if self._scales is None:
            found = self._multiply(padded(x, self._pad_m)).narrow(0, 0, m)
            return found.contiguous()
        if self._int8:
            codes, of_rows = int8_activations(x)
        else:
            codes, of_tensor = fp8_activations(x, by_row=False)
            # Not as `alpha`: one number is read on the host, which no graph allows.
            of_rows = of_tensor * self._scales
        sums = self._multiply(padded(codes, self._pad_m)).narrow(0, 0, m)
        return scaled_back(sums, of_rows, x.dtype)

    def algorithms(self, x: Tensor) -> list[int]:
        """List the algorithms that can multiply such activations, the default first."""
        codes = padded(x, self._pad_m)
        if self._scales is not None:
            quantized = int8_activations(x) if self._int8 else None
            quantized = quantized or fp8_activations(x, by_row=False)
            codes = padded(quantized[0], self._pad_m)
        before, usable = self.algorithm, list[int]()
        for number in range(min(self._count(codes), MOST_ALGORITHMS)):
            self.algorithm = number
            try:
                self._multiply(codes)
                torch.cuda.synchronize()
            except RuntimeError:
                if not usable:
                    raise  # not even the default one
                continue
            usable.append(number)
        self.algorithm = before
        return usable

    def _multiply(self, codes: Tensor) -> Tensor:
        """Multiply padded activations; scales of rows are applied on the way."""
        options: dict[str, Any] = {"alg_id": self.algorithm}
        if self._scales is not None:
            options["out_dtype"] = torch.bfloat16
        if self._int8:
            options["alpha"] = self._scales
        run = partial(torch._cslt_sparse_mm, self._packed, codes.t(), **options)
        if self._transposes:
            try:
                return run(transpose_result=True)
            except RuntimeError:
                # Another algorithm than the default may fail by itself.
                if self.algorithm or torch.cuda.is_current_stream_capturing():
                    raise
                self._transposes = False
        return run(transpose_result=False).t()

    def _count(self, codes: Tensor) -> int:
        """Ask the library how many algorithms it has for such a product."""
        dtype = None if self._scales is None else torch.bfloat16
        alpha = self._scales if self._int8 else None
        search: Callable[..., Any] | None = getattr(
            getattr(torch._C, "_cusparselt", None), "mm_search", None
        )
        if search is None:
            return torch.backends.cusparselt.get_max_alg_id() or 1
        found = search(self._packed, codes.t(), None, alpha, dtype, self._transposes)
        return int(found[-1])


def _half(kernel: Kernel, weight: Tensor) -> SparseProduct:
    packed = compress(weight.to(getattr(torch, kernel.dtype)))
    return SparseProduct(kernel, packed, None)


def _int8(kernel: Kernel, weight: Tensor) -> SparseProduct:
    codes, scales = to_rows(weight, 127)
    return SparseProduct(kernel, compress(codes.to(torch.int8)), scales)


def _fp8(kernel: Kernel, weight: Tensor) -> SparseProduct:
    scale = (weight.abs().amax() / FP8_TOP).float()
    return SparseProduct(kernel, compress((weight / scale).to(FP8)), scale)


def _torchao() -> Any:
    """Import torchao, which registers its kernels.

    Raises:
        ProfileError: If it does not import.
    """
    try:
        return import_module("torchao.ops")
    except Exception as error:  # its binaries fail in many ways
        raise ProfileError(f"torchao does not import: {error}") from error


def _torchao_row(_kernel: Kernel, weight: Tensor) -> partial[Tensor]:
    scales = (weight.abs().amax(1, keepdim=True) / FP8_TOP).float()
    codes = (weight / scales).to(FP8).contiguous()
    packed, indices = _torchao().to_sparse_semi_structured_cutlass_sm9x_f8(codes)
    return partial(_run_torchao, packed, indices, scales.squeeze(1))


def _run_torchao(packed: Tensor, indices: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    codes, own = fp8_activations(x, by_row=True)
    run = torch.ops.torchao.rowwise_scaled_linear_sparse_cutlass_f8f8
    found: Tensor = run(codes, own.squeeze(1), packed, indices, scales, None, x.dtype)
    return found


MAKERS: dict[str, Callable[[Kernel, Tensor], Callable[[Tensor], Tensor]]] = {
    "cslt.24.bf16": _half,
    "cslt.24.fp16": _half,
    "cslt.24.int8": _int8,
    "cslt.24.fp8": _fp8,
    "torchao.24.fp8.row": _torchao_row,
}
