"""Weights of variants in memory: a trial then swaps them without unpacking."""

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.compression.files import TensorFiles
from autoprune.compression.heap import give_back_free_memory
from autoprune.errors import StoreError
from autoprune.models.biases import bias_of, with_bias

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.25
"""Most of the machine's memory that the weights of variants may fill."""

MOST_MAPPED = 16_384
"""Weights that a process maps at a time: Linux allows it 65530 mappings in all."""

_TOUCH_S = 60.0
_GIVE_BACK_BYTES = 2**28


def memory_bytes() -> int:
    """Give the cap of the weights in memory: a quarter of what the machine has."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return int(MEMORY_SHARE * pages * size)


@dataclass(slots=True)
class _Held:
    weight: Tensor
    touched: float  # when its file was last told that it is in use


class WeightMemory:
    """Weights by the key of their variant; those used longest ago go first.

    With ``files``, a weight is written once, in the type that the model computes in,
    and mapped by every process: none unpacks what another one has unpacked, and all of
    them share the system's page cache. A swap then copies and converts nothing. Where
    files cannot be written or read, weights are held in memory as without them.

    Args:
        cap_bytes: Most bytes that they may take.
        files: Where they are shared; None to hold them in this process alone.
    """

    def __init__(self, cap_bytes: int, files: TensorFiles | None = None) -> None:
        self.cap_bytes = cap_bytes
        self.held_bytes = 0
        self._files = files
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._unpacked = 0

    def get(
        self,
        key: str,
        read: Callable[[], Tensor],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Give a weight, reading it if it is not held. Not to be written to.

        Args:
            key: Of its variant.
            read: Gives the weight, with the bias that it brings.
            dtype: What the model computes in; a shared weight comes in this type where
                it can hold all numbers of its own.
        """
        held = self._held.get(key)
        if held is not None:
            self._held.move_to_end(key)
            self._touch(key, held, dtype)
            return held.weight
        weight = self._share(key, read, dtype) if self._files else read()
        self._give_back(weight)
        self._held[key] = _Held(weight, time.monotonic())
        self.held_bytes += weight.nbytes
        while self._held and self._is_full():
            _, gone = self._held.popitem(last=False)
            self.held_bytes -= gone.weight.nbytes
        return weight

    def _give_back(self, weight: Tensor) -> None:
        """Return at times what unpacking leaves free in the heap: up to gigabytes."""
        self._unpacked += weight.nbytes
        if self._unpacked > _GIVE_BACK_BYTES:
            give_back_free_memory()
            self._unpacked = 0

    def _is_full(self) -> bool:
        too_many = bool(self._files) and len(self._held) > MOST_MAPPED
        return too_many or self.held_bytes > self.cap_bytes

    def _share(
        self, key: str, read: Callable[[], Tensor], dtype: torch.dtype | None
    ) -> Tensor:
        """Map a weight, writing it first if no process has."""
        assert self._files is not None
        name, fresh = _name(key, dtype), None
        try:
            content = self._files.read(name)
            if content is None:
                fresh = _computed(read(), dtype)
                self._files.write(name, _parts(fresh))
                content = self._files.read(name)
        except StoreError as error:
            log.warning("%s. Weights are held in memory instead", error)
            self._files, content = None, None
        if content is None:  # unreadable, or gone at once: the cap is small
            return read() if fresh is None else fresh
        return with_bias(content.tensors["weight"], content.tensors.get("weight_bias"))

    def _touch(self, key: str, held: _Held, dtype: torch.dtype | None) -> None:
        """Say from time to time that a weight is in use: its file then stays longer."""
        now = time.monotonic()
        if self._files and now - held.touched > _TOUCH_S:
            self._files.touch(_name(key, dtype))
            held.touched = now


def _name(key: str, dtype: torch.dtype | None) -> str:
    return key if dtype is None else f"{key}-{str(dtype).removeprefix('torch.')}"


def _computed(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Give a weight in the type of computation, if no number changes."""
    if dtype is None or torch.promote_types(weight.dtype, dtype) != dtype:
        return weight
    return with_bias(weight.detach().to(dtype), bias_of(weight))


def _parts(weight: Tensor) -> dict[str, Tensor]:
    """Name what is stored, the weight first: it stands at the aligned beginning."""
    bias, parts = bias_of(weight), {"weight": weight.detach().contiguous()}
    return parts if bias is None else parts | {"weight_bias": bias.contiguous()}
