"""Losses of recovery against torch's own, computed with all logits at once."""

import math
from typing import Any

import pytest
import torch
from autoprune_plugins.tasks import CausalLM
from tiny_models import tiny
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import ConfigError, ModelError
from autoprune.training import head_loss
from autoprune.training.losses import LossWeights, RecoveryLoss, square_head

BLOCKS = {
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "opt": ("model.decoder.layers.0", "model.decoder.layers.1"),
}


def windows() -> Tensor:
    return torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))


def blocks_of(kind: str) -> tuple[str, ...]:
    return BLOCKS.get(kind, ("model.layers.0", "model.layers.1"))


def student(kind: str) -> nn.Module:
    """A model that differs from the dense one in every parameter."""
    model, generator = tiny(kind), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.1 * noise).requires_grad_()
    return model


def reference(model: Any, dense: Any, ids: Tensor, weights: LossWeights) -> Tensor:
    """The whole loss as it stands in the papers, from the models' own outputs."""
    own = model(ids, output_hidden_states=True)
    with torch.no_grad():
        other = dense(ids, output_hidden_states=True)
    logits, known = own.logits[:, :-1].flatten(0, 1), other.logits[:, :-1].flatten(0, 1)
    loss = weights.task * functional.cross_entropy(logits, ids[:, 1:].flatten())
    heat = weights.temperature
    p, q = (known / heat).softmax(-1), (logits / heat).softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    loss = loss + weights.divergence * heat**2 * kl
    if weights.hidden:  # of the first block only
        for one, wanted in zip(
            own.hidden_states[1:2], other.hidden_states[1:2], strict=True
        ):
            error = (one - wanted).square().mean() / wanted.square().mean()
            loss = loss + weights.hidden * error
    size = sum(p.abs().sum() for p in model.parameters() if p.dim() > 1)
    return loss + weights.l1 * size


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt", "gemma2", "granite"])
@pytest.mark.parametrize("positions", [256, 5])
@pytest.mark.parametrize(
    "weights",
    [
        LossWeights(),
        LossWeights(task=0.0, divergence=1.0),
        LossWeights(task=0.5, divergence=2.0, temperature=3.0),
        LossWeights(task=1.0, hidden=0.7, l1=0.01),
    ],
    ids=["task", "divergence", "warm", "hidden and l1"],
)
def test_value_and_gradients_are_torchs_own(
    kind: str, positions: int, weights: LossWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "POSITIONS", positions)
    model, dense, ids = student(kind), tiny(kind), windows()
    expected = reference(model, dense, ids, weights)
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss = RecoveryLoss(
        CausalLM(),
        None,
        weights=weights,
        teacher=dense,
        blocks=blocks_of(kind)[:1],
    )
    found = loss(model, ids)
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-6)
    (found.total / 2).backward()  # as gradient accumulation does
    for name, parameter in model.named_parameters():
        if wanted[name] is not None:
            assert parameter.grad is not None, name
            torch.testing.assert_close(
                2 * parameter.grad, wanted[name], rtol=1e-3, atol=1e-6
            )
    assert not any(p.requires_grad for p in dense.parameters())


def test_terms_are_told_without_their_weights() -> None:
    model, dense, ids = student("llama"), tiny("llama"), windows()
    weights = LossWeights(task=2.0, divergence=3.0, hidden=0.5, l1=0.1)
    loss = RecoveryLoss(
        CausalLM(), None, weights=weights, teacher=dense, blocks=blocks_of("llama")
    )
    found = loss(model, ids)
    by = {"task": 2.0, "divergence": 3.0, "hidden": 0.5, "l1": 0.1}
    total = sum(by[name] * float(term) for name, term in found.terms.items())
    assert total == pytest.approx(float(found.total.detach()), rel=1e-6)
    assert all(float(term) > 0 for term in found.terms.values())
    assert not any(term.requires_grad for term in found.terms.values())


def test_the_dense_model_is_at_no_distance_from_itself() -> None:
    loss = RecoveryLoss(
        CausalLM(),
        None,
        weights=LossWeights(divergence=1.0, hidden=1.0, temperature=2.0),
        teacher=tiny("llama"),
        blocks=blocks_of("llama"),
    )
    found = loss(tiny("llama"), windows())
    assert float(found.terms["divergence"]) == pytest.approx(0.0, abs=1e-6)
    assert float(found.terms["hidden"]) == 0.0


