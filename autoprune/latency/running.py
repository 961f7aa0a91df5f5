"""Builds products as runtimes do them: weights packed once, activations every time.

What a runtime does with the activations of a format, quantizing them and scaling the
result back, belongs to the product and is timed with it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from autoprune.errors import ProfileError
from autoprune.latency import running_cpu, running_cuda, running_sparse
from autoprune.latency.kernels import Kernel
from autoprune.latency.timing import Call

CUDA_BYTES, CACHES_CUDA = 180e6, 3.0
"""Weights on a GPU take at least as much, and so many times its L2 cache."""

CACHES_CPU = 1.5
"""Weights on a CPU take so many times its last cache: who goes round finds none."""

MOST_COPIES = 1024


Product = Callable[[Tensor], Tensor]
"""Multiplies activations ``[m, k]`` with a weight that is packed: ``[m, n]``."""

Maker = Callable[[Kernel, Tensor], Product]

MAKERS: Mapping[str, Maker] = {
    **running_cpu.MAKERS,
    **running_cuda.MAKERS,
    **running_sparse.MAKERS,
}
"""What makes the products of a kernel, by its name."""


def dtype_of(kernel: Kernel) -> torch.dtype:
    """Give the type of a kernel's activations."""
    found = getattr(torch, kernel.dtype)
    assert isinstance(found, torch.dtype)
    return found


def missing(kernel: Kernel) -> str | None:
    """Say why a kernel cannot run on this machine; None if nothing is against it."""
    if kernel.device == "cpu":
        return running_cpu.missing(kernel)
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if not kernel.runs_on(capability):
        only = " or ".join(map(str, kernel.only)) or "any higher"
        return (
            f"it needs compute capability {kernel.capability[0]}."
            f"{kernel.capability[1]}, major {only}; this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    return running_sparse.missing(kernel) if kernel.sparse else None


def product(kernel: Kernel, weight: Float[Tensor, "n k"]) -> Product:
    """Pack a weight for a kernel.

    Args:
        kernel: The kernel, of the weight's own device.
        weight: The weight as it is, with 2:4 zeros for a sparse kernel.

    Raises:
        ProfileError: If the kernel cannot run here, or not on that shape.
    """
    n, k = weight.shape
    if (why := missing(kernel)) is not None:
        raise ProfileError(f"the kernel {kernel.name} cannot run here: {why}")
    if not kernel.takes(n, k):
        raise ProfileError(
            f"the kernel {kernel.name} takes outputs in multiples of {kernel.n_of} and "
            f"inputs of {kernel.k_of}, found {n} x {k}"
        )
    with torch.inference_mode():
        return MAKERS[kernel.name](kernel, weight)


def random_weight(
    kernel: Kernel, n: int, k: int, generator: torch.Generator
) -> Float[Tensor, "n k"]:
    """Draw a weight, never of zeros: these are multiplied faster, as they move no bit.

    Args:
        kernel: If it is sparse, two of any four in a row are ``+0.0``: the smaller.
        n: Outputs.
        k: Inputs.
        generator: Where chance comes from; the weight is made on its device.
    """
    weight = torch.randn(n, k, generator=generator, device=generator.device) * k**-0.5
    return halved(weight) if kernel.sparse else weight


def halved(weight: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Prune the two smaller of any four in a row, to ``+0.0``, never ``-0.0``."""
    fours = weight.reshape(weight.shape[0], -1, 4)
    small = fours.abs().argsort(dim=-1)[..., :2]
    pruned = fours.scatter(-1, small, torch.zeros_like(fours))
    return pruned.reshape(weight.shape)


def activations(kernel: Kernel, m: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw activations in the kernel's own type."""
    x = torch.randn(m, k, generator=generator, device=generator.device)
    return x.to(dtype_of(kernel))


def products(
    kernel: Kernel, n: int, k: int, copies: int, generator: torch.Generator
) -> list[Product]:
    """Make products that differ in nothing but where their weights lie.

    Raises:
        ProfileError: If the kernel cannot run here, or not on that shape.
    """
    weight = random_weight(kernel, n, k, generator)
    # Rolled by rows: other numbers at every place, and a 2:4 pattern stays one.
    return [product(kernel, weight.roll(i, 0)) for i in range(copies)]


def calls_of(made: Sequence[Product], x: Tensor) -> list[Call]:
    """Bind activations to products."""
    return [partial(one, x) for one in made]


def build(
    kernel: Kernel, n: int, k: int, m: int, copies: int, generator: torch.Generator
) -> list[Call]:
    """Make calls that are ready to be timed, each on weights of its own.

    Args:
        kernel: The kernel.
        n: Outputs.
        k: Inputs.
        m: Tokens.
        copies: How many calls.
        generator: Where chance comes from, on the kernel's device.

    Raises:
        ProfileError: If the kernel cannot run here, or not on that shape.
    """
    made = products(kernel, n, k, copies, generator)
    return calls_of(made, activations(kernel, m, k, generator))


def copies_for(kernel: Kernel, n: int, k: int, cache_bytes: float) -> int:
    """Say how many weights it takes for none to stay in the cache.

    Args:
        kernel: The kernel.
        n: Outputs.
        k: Inputs.
        cache_bytes: Of a GPU its L2 cache, of a CPU its last.

    Example:
        >>> from autoprune.latency.kernels import KERNELS
        >>> copies_for(KERNELS["torch.mm.bf16"], 4096, 4096, 60e6)
        6
    """
    if kernel.device == "cuda":
        wanted = max(CUDA_BYTES, CACHES_CUDA * cache_bytes)
    else:
        wanted = CACHES_CPU * cache_bytes
    own = n * k * kernel.weight_bytes
    return min(MOST_COPIES, max(1, ceil(wanted / own)))


def algorithms_of(made: Sequence[Product], x: Tensor) -> list[int]:
    """List the algorithms that a product can choose among; empty for no choice."""
    choices: Any = getattr(made[0], "algorithms", None)
    return choices(x) if choices else []


def choose(made: Sequence[Product], algorithm: int) -> None:
    """Let products that have the choice run an algorithm from now on."""
    for one in made:
        one.algorithm = algorithm  # type: ignore[attr-defined]


def generator_on(device: str, seed: int = 0) -> torch.Generator:
    """Make a seeded generator on a device."""
    return torch.Generator(device).manual_seed(seed)
