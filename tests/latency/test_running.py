"""Products of every kernel against plain multiplication."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autoprune.errors import ProfileError
from autoprune.latency import rounding, running, running_cuda, running_sparse
from autoprune.latency.kernels import KERNELS, Kernel

CPU = [kernel for kernel in KERNELS.values() if kernel.device == "cpu"]
CUDA = [kernel for kernel in KERNELS.values() if kernel.device == "cuda"]

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2, "int8": 2e-2, "fp8": 6e-2}
"""Relative errors by the type that is computed in; of 4-bit weights there are more."""


def tolerance(kernel: Kernel) -> float:
    return 0.16 if "int4" in kernel.format else TOLERANCES[kernel.math]


def error(kernel: Kernel, m: int, n: int, k: int, rng: torch.Generator) -> float:
    """Give the relative error of a kernel's product, in the Frobenius norm."""
    weight = running.random_weight(kernel, n, k, rng)
    x = running.activations(kernel, m, k, rng)
    with torch.inference_mode():
        found = running.product(kernel, weight)(x)
    assert found.shape == (m, n)
    assert found.dtype == running.dtype_of(kernel)
    assert found.is_contiguous()
    exact = x.float() @ weight.float().t()
    return float((found.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("m", [1, 5, 48])
@pytest.mark.parametrize("kernel", CPU, ids=lambda kernel: kernel.name)
def test_cpu_kernels_multiply(kernel: Kernel, m: int, rng: torch.Generator) -> None:
    assert error(kernel, m, 96, 256, rng) < tolerance(kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 48, 1024])
@pytest.mark.parametrize("kernel", CUDA, ids=lambda kernel: kernel.name)
def test_cuda_kernels_multiply(kernel: Kernel, m: int) -> None:
    if (why := running.missing(kernel)) is not None:
        pytest.skip(why)
    rng = running.generator_on("cuda")
    assert error(kernel, m, 512, 1024, rng) < tolerance(kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", CUDA, ids=lambda kernel: kernel.name)
def test_cuda_kernels_are_captured(kernel: Kernel) -> None:
    from autoprune.latency.timing import CudaTimer

    if (why := running.missing(kernel)) is not None:
        pytest.skip(why)
    calls = running.build(kernel, 1024, 1024, 16, 3, running.generator_on("cuda"))
    with torch.inference_mode():
        timing = CudaTimer().time(calls)
    assert timing.way == "graph", timing.why
    assert 0 < timing.us_min <= timing.us <= timing.us_p90 < 1e4


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cslt.24.bf16", "cslt.24.int8", "cslt.24.fp8"])
def test_algorithms_of_cusparselt_agree(name: str) -> None:
    kernel = KERNELS[name]
    if (why := running.missing(kernel)) is not None:
        pytest.skip(why)
    rng = running.generator_on("cuda")
    weight = running.random_weight(kernel, 512, 1024, rng)
    x = running.activations(kernel, 64, 1024, rng)
    made = [running.product(kernel, weight)]
    numbers = running.algorithms_of(made, x)
    assert numbers[0] == 0
    first = made[0](x).float()
    for number in numbers:
        running.choose(made, number)
        assert (made[0](x).float() - first).norm() / first.norm() < 1e-2


class FakeProducts:
    """Runs products of a GPU on tensors without data: torch checks shapes and types."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The one operator without a check of shapes: ours around it is replaced.
        def compress(weight: Tensor) -> Tensor:
            parts = 9 if weight.element_size() == 2 else 10
            return weight.new_empty(weight.shape[0], weight.shape[1] * parts // 16)

        monkeypatch.setattr(running_sparse, "compress", compress)

    def error_free(self, kernel: Kernel, m: int, n: int, k: int) -> Tensor:
        with FakeTensorMode():
            weight = torch.randn(n, k, device="cuda")
            x = torch.randn(m, k, device="cuda").to(running.dtype_of(kernel))
            return running.MAKERS[kernel.name](kernel, weight)(x)


@pytest.mark.parametrize("m", [1, 5, 48, 1024])
@pytest.mark.parametrize(
    "kernel",
    [kernel for kernel in CUDA if not kernel.name.startswith("torchao")],
    ids=lambda kernel: kernel.name,
)
def test_cuda_kernels_fit_what_torch_asks_of_them(
    kernel: Kernel, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = FakeProducts(monkeypatch).error_free(kernel, m, 512, 768)
    assert found.shape == (m, 512)
    assert found.dtype == running.dtype_of(kernel)
    assert found.is_contiguous()
    assert found.device.type == "cuda"


def test_a_fake_product_that_is_wrong_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Exception, match="16"):
        FakeProducts(monkeypatch).error_free(
            KERNELS["torch.scaled_mm.row"], 4, 512, 760
        )


def test_every_kernel_has_a_maker() -> None:
    assert running.MAKERS.keys() == KERNELS.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_kernel_of_a_gpu_is_refused_without_one(rng: torch.Generator) -> None:
    with pytest.raises(ProfileError, match=r"torch\.int_mm cannot run here: .* CUDA"):
        running.build(KERNELS["torch.int_mm"], 32, 32, 1, 1, rng)


def test_a_shape_that_a_kernel_does_not_take_is_refused(rng: torch.Generator) -> None:
    with pytest.raises(ProfileError, match=r"multiples of 16 .* found 24 x 64"):
        running.build(KERNELS["cpu.int4pack_mm.g64"], 24, 64, 1, 1, rng)


def test_the_smaller_two_of_four_are_pruned_to_positive_zero() -> None:
    weight = torch.tensor([[3.0, -1.0, 2.0, -4.0, -0.1, 0.2, -0.3, 0.05]])
    wanted = torch.tensor([[3.0, 0.0, 0.0, -4.0, 0.0, 0.2, -0.3, 0.0]])
    found = running.halved(weight)
    assert torch.equal(found, wanted)
    assert not torch.signbit(found[found == 0]).any()


def test_copies_lie_in_memory_of_their_own(rng: torch.Generator) -> None:
    made = running.products(KERNELS["cpu.linear.fp32"], 16, 8, 5, rng)
    places = {one.args[0].data_ptr() for one in made}  # type: ignore[attr-defined]
    assert len(places) == 5
    values = [one.args[0] for one in made]  # type: ignore[attr-defined]
    assert all((value != 0).all() for value in values)
    assert not torch.equal(values[0], values[1])


def test_copies_outgrow_the_cache() -> None:
    plain, eight = KERNELS["torch.mm.bf16"], KERNELS["cpu.int8.x86"]
    # 3 * 50 MB are less than 180 MB; 32 MB of bfloat16 each.
    assert running.copies_for(plain, 4096, 4096, 50e6) == 6
    assert running.copies_for(plain, 4096, 4096, 100e6) == 9
    # 1.5 * 32 MB over 1 MB each.
    assert running.copies_for(eight, 1000, 1000, 32e6) == 48
    assert running.copies_for(eight, 49152, 5760, 32e6) == 1


def test_the_engine_of_quantized_operators_is_restored(rng: torch.Generator) -> None:
    before = torch.backends.quantized.engine
    for name in ("cpu.int8.onednn", "cpu.int8.x86"):
        running.build(KERNELS[name], 16, 16, 1, 1, rng)
    assert torch.backends.quantized.engine == before


def test_groups_are_rounded_to_half_a_step(rng: torch.Generator) -> None:
    weight = torch.randn(6, 64, generator=rng)
    codes, pairs = rounding.to_groups(weight, 32)
    assert codes.min() >= 0 and codes.max() <= 15
    scales = pairs[..., 0].t().repeat_interleave(32, 1)
    middles = pairs[..., 1].t().repeat_interleave(32, 1)
    off = ((codes - 8) * scales + middles - weight).abs()
    assert (off <= scales / 2 + 1e-6).all()


def test_activations_never_run_over() -> None:
    # All magnitudes that bfloat16 knows between two powers of two, each as the largest.
    top = torch.arange(128, 256).bfloat16()
    x = torch.stack([top, -top], 1)
    codes, scales = rounding.int8_activations(x)
    assert torch.equal(codes[:, 0], -codes[:, 1])
    assert ((codes * scales - x.float()).abs() <= 1.01 * scales).all()
    for by_row in (True, False):
        eight, scale = rounding.fp8_activations(x, by_row=by_row)
        assert eight.float().isfinite().all()
        assert (
            (eight.float() * scale - x.float()).abs() <= 0.07 * x.float().abs()
        ).all()


def test_rows_of_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    codes, _ = rounding.int8_activations(x)
    eight, _ = rounding.fp8_activations(x, by_row=True)
    assert not codes.any() and not eight.float().any()


def test_padding_appends_rows_of_zeros() -> None:
    x = torch.ones(5, 3)
    found = running_cuda.padded(x, 4)
    assert found.shape == (8, 3)
    assert torch.equal(found[:5], x) and not found[5:].any()
    assert running_cuda.padded(x, 5) is x
