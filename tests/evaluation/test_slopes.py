"""Slopes are the derivatives that the plain formulas have."""

import pytest
import torch
from tiny_teachers import CASES, MASK, disturb, make, task_of, windows
from torch import nn

from autoprune.evaluation.slopes import measure_slopes
from autoprune.evaluation.teacher import Teacher
from autoprune.models.biases import bias_of, put_bias, with_bias
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


def test_biases_that_variants_bring_are_priced_with_them():
    """Weight and bias together have the price that both derivatives give."""
    model, teacher, variants = ready("llama", {})
    layers = [la for la in variants if la.name.endswith(("o_proj", "down_proj"))]
    generator = torch.Generator().manual_seed(3)
    now = {la: torch.randn(32, generator=generator) * 0.1 for la in layers}
    for layer in layers:
        put_bias(model, layer, now[layer])
    priced = {}
    for layer in layers:
        one, two, same = variants[layer]
        bias = torch.randn(32, generator=generator) * 0.1
        priced[layer] = [with_bias(one, bias), two, with_bias(same, now[layer])]
    slopes = measure_slopes(model, teacher, priced, [0, 1, 2], draws=1)

    dense = make("llama", {})
    gradients = plain_gradients(dense, model, teacher, [0, 1, 2])
    for layer in layers:
        module = model.get_submodule(layer.name)
        by_weight = gradients[f"{layer.name}.weight"]
        by_bias = gradients[f"{layer.name}.bias"]
        none = torch.zeros(32)
        for index, weight in enumerate(priced[layer]):
            bias = bias_of(weight)
            change = (none if bias is None else bias) - now[layer]
            plain = float((by_weight * (weight - module.weight)).sum())
            plain += float((by_bias * change).sum())
            found = float(slopes[layer].kl[:, index].mean())
            assert found == pytest.approx(plain, rel=1e-3, abs=1e-5), layer.name
        assert slopes[layer].score.shape == (3, 3)
        assert not slopes[layer].score[:, 2].any()


def test_labels_are_drawn_for_the_first_windows_only():
    model, teacher, variants = ready("llama", {})
    slopes = measure_slopes(model, teacher, variants, range(5), draws=2, drawn=3)
    for found in slopes.values():
        assert found.kl.shape == (5, 3)
        assert found.score.shape == (6, 3)
        assert not len(found.crossed)


def heard(model, layer):
    """Catch what a layer reads and the gradients of what it gives."""
    seen = {"read": [], "given": []}

    def hear(module, inputs, output):
        seen["read"].append(inputs[0].detach().flatten(0, 1))
        output.requires_grad_()  # no layer before it is priced
        output.register_hook(lambda g: seen["given"].append(g.flatten(0, 1)))

    handle = model.get_submodule(layer.name).register_forward_hook(hear)
    return seen, handle


@pytest.mark.parametrize("sampled", [3, 10**6])
def test_pairs_are_the_squares_of_every_gradient_with_every_change(sampled):
    model, teacher, variants = ready("llama", {})
    layer = next(la for la in variants if la.name.endswith("1.mlp.up_proj"))
    seen, handle = heard(model, layer)
    slopes = measure_slopes(
        model, teacher, {layer: variants[layer]}, [1, 3], draws=1, sampled=sampled
    )
    handle.remove()
    read, (_, given) = seen["read"][0], seen["given"]  # the second pass is of labels
    stride = -(-len(read) // sampled)
    at = range(stride // 2, len(read), stride)
    assert len(at) <= sampled
    for index, weight in enumerate(variants[layer]):
        moved = read[at] @ (weight - read_weight(model, layer)).T
        plain = sum(float(g @ m) ** 2 for g in given[at] for m in moved)
        expected = plain / len(at) ** 2 / 2
        found = float(slopes[layer].crossed[index])
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_outputs_apart_are_the_sum_of_the_squares_of_every_number():
    """Weights and biases, over two passes of labels."""
    model, teacher, variants = ready("llama", {})
    layer = next(la for la in variants if la.name.endswith("1.mlp.down_proj"))
    bias = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 0.1
    priced = [with_bias(variants[layer][0], bias), *variants[layer][1:]]
    seen, handle = heard(model, layer)
    slopes = measure_slopes(
        model, teacher, {layer: priced}, [1, 3, 4], draws=2, apart=True
    )[layer]
    handle.remove()
    (read,), (_, *given) = seen["read"], seen["given"]  # the first pass is the KL's
    assert len(given) == 2 and slopes.apart.shape == (3,)
    positions = 2 * int(teacher.batch_of([1, 3, 4]).scored.sum())
    for index, weight in enumerate(priced):
        moved = read @ (weight - read_weight(model, layer)).T
        moved = (moved + bias if index == 0 else moved).tolist()
        plain = sum(
            (g * m) ** 2
            for gradient in given
            for g_row, m_row in zip(gradient.tolist(), moved, strict=True)
            for g, m in zip(g_row, m_row, strict=True)
        )
        found = float(slopes.apart[index])
        assert found == pytest.approx(plain / positions / 2, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(
    ("length", "rows", "exact"), [(2, 1, 1), (2, 9, 0), (24, 1, 0)]
)
def test_apart_is_the_whole_where_one_number_changes(length, rows, exact):
    """One output, at one position: of two tokens only the first has a gradient."""
    model = make("llama", {})
    teacher = Teacher(task_of("llama"), model, windows(9, length), tokenizer=MASK)
    found = inventory(model, list(load_plugins().objects["architectures"].values()))
    variants = {}
    for layer in (la for la in found.layers if la.role.endswith("_proj")):
        now = read_weight(model, layer)
        changed = now.clone()
        changed[2 : 2 + rows] = 0
        variants[layer] = [changed]
    slopes = measure_slopes(model, teacher, variants, range(9), draws=4, apart=True)
    wholes = {la: one.score.square().mean(0) / 2 for la, one in slopes.items()}
    # A lone token attends to itself, whatever its query and key are.
    alike = [
        torch.allclose(slopes[la].apart, wholes[la], rtol=1e-3)
        for la in variants
        if la.role not in ("q_proj", "k_proj")
    ]
    assert len(alike) > 6
    assert all(alike) if exact else not any(alike)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "qwen2"])
def test_apart_is_the_whole_where_outputs_are_not_heard(kind):
    """Transposed weights, experts and a tied head."""
    model, teacher, variants = ready(kind, {})
    slopes = measure_slopes(model, teacher, variants, [0, 2], draws=3, apart=True)
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    others = [layer for layer in variants if layer.name not in linear]
    assert others
    for layer in others:
        whole = slopes[layer].score.square().mean(0) / 2
        assert torch.equal(slopes[layer].apart, whole) and whole[0] > 0


def test_outputs_are_taken_apart_only_where_that_is_asked_for():
    model, teacher, variants = ready("llama", {})
    slopes = measure_slopes(model, teacher, variants, [0, 1], draws=1)
    assert not any(len(found.apart) for found in slopes.values())
