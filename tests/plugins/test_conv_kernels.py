"""Whole kernels and patterns of places: counts are exact, choices as by hand."""

from dataclasses import replace

import pytest
import torch
from autoprune_plugins.conv_kernels import KernelPatterns, Kernels, in_patterns
from torch import Tensor

from autoprune.compression.method import CompressionMethod, Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.errors import MethodError
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Layer, Value
from autoprune.testing import MethodContract, tiny_source

ROW = [[3.0, 0.0, 2.0, 2.0, 0.0, 0.5], [1.0, 1.0, 0.0, -5.0, 4.0, 4.0]]


def source_of(weight: Tensor, kernel: int) -> Source:
    rows, columns = weight.shape
    layer = Layer("conv", (rows, columns), "float32", 0, "conv", "conv", kernel=kernel)
    return Source(layer, Variant.dense(weight))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        # Sums of squares by kernel: 9, 8, 0.25 and 2, 25, 32.
        ({"sparsity": 0.34}, [[1, 1, 0], [0, 1, 1]]),
        ({"sparsity": 0.5, "per": "layer"}, [[1, 0, 0], [0, 1, 1]]),
        # Sums of sizes: 3, 4, 0.5 and 2, 5, 8.
        ({"sparsity": 0.67, "norm": "l1"}, [[0, 1, 0], [0, 0, 1]]),
    ],
    ids=str,
)
def test_kernels_by_hand(params: dict[str, Value], kept: list[list[int]]) -> None:
    method, source = Kernels(), source_of(torch.tensor(ROW), 2)
    settings = method.check(params)
    variant = method.compress([source], NO_STATISTICS, [settings])[0][0]
    assert variant.mask is not None
    assert variant.mask[:, ::2].int().tolist() == kept
    assert torch.equal(variant.mask[:, ::2], variant.mask[:, 1::2])
    declared = method.storage(source.layer, Storage.dense(source.layer), settings)
    assert variant.storage == declared
    assert declared.parts["mask"].nbytes == 1  # six kernels, a bit each


def test_a_kernel_of_one_place_is_a_weight() -> None:
    method, source = Kernels(), source_of(torch.tensor(ROW), 1)
    settings = method.check({"sparsity": 0.5})
    variant = method.compress([source], NO_STATISTICS, [settings])[0][0]
    assert variant.storage.mask == "bitmap"
    assert (variant.weight == 0).sum(1).tolist() == [3, 3]


def test_kernels_have_to_name_a_sparsity() -> None:
    with pytest.raises(MethodError, match="sparsity"):
        Kernels().check({})


def test_each_kernel_takes_the_best_of_the_usual_patterns() -> None:
    kernels = torch.tensor(
        [
            [9.0, 8.0, 0.0, 0.1],
            [7.0, 6.0, 0.1, 0.0],
            [0.0, 0.1, 5.0, 4.0],
            [0.1, 0.0, 3.0, 2.0],
            [1.0, 0.0, 9.0, 0.0],
        ]
    )
    found = in_patterns(kernels, keep=2, patterns=2).int().tolist()
    assert found[:2] == [[1, 1, 0, 0]] * 2
    assert found[2:] == [[0, 0, 1, 1]] * 3  # the last would rather keep 0 and 2
    alone = in_patterns(kernels, keep=2, patterns=6).int().tolist()
    assert alone[4] == [1, 0, 1, 0]


def test_patterns_are_few_and_counts_exact(rng: torch.Generator) -> None:
    method = KernelPatterns()
    source = source_of(torch.randn(16, 8 * 9, generator=rng), 9)
    settings = method.check({"patterns": 6})
    variant = method.compress([source], NO_STATISTICS, [settings])[0][0]
    assert variant.mask is not None
    kernels = variant.mask.view(-1, 9)
    assert (kernels.sum(1) == 4).all()
    assert len(kernels.unique(dim=0)) == 6
    declared = method.storage(source.layer, Storage.dense(source.layer), settings)
    assert variant.storage == declared
    assert declared.nbytes == 16 * 8 * 4 * 4 + 16 * 8 * 9 // 8
    dense, left = source.variant.weight, variant.weight
    assert torch.equal(left, torch.where(variant.mask, dense, 0.0))


@pytest.mark.parametrize(
    ("kernel", "keep", "why"),
    [
        (1, 4, "its kernels have 1 places: 4 are kept of more than that"),
        (4, 4, "its kernels have 4 places"),
        (49, 4, "and of 25 at most"),
        (25, 12, "there are 5200300 ways to keep 12 of 25 places. Take a keep "),
    ],
)
def test_kernels_without_patterns_are_refused(kernel: int, keep: int, why: str) -> None:
    method = KernelPatterns()
    layer = source_of(torch.zeros(4, 2 * kernel), kernel).layer
    reason = method.refuses(layer, Storage.dense(layer), method.check({"keep": keep}))
    assert reason is not None and why in reason


CASES: list[tuple[CompressionMethod, dict[str, Value]]] = [
    (Kernels(), {"sparsity": 0.5}),
    (Kernels(), {"sparsity": 0.3, "per": "layer", "norm": "l1"}),
    (KernelPatterns(), {"keep": 3, "patterns": 4}),
]


class TestContract(MethodContract):
    @pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}")
    def case(
        self, request: pytest.FixtureRequest
    ) -> tuple[CompressionMethod, dict[str, Value]]:
        case: tuple[CompressionMethod, dict[str, Value]] = request.param
        return case

    @pytest.fixture
    def method(
        self, case: tuple[CompressionMethod, dict[str, Value]]
    ) -> CompressionMethod:
        return case[0]

    @pytest.fixture
    def params(
        self, case: tuple[CompressionMethod, dict[str, Value]]
    ) -> dict[str, Value]:
        return case[1]

    def _found(
        self,
        shape: tuple[int, int] = (8, 32),
        *,
        name: str = "layers.0.q_proj",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> Source:
        """Make a layer with kernels of eight places."""
        found = tiny_source(shape, name=name, dtype=dtype, seed=seed)
        return replace(found, layer=replace(found.layer, kernel=8))
