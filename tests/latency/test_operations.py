"""What is timed beside products does what models do."""

import pytest
import torch
from torch.nn import functional

from autoprune.errors import ProfileError
from autoprune.latency.operations import calls_for
from autoprune.latency.plan import elementwise
from autoprune.latency.profiles import Point
from autoprune.latency.shape import ELEMENTWISE
from autoprune.latency.whole_models import LLAMA_8B, SMOLLM2_135M, Variation

CACHE = 1e5


def drawn(*shape: int) -> torch.Tensor:
    """Draw as the calls do: the same numbers from the same seed."""
    return torch.randn(shape, generator=RNG)


RNG = torch.Generator()


def result(what: str, n: int, *, m: int = 3, head_dim: int = 0) -> torch.Tensor:
    point = Point("elementwise", f"{what}.fp32", 0.0, m=m, n=n, head_dim=head_dim)
    (call,) = calls_for(point, torch.Generator().manual_seed(0), CACHE)
    found = call()
    RNG.manual_seed(0)
    return found


def test_a_norm_divides_by_the_root_mean_square() -> None:
    found, x = result("rms_norm", 8), drawn(1, 3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(found, expected)


def test_a_gate_and_a_sum_take_both_inputs() -> None:
    found, x, y = result("silu_mul", 8), drawn(1, 3, 8), drawn(1, 3, 8)
    torch.testing.assert_close(found, functional.silu(x) * y)
    found, x, y = result("add", 8), drawn(1, 3, 8), drawn(1, 3, 8)
    torch.testing.assert_close(found, x + y)


@pytest.mark.parametrize("heads", [1, 2, 4, 12])
def test_a_rotation_turns_all_heads(heads: int) -> None:
    queries, keys = result("rope", heads * 4, head_dim=4)
    assert queries.shape[1:] == (max(1, heads * 3 // 4), 3, 4)
    assert keys.shape[1] == max(1, heads - heads * 3 // 4)


def test_an_operation_that_is_not_known_is_refused() -> None:
    with pytest.raises(ProfileError, match="nothing is known of the operation 'gelu'"):
        result("gelu", 8)
    with pytest.raises(ProfileError, match="nothing is known of the operation 'warp'"):
        calls_for(Point("warp", "warp", 0.0), RNG, CACHE)


@pytest.mark.parametrize(
    ("target", "kind"), [(SMOLLM2_135M, "cpu"), (LLAMA_8B, "cuda")]
)
def test_a_model_has_all_its_operations_timed_at_its_own_widths(
    target: Variation, kind: str
) -> None:
    dtype = "float32" if kind == "cpu" else "bfloat16"
    points = elementwise(target, dtype, kind)
    known = {(p.kernel.partition(".")[0], p.n) for p in points}
    shape = target.shape()
    assert set(shape.blocks[0].elementwise(shape.hidden)) <= known
    assert {what for what, _ in known} == set(ELEMENTWISE)
    assert len({(p.kernel, p.n, p.m) for p in points}) == len(points)
