"""Whole models: what is built is what its points tell."""

from dataclasses import replace

import pytest
import torch
from latency.tiny_recordings import TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.errors import ProfileError
from autoprune.latency import model_running
from autoprune.latency.model_running import KernelLinear, build_model, pass_of, tune
from autoprune.latency.profiles import FIT, VALIDATION
from autoprune.latency.whole_models import (
    LLAMA_8B,
    Step,
    Variation,
    dtype_of,
    model_plan,
    planned,
    shape_of,
    variations,
)

VARIATIONS = variations(TINY, "cpu")
DECODE, PREFILL = Step("model_decode", 2, 12), Step("model_prefill", 2, 8)


def linears_of(model: nn.Module) -> list[tuple[str, int, int, bool]]:
    """List a model's products: name, outputs, inputs, and if a kernel of ours does."""
    found = []
    for name, module in model.named_modules():
        short = name.rpartition(".")[2]
        if isinstance(module, nn.Linear):
            found.append((short, module.out_features, module.in_features, False))
        elif isinstance(module, KernelLinear):
            found.append((short, *module.sizes, True))
    return found


@pytest.mark.parametrize("variation", VARIATIONS, ids=lambda one: one.name)
def test_the_shape_of_a_point_is_the_model_that_was_timed(
    variation: Variation, rng: torch.Generator
) -> None:
    point = planned("tiny", variation, DECODE)
    shape = shape_of(point)
    built = linears_of(build_model(variation, "cpu", rng))
    told = [
        (one.name.rpartition(".")[2], one.n, one.k)
        for block in shape.blocks
        for one in block.linears
    ]
    assert shape.head is not None
    told.append(("lm_head", shape.head.n, shape.head.k))
    assert sorted(told) == sorted(one[:3] for one in built)
    ours = any(one[3] for one in built)
    formats = {one.format for block in shape.blocks for one in block.linears}
    assert ours == (formats == {"int8"})
    attention = shape.blocks[0].attention
    assert attention is not None
    assert (attention.heads, attention.kv_heads) == (variation.heads, point.kv_heads)
    assert dtype_of(point) == variation.dtype


@pytest.mark.parametrize("variation", VARIATIONS, ids=lambda one: one.name)
@pytest.mark.parametrize("step", [DECODE, PREFILL], ids=lambda step: step.op)
def test_passes_can_be_run_again_and_again(
    variation: Variation, step: Step, rng: torch.Generator
) -> None:
    run = pass_of(build_model(variation, "cpu", rng), step, rng)
    first = run()
    assert first.shape == (2, 1, 256) and first.isfinite().all()
    assert all(torch.equal(run(), first) for _ in range(15))


def test_a_decode_step_attends_to_the_whole_cache(rng: torch.Generator) -> None:
    model = build_model(TINY, "cpu", rng)
    seen: list[tuple[int, ...]] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            if "scaled_dot_product" in str(func):
                seen.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    run = pass_of(model, DECODE, rng)
    run()
    with Spy():
        run()
    assert len(seen) == TINY.blocks
    assert {shape[-2] for shape in seen} == {DECODE.context}


def test_the_head_gets_rows_side_by_side(rng: torch.Generator) -> None:
    """Rows that lie apart make torch copy the whole head; seen in bfloat16."""
    model = build_model(TINY, "cpu", rng)
    strides: list[tuple[int, ...]] = []
    head = model.lm_head
    head.register_forward_pre_hook(lambda _, args: strides.append(args[0].stride()))
    pass_of(model, Step("model_prefill", 1, 8), rng)()
    assert strides == [(64, 64, 1)]


FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "item")


@pytest.mark.parametrize("step", [DECODE, PREFILL], ids=lambda step: step.op)
def test_a_pass_asks_nothing_of_the_host_that_no_graph_allows(
    step: Step, rng: torch.Generator
) -> None:
    names: list[str] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
            names.append(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    run = pass_of(build_model(TINY, "cpu", rng), step, rng)
    run()
    with Spy():
        run()
    assert len(names) > 50
    assert not set(names) & set(FORBIDDEN)


def test_int8_models_compute_nearly_what_dense_ones_do(rng: torch.Generator) -> None:
    states = []
    for variation in (TINY, replace(TINY, attention="int8", mlp="int8")):
        own = torch.Generator().manual_seed(7)
        states.append(pass_of(build_model(variation, "cpu", own), PREFILL, rng))
    torch.manual_seed(0)
    first, second = (run() for run in states)
    assert first.shape == second.shape
    # The prompts differ, as the generator went on; so only the size is alike.
    assert second.std() == pytest.approx(float(first.std()), rel=0.3)


def test_zeros_are_where_they_are_said_to_be(rng: torch.Generator) -> None:
    for name, pattern in (("zeros-2:4", 0.5), ("zeros-unstructured", 0.5)):
        variation = next(one for one in VARIATIONS if one.name == name)
        model = build_model(variation, "cpu", rng)
        weight = model.model.layers[0].mlp.up_proj.weight
        assert float((weight == 0).float().mean()) == pytest.approx(pattern, abs=0.02)
        assert bool((model.lm_head.weight != 0).float().mean() > 0.99)
        if name == "zeros-2:4":
            fours = (weight.reshape(-1, 4) == 0).sum(1)
            assert (fours == 2).all()


def test_variations_by_hand() -> None:
    found = {one.name: one for one in variations(LLAMA_8B, "cuda")}
    assert next(iter(found)) == "dense"
    assert found["width-50%"].width == 7168
    assert (found["heads-16-of-32"].heads, found["heads-16-of-32"].kv_heads) == (16, 4)
    assert found["blocks-22-of-32"].blocks == 22
    assert found["2:4-mlp"].mlp == "2:4" and found["2:4-mlp"].attention == "dense"
    for one in found.values():
        for form in {one.attention, one.mlp} - {"dense"}:
            kernel = model_running.kernel_for(form, "cuda", "bfloat16")
            assert kernel.format == form
            block = one.shape().blocks[0]
            assert all(
                kernel.takes(li.n, li.k) for li in block.linears if li.format == form
            )


def test_only_dense_models_of_the_plan_are_there_to_fit() -> None:
    for kind in ("cpu", "cuda"):
        for point in model_plan(kind):
            dense = point.kernel.endswith(" dense")
            assert point.split == (FIT if dense else VALIDATION)
            new = point.m // point.batch
            assert new == (1 if point.op == "model_decode" else point.context)


def test_a_format_without_a_kernel_is_refused() -> None:
    with pytest.raises(ProfileError, match="no kernel multiplies 2:4 on cpu"):
        model_running.kernel_for("2:4", "cpu", "float32")


def test_products_are_tuned_to_the_tokens(rng: torch.Generator) -> None:
    variation = replace(TINY, mlp="int8")
    model = build_model(variation, "cpu", rng)
    asked: list[tuple[str, int, int, int]] = []

    def algorithm(kernel: object, n: int, k: int, m: int) -> int:
        asked.append((kernel.name, n, k, m))  # type: ignore[attr-defined]
        return 3

    tune(model, 8, algorithm)  # these products have no choice
    assert asked == []
    chooser = model.model.layers[0].mlp.up_proj

    class Choosing:
        algorithm = 0

    chooser.product = Choosing()
    tune(model, 8, algorithm)
    assert asked == [("cpu.int8.x86", 128, 64, 8)]
    assert chooser.product.algorithm == 3
