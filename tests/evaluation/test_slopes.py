"""Slopes are the derivatives that the plain formulas have."""

import pytest
import torch
from tiny_teachers import CASES, MASK, disturb, make, task_of, windows

from autoprune.evaluation.slopes import measure_slopes
from autoprune.evaluation.teacher import Teacher
from autoprune.models.layers import inventory, read_weight, write_weight
from autoprune.models.weights import parameter_of, view_of_layer
from autoprune.plugins import load_plugins

KINDS = {k: v for k, v in CASES.items() if k not in ("scale", "scaled-bias")}


def ready(kind, settings):
    model = make(kind, settings)
    teacher = Teacher(task_of(kind), model, windows(5), tokenizer=MASK)
    disturb(model, embedding=True)
    found = inventory(model, list(load_plugins().objects["architectures"].values()))
    generator = torch.Generator().manual_seed(7)
    variants = {}
    for layer in found.layers:
        now = read_weight(model, layer)
        noise = torch.randn(2, *now.shape, generator=generator) * 0.02
        variants[layer] = [now + noise[0], now + noise[1], now.clone()]
    return model, teacher, variants


@pytest.mark.parametrize(("kind", "settings"), KINDS.values(), ids=KINDS)
def test_slopes_are_the_derivatives_of_the_kl(kind, settings):
    model, teacher, variants = ready(kind, settings)
    before = {n: p.clone() for n, p in model.named_parameters()}
    chosen = [4, 0, 2, 1, 3]
    slopes = measure_slopes(model, teacher, variants, chosen)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    gradients = plain_gradients(make(kind, settings), model, teacher, chosen)
    for layer, priced in variants.items():
        kl = slopes[layer].kl
        assert kl.shape == (5, 3) and slopes[layer].score.shape == (0, 3)
        assert not kl[:, 2].any()
        now = read_weight(model, layer)
        gradient = view_of_layer(model, layer.name, gradients[parameter_of(layer.name)])
        for index in (0, 1):
            plain = float((gradient * (priced[index] - now)).sum())
            found = float(kl[:, index].mean())
            assert found == pytest.approx(plain, rel=1e-3, abs=1e-5), layer.name


def plain_gradients(dense, model, teacher, chosen):
    """Differentiate the mean KL of whole logits."""
    batch = teacher.batch_of(chosen)
    for parameter in model.parameters():
        parameter.requires_grad_()
    p, q = (m(**batch.inputs).logits.log_softmax(-1) for m in (dense, model))
    kl = (p.exp() * (p - q)).sum(-1)[batch.scored]
    kl.mean().backward()  # as many positions a window: the mean of window means
    found = {name: p.grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return found


@pytest.mark.parametrize("case", ["plain", "tied"])
def test_slopes_may_be_taken_of_a_head_that_a_measurement_saw_first(case):
    kind, settings = KINDS[case]
    model, teacher, variants = ready(kind, settings)
    asked = [0, 1, 2, 3, 4]
    before = measure_slopes(model, teacher, variants, asked)
    model, teacher, variants = ready(kind, settings)
    teacher.measure(model)
    after = measure_slopes(model, teacher, variants, asked)
    assert all(torch.equal(after[la].kl, before[la].kl) for la in variants)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_foretell_the_second_order_change(kind):
    """At the dense model the KL has no first order, and half the mean square is it."""
    model = make(kind, {})
    teacher = Teacher(task_of(kind), model, windows(40), tokenizer=MASK)
    found = inventory(model, list(load_plugins().objects["architectures"].values()))
    layer = next(la for la in found.layers if la.role.endswith(("down_proj", "c_proj")))
    now = read_weight(model, layer).clone()
    noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(8)) * 0.05
    slopes = measure_slopes(model, teacher, {layer: [now + noise]}, range(40), draws=8)
    assert slopes[layer].kl.abs().max() < 1e-4
    assert slopes[layer].score.shape == (320, 1)
    foretold = float(slopes[layer].score.square().mean() / 2)
    write_weight(model, layer, now + noise)
    assert foretold == pytest.approx(teacher.measure(model).mean_kl, rel=0.25)


def test_draws_depend_on_the_seed_alone():
    model, teacher, variants = ready("llama", {})
    one, same, other = (
        measure_slopes(model, teacher, variants, [0, 1], draws=1, seed=seed)
        for seed in (1, 1, 2)
    )
    layer = next(iter(variants))
    assert torch.equal(one[layer].score, same[layer].score)
    assert not torch.equal(one[layer].score, other[layer].score)
