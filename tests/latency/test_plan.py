"""Plans: ladders, shapes, what is held out."""

import pytest
from latency.tiny_recordings import TINY

from autoprune.latency.kernels import KERNELS
from autoprune.latency.pacing import seconds_of
from autoprune.latency.plan import (
    HEAD_TOKENS,
    attentions,
    kernel_plan,
    probe_plan,
    spread,
    target_sites,
    widths,
)
from autoprune.latency.profiles import HOLDOUT, split_of
from autoprune.latency.whole_models import LLAMA_1B, SMOLLM2_135M, model_plan


@pytest.mark.parametrize(
    ("width", "ladder"),
    [
        (8192, [1024, 2048, 3072, 4096, 5120, 6144, 7168, 8192]),
        (1536, [192, 384, 576, 768, 960, 1152, 1344, 1536]),
        (11008, [1408, 2752, 4160, 5504, 6848, 8256, 9600, 11008]),
        (16, [16]),
    ],
)
def test_ladders_are_eighths_in_steps_that_fit(width: int, ladder: list[int]) -> None:
    found = widths(width)
    if width == 11008:  # eighths are no multiples of 128, but of 32
        assert all(one % 32 == 0 for one in found)
        assert len(found) == 8 and found[-1] == width
    else:
        assert found == ladder


def test_shapes_of_a_target_by_hand() -> None:
    # Width 128 in eighths of 16; 2 groups of 2 heads of 16.
    wanted = {(w, 64) for w in range(16, 129, 16)} | {
        (64, w) for w in range(16, 129, 16)
    }
    wanted |= {(64, 64), (32, 64), (64, 32), (16, 64)}
    assert set(target_sites(TINY)) == wanted
    assert target_sites(TINY)[0] == (128, 64)


def test_every_matrix_of_a_whole_model_is_measured_exactly() -> None:
    for kind, model in (("cpu", SMOLLM2_135M), ("cuda", LLAMA_1B)):
        dense = "cpu.linear.fp32" if kind == "cpu" else "torch.mm.bf16"
        known = {(p.n, p.k) for p in kernel_plan(kind) if p.kernel == dense}
        for linear in model.shape().blocks[0].linears:
            assert (linear.n, linear.k) in known
        assert (model.vocabulary, model.hidden) in known


def test_shapes_are_spread_far_from_each_other() -> None:
    grid = [(1, 1), (2, 1), (4, 1), (8, 1), (64, 1)]
    assert spread(grid, 3, [(1, 1)]) == [(64, 1), (8, 1), (2, 1)]
    assert spread(grid, 9, []) == [(1, 1), (64, 1), (8, 1), (2, 1), (4, 1)]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_plans_hold_whole_shapes_out_and_ask_kernels_only_for_what_they_take(
    kind: str,
) -> None:
    plan = kernel_plan(kind)
    assert len(set(plan)) == len(plan)
    gemms = [point for point in plan if point.op == "gemm"]
    for point in gemms:
        kernel = KERNELS[point.kernel]
        assert kernel.device == kind and kernel.takes(point.n, point.k)
        assert point.split == split_of(point.kernel, point.n, point.k)
    share = sum(point.split == HOLDOUT for point in gemms) / len(gemms)
    assert 0.1 < share < 0.35
    assert {p.kernel for p in gemms} >= {
        k.name for k in KERNELS.values() if k.device == kind
    } - {"cpu.linear.fp16", "cpu.int4pack_mm.g256"}
    tokens = {point.m for point in gemms if point.n == 64 * 768}
    assert not tokens or tokens == set(HEAD_TOKENS[kind])


def test_dense_points_come_first_then_2_4() -> None:
    order = list(dict.fromkeys(p.kernel for p in kernel_plan("cuda")))
    assert order[:3] == ["launch.eager", "launch.graph", "copy"]
    first = [order.index(name) for name in ("torch.mm.bf16", "cslt.24.bf16")]
    assert first == sorted(first)
    assert order.index("cslt.24.bf16") < order.index("torch.scaled_mm.row")


def test_attention_comes_with_whole_groups() -> None:
    for point in attentions(SMOLLM2_135M, "float32", "cpu"):
        assert point.heads == 3 * point.kv_heads
        assert point.kernel == "sdpa.fp32"
        new = point.m // point.batch
        assert new == (point.context if point.op == "attn_prefill" else 1)


@pytest.mark.parametrize(("kind", "minutes"), [("cpu", 6), ("cuda", 8)])
def test_plans_fit_their_time(kind: str, minutes: float) -> None:
    points = [*kernel_plan(kind), *model_plan(kind)]
    assert sum(seconds_of(p, kind) for p in points) < 60 * minutes
    assert sum(seconds_of(p, kind) for p in probe_plan(kind)) < 40
