"""bfloat16 is taken where it is fast and agrees, and the verdict is remembered."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.tasks import CausalLM
from tiny_models import tiny
from torch import nn

from autoprune.evaluation.precision import (
    AGREEMENT,
    bfloat16_difference,
    choose_compute_dtype,
    fast_bfloat16,
)
from autoprune.models.text import TokenWindows


def windows(name: str = "0") -> TokenWindows:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (20, 24), generator=generator)
    return TokenWindows(ids, "statistics", "test", name * 16)


def choose(model: nn.Module, cache: Path, **changes: Any) -> torch.dtype:
    given = {"tokenizer": None, "cache": cache, "revision": "r", "fast": True} | changes
    return choose_compute_dtype(CausalLM(), model, windows(), **given)


def verdicts(cache: Path) -> list[Path]:
    return sorted(cache.glob("precision/*"))


def exaggerate(model: nn.Module) -> nn.Module:
    """Make logits that bfloat16 cannot tell apart."""
    model.lm_head.weight *= 300  # type: ignore[operator]
    return model


def perplexity(model: nn.Module, dtype: torch.dtype) -> float:
    copy = tiny("llama")
    copy.load_state_dict(model.state_dict())
    copy = copy.to(dtype)
    loss = [
        nn.functional.cross_entropy(copy(ids[None]).logits[0, :-1].float(), ids[1:])
        for ids in windows().ids[:16]
    ]
    return float(torch.stack(loss).double().mean().exp())


def test_the_difference_is_that_of_perplexities() -> None:
    model = tiny("llama")
    found = bfloat16_difference(CausalLM(), model, windows(), tokenizer=None)
    half, full = (perplexity(model, d) for d in (torch.bfloat16, torch.float32))
    assert 0 < found < 0.01
    # The plain logits are rounded to bfloat16 once more.
    assert found == pytest.approx(abs(half / full - 1), abs=0.002)


def test_agreement_decides(tmp_path: Path) -> None:
    good = tiny("llama")
    good.lm_head.weight *= 0.1
    difference = bfloat16_difference(CausalLM(), good, windows(), tokenizer=None)
    assert difference < AGREEMENT
    assert choose(good, tmp_path) is torch.bfloat16
    bad = exaggerate(tiny("llama"))
    difference = bfloat16_difference(CausalLM(), bad, windows(), tokenizer=None)
    assert difference > AGREEMENT
    assert choose(bad, tmp_path, revision="s") is torch.float32


def test_what_overflows_does_not_agree() -> None:
    model = tiny("llama")
    model.lm_head.weight.fill_(math.inf)
    found = bfloat16_difference(CausalLM(), model, windows(), tokenizer=None)
    assert found == math.inf


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_is_left_as_it_was(stored: torch.dtype, tmp_path: Path) -> None:
    model = tiny("qwen2").to(stored)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choose(model, tmp_path)
    after = model.state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == stored
        assert torch.equal(after[name], tensor)
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Broken(CausalLM):
    def features(self, *args: Any) -> torch.Tensor:
        raise RuntimeError("no features")


def test_the_model_is_left_as_it_was_by_a_failure() -> None:
    model = tiny("llama")
    with pytest.raises(RuntimeError, match="no features"):
        bfloat16_difference(Broken(), model, windows(), tokenizer=None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_verdict_is_remembered_by_what_it_depends_on(tmp_path: Path) -> None:
    choose(tiny("llama"), tmp_path)
    (first,) = verdicts(tmp_path)
    assert json.loads(first.read_text())["difference"] > 0
    # Another model under the name of the first: its verdict is that of the first.
    remembered = choose(exaggerate(tiny("llama")), tmp_path)
    assert remembered is choose(tiny("llama"), tmp_path)
    assert verdicts(tmp_path) == [first]
    choose(tiny("llama"), tmp_path, revision="s")
    assert len(verdicts(tmp_path)) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"dtype": "bfloat16"}', "null"])
def test_a_damaged_verdict_is_made_again(content: str, tmp_path: Path) -> None:
    first = choose(tiny("llama"), tmp_path)
    (path,) = verdicts(tmp_path)
    before = path.read_text()
    path.write_text(content)
    assert choose(tiny("llama"), tmp_path) is first
    assert path.read_text() == before


def test_a_slow_processor_computes_in_float32(tmp_path: Path) -> None:
    assert choose(tiny("llama"), tmp_path, fast=False) is torch.float32
    assert verdicts(tmp_path) == []


def test_the_processor_is_asked_if_nobody_says(tmp_path: Path) -> None:
    choose(tiny("llama"), tmp_path, fast=None)
    assert bool(verdicts(tmp_path)) == fast_bfloat16()
