"""Divergence and loss equal their plain formulas, on every path to them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.tasks import CausalLM
from tiny_models import tiny
from tiny_teachers import CASES, MASK, disturb, make, task_of, windows
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from autoprune.errors import ModelError
from autoprune.evaluation.quality import Quality
from autoprune.evaluation.teacher import HEADS, Teacher
from autoprune.models.layers import inventory, read_weight, write_weight
from autoprune.models.prefix import Prefix
from autoprune.models.task import CHUNK, Head, Task
from autoprune.models.text import TokenWindows
from autoprune.policy import Layer


def plain(
    task: Task, dense: nn.Module, model: nn.Module, text: TokenWindows
) -> tuple[Tensor, Tensor]:
    """Compute KL and loss of each window in double precision, from whole logits."""
    kl, nll = [], []
    for ids in text.ids:
        batch = task.batch(ids[None], MASK)
        p, q = (
            m(**batch.inputs).logits[batch.scored].double().log_softmax(-1)
            for m in (dense, model)
        )
        kl.append((p.exp() * (p - q)).sum(-1).mean())
        nll.append(-q.gather(1, batch.labels[:, None]).mean())
    return torch.stack(kl), torch.stack(nll)


@pytest.mark.parametrize("embedding", [False, True], ids=["layers", "embedding"])
@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_divergence_and_loss_equal_the_plain_formulas(
    kind: str, settings: dict[str, float], embedding: bool
) -> None:
    dense, model = make(kind, settings), make(kind, settings)
    task, text = task_of(kind), windows()
    teacher = Teacher(task, model, text, tokenizer=MASK, batch=2)
    disturb(model, embedding=embedding)
    found = teacher.measure(model)
    kl, nll = plain(task, dense, model, text)
    assert kl.min() > 1e-3
    torch.testing.assert_close(found.kl.double(), kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.nll.double(), nll, rtol=1e-5, atol=1e-5)
    assert math.isclose(found.mean_kl, float(kl.mean()), rel_tol=1e-4, abs_tol=1e-5)
    assert math.isclose(found.perplexity, float(nll.mean().exp()), rel_tol=1e-5)


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_the_dense_model_does_not_diverge(
    kind: str, settings: dict[str, float]
) -> None:
    model = make(kind, settings)
    teacher = Teacher(task_of(kind), model, windows(), tokenizer=MASK)
    assert teacher.dense.kl.abs().max() < 1e-5
    assert torch.equal(teacher.measure(model).nll, teacher.dense.nll)


def test_many_words_and_large_logits_lose_no_precision() -> None:
    dense, model = tiny("llama"), tiny("llama")
    head = nn.Linear(32, 49_152).requires_grad_(False)
    head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
    head.bias.fill_(64.0)
    dense.lm_head = model.lm_head = head
    teacher = Teacher(CausalLM(), model, windows(2), tokenizer=None)
    assert not teacher.dense.kl.any()
    disturb(model)
    kl, _ = plain(CausalLM(), dense, model, windows(2))
    found = teacher.measure(model).kl.double()
    torch.testing.assert_close(found, kl, rtol=1e-5, atol=2e-5)


def test_bfloat16_is_measured_as_it_computes() -> None:
    dense = tiny("llama").to(torch.bfloat16)
    model = tiny("llama").to(torch.bfloat16)
    teacher = Teacher(CausalLM(), model, windows(), tokenizer=None)
    assert teacher.dense.kl.abs().max() < 1e-5
    disturb(model)
    kl, nll = plain(CausalLM(), dense, model, windows())
    found = teacher.measure(model)
    # The plain logits are rounded to bfloat16, ours are not.
    torch.testing.assert_close(found.kl.double(), kl, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(found.nll.double(), nll, rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_perplexity_of_a_uniform_model_is_the_number_of_words(kind: str) -> None:
    model = tiny(kind)
    head = model.get_output_embeddings()
    head.weight.zero_()
    if head.bias is not None:
        head.bias.zero_()
    quality = Teacher(task_of(kind), model, windows(), tokenizer=MASK).dense
    assert math.isclose(quality.perplexity, 64, rel_tol=1e-6)
    assert abs(quality.mean_kl) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "bert", "gemma2"])
def test_some_windows_are_measured_as_among_all(kind: str) -> None:
    model = make(kind, {"final_logit_softcapping": 3.0} if kind == "gemma2" else {})
    teacher = Teacher(task_of(kind), model, windows(), tokenizer=MASK, batch=2)
    disturb(model)
    whole = teacher.measure(model)
    assert len(whole.kl) == 5
    for chosen in ([0], [4, 1], [3, 0, 2], [1, 1], range(5)):
        part, at = teacher.measure(model, chosen), torch.tensor(chosen)
        torch.testing.assert_close(part.kl, whole.kl[at], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part.nll, whole.nll[at])


@pytest.mark.parametrize(("kind", "settings"), CASES.values(), ids=CASES)
def test_the_pull_is_the_gradient_of_the_plain_formula(
    kind: str, settings: dict[str, float]
) -> None:
    dense, model = make(kind, settings), make(kind, settings)
    task, text = task_of(kind), windows()
    teacher = Teacher(task, model, text, tokenizer=MASK, batch=2)
    disturb(model, embedding=True)
    chosen = [3, 1]
    with torch.no_grad():
        features = task.features(model, teacher.batch_of(chosen))
    pull, of_head = teacher.pull(model, features, chosen, head=True)

    leaf = features.double().requires_grad_()
    head = task.head(model)
    head = replace(head, weight=head.weight.double().requires_grad_())
    if head.bias is not None:
        head = replace(head, bias=head.bias.double())
    logits = double_logits(head, leaf)
    parts = []
    for ids, q in zip(text.ids[chosen], logits.chunk(2), strict=True):
        batch = task.batch(ids[None], MASK)
        p = dense(**batch.inputs).logits[batch.scored].double().log_softmax(-1)
        parts.append((p.exp() * (p - q.log_softmax(-1))).sum(-1).mean())
    torch.stack(parts).mean().backward()
    assert leaf.grad is not None and of_head is not None
    torch.testing.assert_close(pull.double(), leaf.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(of_head.double(), head.weight.grad, rtol=1e-3, atol=1e-6)


def double_logits(head: Head, features: Tensor) -> Tensor:
    """``Head.logits``, which rounds to float32, in double precision."""
    logits = features @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    cap = head.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def test_chunks_and_batches_do_not_matter() -> None:
    model, text = tiny("llama"), windows(3, 2 * CHUNK + 5)
    teachers = [
        Teacher(CausalLM(), model, text, tokenizer=None, batch=batch)
        for batch in (1, 3)
    ]
    disturb(model)
    one, other = (teacher.measure(model) for teacher in teachers)
    torch.testing.assert_close(one.kl, other.kl, rtol=1e-4, atol=1e-6)


def test_a_restored_head_is_known_as_the_dense_one(
    tiny_model: LlamaForCausalLM,
) -> None:
    text = windows()
    teacher = Teacher(CausalLM(), tiny_model, text, tokenizer=None)
    before = tiny_model.lm_head.weight.clone()
    tiny_model.lm_head.weight.zero_()
    assert teacher.measure(tiny_model).mean_kl > 0.1
    tiny_model.lm_head.weight.copy_(before)
    assert teacher.measure(tiny_model).kl.abs().max() < 1e-5


def test_heads_that_come_and_go_are_each_compared_rightly() -> None:
    dense, model = tiny("qwen2"), tiny("qwen2")
    task, text = task_of("qwen2"), windows()
    teacher = Teacher(task, model, text, tokenizer=None, batch=2)
    weight = model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(4)
    heads = [
        weight + 0.05 * torch.randn(weight.shape, generator=generator)
        for _ in range(HEADS + 2)
    ]
    for head in [*heads, *heads[::-1], dense.get_output_embeddings().weight]:
        weight.copy_(head)
        kl, _ = plain(task, dense, model, text)
        found = teacher.measure(model).kl.double()
        torch.testing.assert_close(found, kl, rtol=1e-4, atol=1e-5)


def test_nothing_finite_stays_of_a_broken_model() -> None:
    model = tiny("llama")
    teacher = Teacher(CausalLM(), model, windows(), tokenizer=None)
    model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    found = teacher.measure(model)
    assert math.isnan(found.mean_kl)
    assert math.isnan(found.perplexity)


def test_perplexity_overflows_to_infinity() -> None:
    quality = Quality(torch.tensor([1.0]), torch.tensor([1e6]))
    assert quality.perplexity == math.inf
    assert math.isnan(quality.kl_error())


def test_the_standard_error_worked_by_hand() -> None:
    quality = Quality(torch.tensor([1.0, 2.0, 3.0, 2.0]), torch.zeros(4))
    assert quality.mean_kl == 2.0
    assert math.isclose(quality.kl_error(), math.sqrt(2 / 3) / 2)
    assert quality.perplexity == 1.0


class Louder(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def test_logits_that_no_head_explains_are_refused(tiny_model: LlamaForCausalLM) -> None:
    model = Louder(tiny_model.config).eval()
    with pytest.raises(ModelError, match="Louder makes its logits .* differ by 33.3%"):
        Teacher(CausalLM(), model, windows(), tokenizer=None)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bert"])
def test_blocks_that_do_not_run_change_no_bit(kind: str) -> None:
    model = tiny(kind)
    teacher = Teacher(task_of(kind), model, windows(), tokenizer=MASK, batch=2)
    found = inventory(model, register_architectures())
    disturb(model)
    anchor: dict[Layer, str] = dict.fromkeys(found.layers, "disturbed")
    prefix = Prefix(found)
    prefix.move(anchor)
    whole = teacher.measure(model)
    for _ in range(2):
        again = teacher.measure(model, prefix=prefix, unchanged=2)
        assert torch.equal(again.kl, whole.kl) and torch.equal(again.nll, whole.nll)
    layer = next(la for la in found.layers if la.block == 1)
    write_weight(model, layer, read_weight(model, layer) * 0.5)
    unchanged = prefix.unchanged(anchor | {layer: "half"})
    # Windows that the anchor was not measured on, batch by batch, run in full.
    for chosen in (None, [0, 1], [1, 0, 4], [4]):
        plain = teacher.measure(model, chosen)
        reused = teacher.measure(model, chosen, prefix=prefix, unchanged=unchanged)
        assert torch.equal(reused.kl, plain.kl) and torch.equal(reused.nll, plain.nll)
