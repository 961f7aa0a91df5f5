"""A variant: one layer under one action, its numbers as they will be stored."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from autoprune.compression.codebooks import (
    decode,
    scales_from_bytes,
    scales_to_bytes,
)
from autoprune.compression.formats import FORMATS, INTEGERS
from autoprune.compression.packing import pack_bits, unpack_bits
from autoprune.compression.selection import (
    in_order,
    out_of_order,
    pack_mask,
    scatter,
    take,
    unpack_mask,
)
from autoprune.compression.storage import BITMAP, Storage
from autoprune.models.biases import with_bias

Factors = tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]
"""Two matrices of low rank, in the order of their product."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One layer under one action, unpacked.

    Attributes:
        storage: What it stores when packed.
        values: Unquantized weights, ``+0.0`` where pruned; None when quantized.
        codes: Codes, 0 where pruned; None without quantization.
        scales: Step of each row and group, in the layer's type, or in float32 where
            one byte is stored; None if only the tensor has one.
        zeros: Code that means zero, per row and group; need not be whole where the
            format has float zero points; None when symmetric.
        mask: True where a weight is kept; None if all are.
        tensor_scale: Step of the whole tensor, in float32; None if there is none.
        channel_scales: What each input's weights were multiplied by before they were
            rounded, in the layer's type; None if by nothing.
        low_rank: Two factors, in the layer's type, whose product is added; None if
            there are none.
        bias: What is added to the layer's bias, in the layer's type; None if nothing.
        order: Columns in the order in which the mask follows its ``N:M`` pattern; None
            if it does in their own. Everything else here stays in their own order.
    """

    storage: Storage
    values: Float[Tensor, "out in"] | None = None
    codes: UInt8[Tensor, "out in"] | None = None
    scales: Float[Tensor, "out groups"] | None = None
    zeros: UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"] | None = None
    mask: Bool[Tensor, "out in"] | None = None
    tensor_scale: Float[Tensor, " 1"] | None = None
    channel_scales: Float[Tensor, " in"] | None = None
    low_rank: Factors | None = None
    bias: Float[Tensor, " out"] | None = None
    order: Int[Tensor, " in"] | None = None

    @classmethod
    def dense(cls, weight: Float[Tensor, "out in"]) -> Self:
        """Wrap an untouched weight."""
        rows, columns = weight.shape
        name = str(weight.dtype).removeprefix("torch.")
        return cls(Storage((rows, columns), name, weight.numel()), values=weight)

    def pruned(
        self,
        weight: Float[Tensor, "out in"],
        kept: Bool[Tensor, "out in"],
        *,
        pattern: str | None = None,
        units: int | None = None,
        order: Int[Tensor, " in"] | None = None,
    ) -> "Variant":
        """Give the variant with a new weight, stored only where ``kept`` is True.

        Args:
            weight: Unquantized weight, in any float type; rounded to the layer's type.
            kept: True where a weight stays.
            pattern: ``N:M`` or ``RxC`` tiles that ``kept`` follows; None for neither.
            units: How many units are kept, if all layers of the site keep the same.
            order: Columns in the order in which ``kept`` follows an ``N:M`` pattern;
                None if it does in their own.
        """
        dtype = getattr(torch, self.storage.dtype)
        values = torch.where(kept, weight.to(dtype), torch.zeros((), dtype=dtype))
        count = int(kept.sum())
        permuted = order is not None
        storage = self.storage.masked(
            count, pattern or BITMAP, units=units, permuted=permuted
        )
        return Variant(storage, values=values, mask=kept, bias=self.bias, order=order)

    def biased(self, bias: Float[Tensor, " out"]) -> "Variant":
        """Give the variant with something added to the layer's bias, in any type."""
        dtype = getattr(torch, self.storage.dtype)
        return replace(self, storage=self.storage.biased(), bias=bias.to(dtype))

    def quantized(
        self,
        codes: UInt8[Tensor, "out in"],
        scales: Float[Tensor, "out groups"] | None,
        zeros: UInt8[Tensor, "out groups"] | Float[Tensor, "out groups"] | None,
        *,
        bits: int,
        group: int | None,
        code: str = INTEGERS,
        tensor_scale: Float[Tensor, " 1"] | None = None,
        channel_scales: Float[Tensor, " in"] | None = None,
    ) -> "Variant":
        """Give the variant with codes in the place of values; the mask stays.

        A weight is ``(code - zero) * scale / channel_scale``; ``zero`` is
        ``2**(bits - 1)`` when ``zeros`` is None. Where ``code`` names a code book, what
        the code means there is multiplied by ``scale`` and ``tensor_scale``.
        """
        storage = self.storage.quantized(
            bits,
            group,
            zeros is None,
            code=code,
            channel_scales=channel_scales is not None,
        )
        if self.mask is not None:
            codes = codes * self.mask
        dtype = getattr(torch, self.storage.dtype)
        return replace(
            self,
            storage=storage,
            values=None,
            codes=codes,
            scales=_stored_scales(scales, storage),
            zeros=zeros,
            tensor_scale=tensor_scale,
            channel_scales=None if channel_scales is None else channel_scales.to(dtype),
        )

    def factored(self, factors: Factors, *, alone: bool = False) -> "Variant":
        """Give the variant with a product of two factors added, or in its place.

        Args:
            factors: In any float type; rounded to the layer's type.
            alone: True if nothing of the variant stays.
        """
        dtype = getattr(torch, self.storage.dtype)
        left, right = (factor.to(dtype).contiguous() for factor in factors)
        storage = self.storage.factored(left.shape[1], alone=alone)
        if alone:
            return Variant(storage, low_rank=(left, right), bias=self.bias)
        return replace(self, storage=storage, low_rank=(left, right))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight that the model computes with, in the layer's type.

        It brings the variant's bias along, if there is one; see ``models.biases``.
        """
        if self.low_rank is None:
            return with_bias(self.base, self.bias)
        left, right = (factor.float() for factor in self.low_rank)
        product = left @ right
        if not self.storage.is_factored_alone:
            product = product + self.base.float()
        dtype: torch.dtype = getattr(torch, self.storage.dtype)
        return with_bias(product.to(dtype), self.bias)

    @property
    def base(self) -> Float[Tensor, "out in"]:
        """The weight without low-rank factors: exact zeros where pruned."""
        if self.values is not None:
            return self.values
        weight = self._steps()
        if self.scales is not None:
            weight = weight * self.scales[..., None].float()
        if self.tensor_scale is not None:
            weight = weight * self.tensor_scale
        weight = weight.view(self.storage.shape)
        if self.channel_scales is not None:
            weight = weight / self.channel_scales.float()
        if self.mask is not None:
            weight = torch.where(self.mask, weight, 0.0)
        dtype: torch.dtype = getattr(torch, self.storage.dtype)
        return weight.to(dtype)

    def _steps(self) -> Float[Tensor, "out groups size"]:
        """Give what codes mean, before any scale."""
        storage = self.storage
        assert self.codes is not None and storage.bits is not None
        codes = self.codes.view(storage.shape[0], storage.groups, -1)
        if FORMATS[storage.code].values:
            return decode(codes, FORMATS[storage.code])
        if self.zeros is None:
            return codes.float() - (1 << (storage.bits - 1))
        return codes.float() - self.zeros[..., None].float()

    def pack(self) -> dict[str, Tensor]:
        """Give the tensors that are stored, as ``storage.parts`` declares them."""
        storage, parts = self.storage, {}
        if self.bias is not None:
            parts["added_bias"] = self.bias
        if self.low_rank is not None:
            parts["low_rank_a"], parts["low_rank_b"] = self.low_rank
        if storage.is_factored_alone:
            return parts
        full = self.codes if self.values is None else self.values
        assert full is not None
        mask = None if self.mask is None else in_order(self.mask, self.order)
        taken = take(in_order(full, self.order), mask)
        if storage.bits is None:
            parts["values"] = taken
        else:
            parts["codes"] = pack_bits(taken.flatten(), storage.bits)
            parts |= self._pack_scales(storage.bits)
        if mask is not None:
            parts["mask"] = pack_mask(mask, storage)
        if self.order is not None:
            parts["order"] = self.order.to(getattr(torch, storage.order_dtype))
        return parts

    def _pack_scales(self, bits: int) -> dict[str, Tensor]:
        form, parts = FORMATS[self.storage.code], {}
        if self.scales is not None:
            full = self.scales.contiguous()
            layer = form.scales == "layer"
            parts["scales"] = full if layer else scales_to_bytes(full, form.scales)
        if self.zeros is not None:
            whole = not form.float_zeros
            zeros = self.zeros.contiguous()
            parts["zeros"] = pack_bits(zeros.flatten(), bits) if whole else zeros
        if self.tensor_scale is not None:
            parts["tensor_scale"] = self.tensor_scale
        if self.channel_scales is not None:
            parts["channel_scales"] = self.channel_scales
        return parts

    @classmethod
    def unpack(cls, storage: Storage, parts: Mapping[str, Tensor]) -> Self:
        """Read a variant from its stored tensors; see ``derived`` for one they lack."""
        dtype = getattr(torch, storage.dtype)
        variant = cls(storage, bias=parts.get("added_bias"))
        if storage.low_rank is not None:
            factors = parts["low_rank_a"], parts["low_rank_b"]
            variant = replace(variant, low_rank=factors)
        if storage.is_factored_alone:
            return variant
        mask = unpack_mask(parts["mask"], storage) if storage.mask else None
        order = parts["order"].long() if storage.permuted else None
        full = parts.get("values" if storage.bits is None else "codes")
        if full is not None:
            bits, kept = storage.bits, storage.kept
            taken = unpack_bits(full, bits, kept) if bits else full.view(dtype)
            full = out_of_order(scatter(taken, mask, storage.shape), order)
        mask = None if mask is None else out_of_order(mask, order)
        variant = replace(variant, mask=mask, order=order)
        if storage.bits is None:
            return replace(variant, values=full)
        scales: dict[str, Any] = _unpack_scales(storage, parts)
        return replace(variant, codes=full, **scales)


def _stored_scales(
    scales: Float[Tensor, "out groups"] | None, storage: Storage
) -> Float[Tensor, "out groups"] | None:
    """Round scales to the layer's type; those of one byte come rounded."""
    if scales is None or FORMATS[storage.code].scales != "layer":
        return scales
    return scales.to(getattr(torch, storage.dtype))


def _unpack_scales(
    storage: Storage, parts: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """Read all that turns codes into weights, as attributes of a variant."""
    assert storage.bits is not None
    form, shape = FORMATS[storage.code], (storage.shape[0], storage.groups)
    scales, zeros = parts.get("scales"), parts.get("zeros")
    if scales is not None and form.scales != "layer":
        scales = scales_from_bytes(scales, form.scales)
    if zeros is not None and not form.float_zeros:
        count = shape[0] * shape[1]
        zeros = unpack_bits(zeros, storage.bits, count).view(shape)
    single = {name: parts.get(name) for name in ("tensor_scale", "channel_scales")}
    return {"scales": scales, "zeros": zeros, **single}
