"""Builds what is timed beside products: attention, copies, the start of a kernel."""

from functools import partial
from math import ceil
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoprune.errors import ProfileError
from autoprune.latency.profiles import Point
from autoprune.latency.running import CACHES_CUDA, CUDA_BYTES
from autoprune.latency.sources import SHORT
from autoprune.latency.timing import Call

TYPES = {short: getattr(torch, dtype) for dtype, short in SHORT.items()}
"""Types by the ending of a kernel's name."""

MOST_CACHES = 64
"""Copies of keys and values at most."""


def attention_calls(
    point: Point, generator: torch.Generator, cache_bytes: float
) -> list[Call]:
    """Make calls of attention, as transformers runs it on torch's fused kernels.

    A prefill is causal, without a mask. A decode step has one query a sequence and a
    mask, as models with a cache of fixed size have it.

    Args:
        point: Sizes; ``m`` is all queries of the batch.
        generator: Where chance comes from, on the device.
        cache_bytes: Keys and values of all calls together take several times as much.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    device, dtype = generator.device, TYPES[point.kernel.rpartition(".")[2]]
    new = point.m // point.batch
    groups = point.heads // point.kv_heads
    module: Any = SimpleNamespace(num_key_value_groups=groups, is_causal=True)

    def drawn(heads: int, tokens: int) -> Tensor:
        shape = (point.batch, tokens, heads, point.head_dim)
        made = torch.randn(shape, generator=generator, device=device)
        return made.to(dtype).transpose(1, 2)  # as models split a state into heads

    def cached() -> Tensor:
        return drawn(point.kv_heads, point.context).contiguous()

    query, mask = drawn(point.heads, new), None
    if point.op == "attn_decode":
        shape = (point.batch, 1, 1, point.context)
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    own = 2 * cached().nbytes
    wanted = max(CUDA_BYTES, CACHES_CUDA * cache_bytes)
    if device.type == "cpu":
        wanted = cache_bytes
    copies = min(MOST_CACHES, ceil(wanted / own))

    def run(key: Tensor, value: Tensor) -> Any:
        with torch.inference_mode():
            return sdpa_attention_forward(module, query, key, value, mask)

    return [partial(run, cached(), cached()) for _ in range(copies)]


def elementwise_calls(point: Point, generator: torch.Generator) -> list[Call]:
    """Make calls of an operation that goes number by number, as transformers has it.

    What it reads was written just before, so it lies in a cache where it fits in one.

    Args:
        point: ``m`` tokens of ``n`` numbers each; of a rotation ``head_dim`` tells how
            they are split into heads.
        generator: Where chance comes from, on the device.
    """
    from transformers.models.llama.modeling_llama import (
        LlamaRMSNorm,
        apply_rotary_pos_emb,
    )

    device, what = generator.device, point.kernel.partition(".")[0]
    dtype = TYPES[point.kernel.rpartition(".")[2]]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    one, other = drawn(1, point.m, point.n), drawn(1, point.m, point.n)
    if what == "rms_norm":
        norm = LlamaRMSNorm(point.n).to(device, dtype).requires_grad_(False)
        return [_without_graph(partial(norm, one))]
    if what == "add":
        return [_without_graph(partial(torch.add, one, other))]
    if what == "silu_mul":
        return [_without_graph(lambda: functional.silu(one) * other)]
    if what != "rope":
        raise ProfileError(f"nothing is known of the operation {what!r}")
    heads = one.view(1, point.m, -1, point.head_dim).transpose(1, 2)
    queries, keys = heads[:, : max(1, heads.shape[1] * 3 // 4)], heads[:, -1:]
    keys = heads[:, queries.shape[1] :] if heads.shape[1] > 1 else keys
    angles = drawn(1, point.m, point.head_dim)
    turn = partial(apply_rotary_pos_emb, queries, keys, angles.cos(), angles.sin())
    return [_without_graph(turn)]


def _without_graph(call: Call) -> Call:
    def run() -> Any:
        with torch.inference_mode():
            return call()

    return run


def copy_calls(point: Point, generator: torch.Generator) -> list[Call]:
    """Make calls that copy ``n`` bytes: what memory can do at best.

    Args:
        point: ``n`` bytes are read and as many written.
        generator: Where chance comes from, on the device.
    """
    device = generator.device
    pairs = []
    for _ in range(2):
        source = torch.randint(
            0, 255, (point.n,), dtype=torch.uint8, generator=generator, device=device
        )
        pairs.append((torch.empty_like(source), source))
    return [partial(into.copy_, source) for into, source in pairs]


def launch_calls(generator: torch.Generator) -> list[Call]:
    """Make a call that does next to nothing: what remains is its start."""
    one = torch.zeros(1, device=generator.device)
    return [partial(one.add_, 1.0)]


def calls_for(
    point: Point, generator: torch.Generator, cache_bytes: float
) -> list[Call]:
    """Make the calls of a point that is no product.

    Raises:
        ProfileError: If the operation is not known.
    """
    if point.op.startswith("attn_"):
        return attention_calls(point, generator, cache_bytes)
    if point.op == "elementwise":
        return elementwise_calls(point, generator)
    if point.op == "copy":
        return copy_calls(point, generator)
    if point.op == "launch":
        return launch_calls(generator)
    raise ProfileError(f"nothing is known of the operation {point.op!r}")
