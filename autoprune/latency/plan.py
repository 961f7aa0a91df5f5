"""What a recording times, in the order in which it matters."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import dist, gcd, log

from autoprune.latency.kernels import KERNELS
from autoprune.latency.profiles import Point, split_of
from autoprune.latency.shape import ADD, GATE, NORM, ROPE
from autoprune.latency.sources import SHORT
from autoprune.latency.whole_models import MODELS, Variation

TOKENS = {
    "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "cpu": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
}
"""Tokens that a curve is measured at."""

FEWER = {
    "cuda": (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "cpu": (1, 4, 16, 64, 128, 256, 512),
}
"""The same for kernels that change less between."""

SPARSE_TOKENS = (1, 8, 64, 256, 512, 1024, 4096, 8192)
WEIGHT_ONLY_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NUMBERS_TOKENS = {
    "cuda": (1, 8, 64, 512, 2048, 8192),
    "cpu": (1, 8, 32, 128, 256, 512),
}
"""Tokens for what goes number by number."""

HEAD_TOKENS = {"cuda": (1, 8, 64, 256), "cpu": (1, 4)}
"""Tokens for the head, which reads the last position of each sequence alone."""

SPARSE_SITES, GENERIC_SITES, FEW_SITES = 16, 20, 6

STEP = 128
"""Widths of a ladder are multiples of it, or of the largest power of 2 that fits."""

_SIDES = {
    "cuda": (512, 1024, 2048, 3072, 4096, 6144, 8192, 11008, 16384, 28672),
    "cpu": (128, 256, 512, 768, 1024, 2048, 3072),
}
"""Sides of generic shapes."""

_LARGEST = {"cuda": 28672 * 8192, "cpu": 2048 * 3072}

Site = tuple[int, int]
"""Outputs and inputs."""


def widths(width: int) -> list[int]:
    """List the ladder of an MLP: eighths of its width, rounded to what hardware likes.

    Example:
        >>> widths(14336)[:2], widths(1536)[:2], widths(100)
        ([1792, 3584], [192, 384], [16, 32, 48, 64, 80, 100])
    """
    step = max(16, gcd(width // 8, STEP))
    ladder = {max(1, round(width * i / 8 / step)) * step for i in range(1, 8)}
    return sorted({one for one in ladder if one < width} | {width})


def target_sites(target: Variation) -> list[Site]:
    """List the shapes that a model's matrices take when it is compressed.

    The whole ones come first, then the widths of the ladder and the heads in whole
    groups; the head is left out.
    """
    group, dim, hidden = target.heads // target.kv_heads, target.head_dim, target.hidden
    found: list[Site] = []
    for width in reversed(widths(target.width)):
        found += [(width, hidden), (hidden, width)]
    for groups in range(target.kv_heads, 0, -1):
        queries, keys = groups * group * dim, groups * dim
        found += [(queries, hidden), (hidden, queries), (keys, hidden)]
    return list(dict.fromkeys(found))


def spread(candidates: Sequence[Site], count: int, near: Iterable[Site]) -> list[Site]:
    """Choose shapes one by one, each the farthest from all before.

    Args:
        candidates: What there is to choose from.
        count: How many.
        near: Shapes that are there already.

    Distances are those of the logarithms of both sides.
    """
    taken = [_place(site) for site in near]
    left, found = list(dict.fromkeys(candidates)), list[Site]()
    while left and len(found) < count:
        best = max(left, key=lambda site: _distance(_place(site), taken))
        left.remove(best)
        found.append(best)
        taken.append(_place(best))
    return found


def _place(site: Site) -> tuple[float, float]:
    return log(site[0]), log(site[1])


def _distance(
    place: tuple[float, float], others: Sequence[tuple[float, float]]
) -> float:
    return min((dist(place, other) for other in others), default=1e9)


def generic_sites(kind: str, near: Sequence[Site]) -> list[Site]:
    """Choose shapes for models that are not among the targets."""
    sides = _SIDES[kind]
    grid = [(n, k) for n in sides for k in sides if n * k <= _LARGEST[kind]]
    return spread(grid, GENERIC_SITES if kind == "cuda" else 10, near)


def gemms(kernel: str, sites: Iterable[Site], tokens: Sequence[int]) -> list[Point]:
    """Describe products, shape by shape, of those that the kernel takes."""
    about = KERNELS[kernel]
    return [
        Point("gemm", kernel, 0.0, m=m, n=n, k=k, split=split_of(kernel, n, k))
        for n, k in sites
        if about.takes(n, k)
        for m in tokens
    ]


def attentions(target: Variation, dtype: str, kind: str) -> list[Point]:
    """Describe the attention of a model with all, half and a quarter of its heads."""
    group = target.heads // target.kv_heads
    ladder = {max(1, round(target.kv_heads / part)) for part in (1, 2, 4)}
    gpu = kind == "cuda"
    prompts = (128, 512, 1024, 2048, 4096, 8192) if gpu else (32, 64, 128, 256, 512)
    contexts = (128, 512, 2048, 8192, 32768) if gpu else (32, 128, 256, 512, 2048)
    found = []
    for groups in sorted(ladder, reverse=True):
        sizes = Point(
            "",
            f"sdpa.{SHORT[dtype]}",
            0.0,
            heads=groups * group,
            kv_heads=groups,
            head_dim=target.head_dim,
        )
        for batch in (1, 8) if gpu else (1,):
            found += [
                replace(sizes, op="attn_prefill", batch=batch, context=s, m=batch * s)
                for s in prompts
                if batch * s <= 32768
            ]
        for batch in (1, 8, 64) if gpu else (1, 4):
            found += [
                replace(sizes, op="attn_decode", batch=batch, context=s, m=batch)
                for s in contexts
                if batch * s <= 1 << 19
            ]
    return found


def elementwise(target: Variation, dtype: str, kind: str) -> list[Point]:
    """Describe what a model does number by number, at whole and smaller widths."""
    dim, group = target.head_dim, target.heads // target.kv_heads
    turned = {max(1, target.kv_heads // part) * (group + 1) * dim for part in (1, 2)}
    ladder = widths(target.width)
    sizes = {
        NORM: [target.hidden],
        ADD: [target.hidden],
        GATE: [target.width, ladder[len(ladder) // 2], ladder[0]],
        ROPE: sorted(turned, reverse=True),
    }
    return [
        Point("elementwise", f"{what}.{SHORT[dtype]}", 0.0, m=m, n=n, head_dim=dim)
        for what, own in sizes.items()
        for n in dict.fromkeys(own)
        for m in NUMBERS_TOKENS[kind]
    ]


def basics(kind: str) -> list[Point]:
    """Describe the start of a kernel and the copying of memory."""
    ways = ("eager", "graph") if kind == "cuda" else ("eager",)
    found = [Point("launch", f"launch.{way}", 0.0, m=1) for way in ways]
    sizes = (1 << 26, 1 << 30) if kind == "cuda" else (1 << 26,)
    return found + [Point("copy", "copy", 0.0, m=1, n=size) for size in sizes]


def kernel_plan(kind: str, targets: Sequence[Variation] | None = None) -> list[Point]:
    """List all points but those of whole models, the most important first.

    Args:
        kind: ``cuda`` or ``cpu``.
        targets: Models whose shapes are measured exactly; by default those of which
            whole models are recorded.
    """
    chosen = list(MODELS[kind].values()) if targets is None else list(targets)
    sites = list(dict.fromkeys(s for one in chosen for s in target_sites(one)))
    heads = list(dict.fromkeys((one.vocabulary, one.hidden) for one in chosen))
    ordered = [*basics(kind)]
    if kind == "cuda":
        ordered += _cuda(chosen, sites, heads)
    else:
        ordered += _cpu(chosen, sites, heads)
    return list(dict.fromkeys(ordered))


def _cuda(
    targets: Sequence[Variation], sites: Sequence[Site], heads: Sequence[Site]
) -> list[Point]:
    ceiling = [(8192, 8192)]
    few = spread(sites, FEW_SITES, [])
    sparse = spread(sites, SPARSE_SITES, [])
    generic = generic_sites("cuda", sites)
    tokens, all_tokens, sparse_tokens = FEWER["cuda"], TOKENS["cuda"], SPARSE_TOKENS
    found = gemms("torch.mm.bf16", [*ceiling, *sites], tokens)
    found += gemms("torch.mm.bf16", heads, HEAD_TOKENS["cuda"])
    for target in targets:
        found += attentions(target, "bfloat16", "cuda")
        found += elementwise(target, "bfloat16", "cuda")
    found += gemms("cslt.24.bf16", [*ceiling, *sparse], sparse_tokens)
    found += gemms("torch.scaled_mm.row", [*ceiling, *sites], tokens)
    found += gemms("torch.int_mm", [*ceiling, *sites], tokens)
    found += gemms("cslt.24.fp8", sparse, sparse_tokens)
    found += gemms("cslt.24.int8", sparse, sparse_tokens)
    found += gemms("torchao.24.fp8.row", sparse, sparse_tokens)
    found += gemms("torch.scaled_mm.tensor", sparse, tokens)
    for group in (128, 64, 32):
        found += gemms(f"torch.int4pack_mm.g{group}", sparse, WEIGHT_ONLY_TOKENS)
    for kernel in ("torch.mm.bf16", "torch.scaled_mm.row", "torch.int_mm"):
        found += gemms(kernel, generic, tokens)
    found += gemms("cslt.24.bf16", generic[:8], sparse_tokens)
    found += gemms("torch.mm.fp16", few, tokens)
    found += gemms("cslt.24.fp16", few, sparse_tokens)
    found += gemms("torch.int4pack_mm.g256", few, WEIGHT_ONLY_TOKENS)
    found += gemms("torch.mm.fp32", few, tokens)
    return found + gemms("torch.mm.bf16", sites, all_tokens)


def _cpu(
    targets: Sequence[Variation], sites: Sequence[Site], heads: Sequence[Site]
) -> list[Point]:
    few, generic = spread(sites, FEW_SITES, []), generic_sites("cpu", sites)
    tokens, all_tokens = FEWER["cpu"], TOKENS["cpu"]
    found = gemms("cpu.linear.fp32", sites, all_tokens)
    found += gemms("cpu.linear.fp32", heads, HEAD_TOKENS["cpu"])
    for target in targets:
        found += attentions(target, "float32", "cpu")
        found += elementwise(target, "float32", "cpu")
    found += gemms("cpu.int8.x86", sites, tokens)
    found += gemms("cpu.linear.bf16", sites, tokens)
    found += gemms("cpu.linear.bf16", heads, HEAD_TOKENS["cpu"])
    for target in targets:
        found += attentions(target, "bfloat16", "cpu")
        found += elementwise(target, "bfloat16", "cpu")
    found += gemms("cpu.linear.fp32", generic, tokens)
    found += gemms("cpu.int8.onednn", sites, tokens)
    found += gemms("cpu.int8.x86", generic, tokens)
    found += gemms("cpu.linear.bf16", generic, tokens)
    few_tokens = (1, 4, 16, 64, 128)
    for kernel in ("cpu.int4pack_mm.g64", "cpu.int4pack_mm.g32", "cpu.int8pack_mm"):
        found += gemms(kernel, few, few_tokens)
    return found + gemms("cpu.int4pack_mm.g128", few, few_tokens)


def probe_plan(kind: str, targets: Sequence[Variation] | None = None) -> list[Point]:
    """List what a minute can tell: few shapes, the kernels that matter most."""
    chosen = list(MODELS[kind].values()) if targets is None else list(targets)
    sites = list(dict.fromkeys(s for one in chosen for s in target_sites(one)))
    few = spread(sites, FEW_SITES, [])
    if kind == "cpu":
        names = ["cpu.linear.fp32", "cpu.int8.x86", "cpu.linear.bf16"]
        tokens: Sequence[int] = (1, 16, 128)
    else:
        names = ["torch.mm.bf16", "cslt.24.bf16", "torch.scaled_mm.row"]
        names += ["torch.int_mm", "cslt.24.fp8", "torch.int4pack_mm.g128"]
        tokens = (1, 8, 64, 512, 4096)
    dtype = "bfloat16" if kind == "cuda" else "float32"
    found = basics(kind)
    for name in names:
        found += gemms(name, few, tokens)
    found += elementwise(chosen[0], dtype, kind)
    return found + attentions(chosen[0], dtype, kind)
