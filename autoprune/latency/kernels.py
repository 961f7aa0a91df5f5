"""Which kernels multiply what: their exact names, what they can take, what they move.

Data only; ``running`` builds them. A format without a kernel on a device runs as the
next simpler one, with a warning: time is never made up.
"""

from dataclasses import dataclass
from functools import partial
from math import ceil

from autoprune.latency.shape import DENSE, SPARSE

GROUPS = (32, 64, 128, 256)
"""Groups of weights that the int4 kernels of torch know."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A way to multiply, by its exact name: figures of one say nothing of another.

    Attributes:
        name: Unique.
        device: ``cuda`` or ``cpu``.
        format: What it multiplies.
        math: Type that it computes in: whose ceiling holds.
        weight_bytes: Bytes of a weight as it is read, scales and indices included.
        dtype: Type of the activations that come in and go out.
        n_of: Outputs are a multiple of it.
        k_of: Inputs likewise.
        pad_m: Tokens are padded to a multiple of it.
        capability: Lowest compute capability of the GPU.
        only: Capabilities' major numbers that it is built for; empty for all above.
        sparse: True if half of the products are skipped.
    """

    name: str
    device: str
    format: str
    math: str
    weight_bytes: float
    dtype: str = "bfloat16"
    n_of: int = 1
    k_of: int = 1
    pad_m: int = 1
    capability: tuple[int, int] = (0, 0)
    only: tuple[int, ...] = ()
    sparse: bool = False

    def takes(self, n: int, k: int) -> bool:
        """Tell whether it can multiply a weight of that shape."""
        return n % self.n_of == 0 and k % self.k_of == 0

    def padded(self, m: int) -> int:
        """Give the tokens that it computes for ``m`` of them."""
        return ceil(m / self.pad_m) * self.pad_m

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Tell whether it is built for a GPU."""
        if self.only and capability[0] not in self.only:
            return False
        return capability >= self.capability

    def flop(self, m: int, n: int, k: int) -> float:
        """Count operations, those with zeros included."""
        return 2.0 * self.padded(m) * n * k

    def moved(self, m: int, n: int, k: int) -> float:
        """Count the bytes read and written."""
        item = 4 if self.dtype == "float32" else 2
        return n * k * self.weight_bytes + self.padded(m) * (n + k) * item


def _plain() -> list[Kernel]:
    """List the kernels of matrices as they are."""
    found = []
    for dtype, short, size in (
        ("float32", "fp32", 4.0),
        ("float16", "fp16", 2.0),
        ("bfloat16", "bf16", 2.0),
    ):
        of = 16 // int(size)  # 16 bytes, as tensor cores read them
        plain = partial(
            Kernel, format=DENSE, dtype=dtype, math=short, weight_bytes=size
        )
        found += [
            plain(f"torch.mm.{short}", "cuda", n_of=of, k_of=of),
            plain(f"cpu.linear.{short}", "cpu"),
        ]
    return found


def _int4() -> list[Kernel]:
    """List the kernels of 4-bit weights in groups, scales and zeros in 16 bits."""
    found = []
    for group in GROUPS:
        size = 0.5 + 4 / group
        four = partial(Kernel, format=f"int4-g{group}", math="bf16", weight_bytes=size)
        gpu = partial(four, n_of=8, k_of=max(group, 64), capability=(8, 0))
        found += [
            gpu(f"torch.int4pack_mm.g{group}", "cuda"),
            four(f"cpu.int4pack_mm.g{group}", "cpu", n_of=16, k_of=group),
        ]
    return found


def _eight_bits() -> list[Kernel]:
    """List the kernels of 8 bits; those of a CPU take and give 32 bits."""
    eight = partial(Kernel, weight_bytes=1.0)
    cpu = partial(eight, device="cpu", dtype="float32", math="int8", format="int8")
    int8 = partial(eight, device="cuda", math="int8", format="int8")
    fp8 = partial(eight, device="cuda", math="fp8", n_of=16, k_of=16)
    return [
        int8("torch.int_mm", n_of=8, k_of=8, pad_m=32, capability=(7, 5)),
        fp8("torch.scaled_mm.tensor", format="fp8-tensor", capability=(8, 9)),
        fp8("torch.scaled_mm.row", format="fp8-row", capability=(8, 9)),
        cpu("cpu.int8.onednn"),
        cpu("cpu.int8.x86"),
        Kernel("cpu.int8pack_mm", "cpu", "int8-weight", math="bf16", weight_bytes=1.0),
    ]


def _sparse() -> list[Kernel]:
    """List the kernels of 2:4: values and two bits an index, so 9/16 or 10/16."""
    gpu = partial(Kernel, device="cuda", capability=(8, 0), sparse=True)
    half = partial(gpu, format=SPARSE, weight_bytes=1.125, n_of=16, k_of=16, pad_m=8)
    eight = partial(gpu, weight_bytes=0.625, n_of=32, k_of=32, pad_m=16)
    fp8 = partial(eight, math="fp8", capability=(8, 9))
    return [
        half("cslt.24.bf16", math="bf16"),
        half("cslt.24.fp16", math="fp16", dtype="float16"),
        eight("cslt.24.int8", math="int8", format=f"{SPARSE}+int8"),
        fp8("cslt.24.fp8", format=f"{SPARSE}+fp8-tensor"),
        fp8(
            "torchao.24.fp8.row",
            format=f"{SPARSE}+fp8-row",
            n_of=8,
            pad_m=1,
            capability=(9, 0),
            only=(9,),
        ),
    ]


KERNELS = {k.name: k for k in [*_plain(), *_int4(), *_eight_bits(), *_sparse()]}
"""Every kernel, by name."""


def simpler(format: str) -> str | None:
    """Name the format that a weight can be multiplied in where its own has no kernel.

    A pattern of zeros is left aside first; what is then without a kernel is dense.

    Example:
        >>> simpler("2:4+int4-g64"), simpler("int4-g64"), simpler("dense")
        ('int4-g64', 'dense', None)
    """
    if format == DENSE:
        return None
    pattern, _, rest = format.partition("+")
    return rest if pattern == SPARSE and rest else DENSE


def multiplied_as(format: str) -> tuple[str, ...]:
    """List the formats whose kernels may multiply a weight, its own first.

    Zeros in a 2:4 pattern never have to be used: the dense kernel does as well.
    """
    other = simpler(format)
    return (format, other) if format.startswith(SPARSE) and other else (format,)