def test_a_uniform_model_costs_the_log_of_its_vocabulary() -> None:
    model = tiny("llama")
    model.lm_head.weight.zero_()
    found = RecoveryLoss(CausalLM(), None)(model, windows())
    assert float(found.total) == pytest.approx(math.log(64), rel=1e-6)
    each = RecoveryLoss(CausalLM(), None).quality(model, windows())
    assert each.shape == (3 * 11,)
    assert each.tolist() == pytest.approx([math.log(64)] * 33, rel=1e-6)


def test_square_head_by_hand() -> None:
    dense = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    assert float(square_head(dense, dense)) == 0.0
    # An error of 1 everywhere, over a mean square of (4 + 16) / 4.
    assert float(square_head(dense + 1, dense)) == pytest.approx(1 / 5, rel=1e-6)
    # It does not depend on the scale of the hidden states.
    assert float(square_head(10 * dense + 10, 10 * dense)) == pytest.approx(0.2)
    assert float(square_head(torch.zeros(2), torch.zeros(2))) == 0.0


def test_only_what_is_trained_gets_a_gradient() -> None:
    model, dense = tiny("llama"), tiny("llama")
    only = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    only.requires_grad_()
    weights = LossWeights(divergence=1.0, l1=1.0)
    loss = RecoveryLoss(CausalLM(), None, weights=weights, teacher=dense)
    found = loss(model, windows())
    assert float(found.terms["l1"]) == pytest.approx(float(only.detach().abs().sum()))
    found.total.backward()
    having = [name for name, p in model.named_parameters() if p.grad is not None]
    assert having == ["model.layers.1.mlp.up_proj.weight"]


def test_under_autocast_it_is_near_and_in_float32() -> None:
    model, dense, ids = student("llama"), tiny("llama"), windows()
    weights = LossWeights(task=1, divergence=1, hidden=1)
    loss = RecoveryLoss(
        CausalLM(), None, weights=weights, teacher=dense, blocks=blocks_of("llama")
    )
    exact = loss(model, ids).total
    with torch.autocast("cpu", torch.bfloat16):
        near = loss(model, ids).total
        near.backward()
    assert near.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = loss(model, ids)
    total = sum(float(again.terms[name]) for name in ("task", "divergence", "hidden"))
    assert float(again.total.detach()) == pytest.approx(total, rel=1e-6)
    torch.testing.assert_close(near, exact, rtol=0.02, atol=0.02)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32


def test_heads_never_see_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "POSITIONS", 4)
    seen: list[int] = []
    logits = head_loss.Head.logits

    def watched(self: Any, features: Tensor) -> Tensor:
        seen.append(len(features))
        return logits(self, features)

    monkeypatch.setattr(head_loss.Head, "logits", watched)
    weights = LossWeights(divergence=1.0)
    loss = RecoveryLoss(CausalLM(), None, weights=weights, teacher=tiny("llama"))
    loss(student("llama"), windows()).total.backward()
    assert seen == 2 * 8 * [4] + [1, 1]  # 33 positions, of both models


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"task": -1.0}, "task is 0 or more, found -1.0"),
        ({"hidden": float("nan")}, "hidden is 0 or more, found nan"),
        ({"task": 0.0, "l1": 1.0}, "found 0 for all three"),
        ({"temperature": 0.0}, "above 0, found 0.0"),
    ],
)
def test_weights_out_of_range_are_named(wrong: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LossWeights(**wrong)


def test_distillation_without_its_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"divergence 0.5 and hidden 0.0"):
        RecoveryLoss(CausalLM(), None, weights=LossWeights(divergence=0.5))
    with pytest.raises(ConfigError, match=r"hidden is 0.5, but there are no blocks"):
        RecoveryLoss(
            CausalLM(), None, weights=LossWeights(hidden=0.5), teacher=tiny("llama")
        )


def test_a_dense_model_is_another_one_with_the_same_classes() -> None:
    model, weights = tiny("llama"), LossWeights(divergence=1.0)
    same = RecoveryLoss(CausalLM(), None, weights=weights, teacher=model)
    with pytest.raises(ModelError, match="cannot be its own dense model"):
        same(model, windows())
    other = tiny("llama", vocab_size=72)
    with pytest.raises(ModelError, match=r"has 72 classes, the compressed one's 64"):
        RecoveryLoss(CausalLM(), None, weights=weights, teacher=other)(model, windows())
