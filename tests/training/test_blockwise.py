"""Blocks that are trained one by one come nearer to the dense ones, never further."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import CONFIGS, tiny
from torch import Tensor, nn

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.errors import ConfigError, ModelError
from autoprune.models.biases import with_bias
from autoprune.models.layers import Inventory, inventory, read_weight, write_weight
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer
from autoprune.training.blockwise import (
    BlockRecovery,
    BlockwiseReconstruction,
    BlockwiseSettings,
    fixed_layers,
)
from autoprune.training.dense import DenseParameters

WINDOWS, LENGTH, HELD_OUT = 15, 12, 4
SETTINGS = BlockwiseSettings(learning_rate=3e-3, epochs=4, batch=2)
PRUNED = Action.parse("magnitude(sparsity=0.5)")


@pytest.fixture
def ids(rng: torch.Generator) -> Tensor:
    return torch.randint(3, 60, (WINDOWS, LENGTH), generator=rng)


def listed(model: nn.Module) -> Inventory:
    return inventory(model, register_architectures())


def halved(weight: Tensor) -> Tensor:
    """Keep the larger of every two weights of a row."""
    pairs = weight.reshape(-1, 2)
    larger = pairs.abs().argmax(1, keepdim=True)
    kept = torch.zeros_like(pairs).scatter(1, larger, pairs.gather(1, larger))
    return kept.reshape(weight.shape)


def prune(model: nn.Module) -> list[Layer]:
    layers = [layer for layer in listed(model).layers if layer.block is not None]
    for layer in layers:
        write_weight(model, layer, halved(read_weight(model, layer)))
    return layers


def scene(kind: str, **about: Any) -> tuple[nn.Module, nn.Module, Any]:
    """Give a dense model, its pruned copy, and what trains the copy."""
    changes = about.pop("changes", {})
    dense, model = tiny(kind, **changes), tiny(kind, **changes)
    prune(model)
    values = DenseParameters.of_copy(model, dense)
    about = {"settings": SETTINGS} | about
    return dense, model, BlockwiseReconstruction(model, listed(model), values, **about)


def between(model: Any, ids: Tensor) -> list[Tensor]:
    """Give the hidden states before each block, in double precision."""
    states = model(ids, output_hidden_states=True).hidden_states
    return [state.double() for state in states]


def relative(given: Tensor, wanted: Tensor) -> float:
    """Give the mean over positions of the squared error over the squared length."""
    errors = (given - wanted).square().sum(-1) / wanted.square().sum(-1)
    return float(errors.mean())


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    named = model.named_parameters()
    return {name for name, now in named if not torch.equal(now, before[name])}


@pytest.mark.parametrize("dense_inputs", [False, True], ids=["compressed", "dense"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family_recovers(kind: str, dense_inputs: bool, ids: Tensor) -> None:
    settings = replace(SETTINGS, dense_inputs=dense_inputs)
    dense, model, training = scene(kind, settings=settings)
    zeros = {la: read_weight(model, la) == 0 for la in listed(model).layers}
    before = values_of(model)
    reached = training.run(ids, held_out=HELD_OUT)
    assert [one.block for one in reached] == list(listed(model).blocks)
    assert all(one.after < 0.98 * one.before for one in reached)
    for layer, was in zeros.items():
        now = read_weight(model, layer)
        assert torch.equal(now == 0, was) and not now[was].signbit().any()
    inside = tuple(f"{path}." for path in training.inventory.blocks)
    assert all(name.startswith(inside) for name in changed(model, before))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not changed(dense, values_of(tiny(kind)))


def test_all_parameters_of_a_block_are_trained(ids: Tensor) -> None:
    _, model, training = scene("gpt2")
    before = values_of(model)
    training.run(ids, held_out=HELD_OUT)
    inside = {n for n in before if n.startswith(training.inventory.blocks)}
    assert changed(model, before) == inside
    kinds = {name.split(".", 3)[3] for name in inside}
    assert {"ln_1.weight", "ln_2.bias", "attn.c_attn.bias", "mlp.c_fc.weight"} < kinds


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_loss_is_the_relative_error_on_windows_held_out(
    kind: str, ids: Tensor
) -> None:
    name = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    dense, model, training = scene(kind, changes={name: 3})
    judging = ids[-HELD_OUT:]
    wanted, given = between(dense, judging), between(model, judging)
    alone = training.run(ids, held_out=HELD_OUT, first=1)
    assert len(alone) == 2
    assert alone[0].before == pytest.approx(relative(given[2], wanted[2]), rel=1e-4)
    trained = between(model, judging)  # block 0 is as it was
    assert torch.equal(trained[1], given[1])
    assert alone[0].after == pytest.approx(relative(trained[2], wanted[2]), rel=1e-4)


def test_dense_inputs_are_those_of_the_dense_model(ids: Tensor) -> None:
    dense, model, training = scene(
        "llama",
        settings=replace(SETTINGS, dense_inputs=True),
        changes={"num_hidden_layers": 3},
    )
    mixed: Any = deepcopy(dense)
    mixed.model.layers[1] = deepcopy(model.get_submodule("model.layers.1"))
    wanted, given = (between(one, ids[-HELD_OUT:]) for one in (dense, mixed))
    reached = training.run(ids, held_out=HELD_OUT)
    assert reached[1].before == pytest.approx(relative(given[2], wanted[2]), rel=1e-4)


def test_blocks_make_up_for_those_before(ids: Tensor) -> None:
    ends = {}
    for dense_inputs in (False, True):
        settings = BlockwiseSettings(3e-3, epochs=10, dense_inputs=dense_inputs)
        changes = {"num_hidden_layers": 4}
        dense, model, training = scene("llama", settings=settings, changes=changes)
        wanted = between(dense, ids[-HELD_OUT:])[-1]
        worst = relative(between(model, ids[-HELD_OUT:])[-1], wanted)
        training.run(ids, held_out=HELD_OUT)
        ends[dense_inputs] = relative(between(model, ids[-HELD_OUT:])[-1], wanted)
        assert ends[dense_inputs] < worst
    assert ends[False] < ends[True]


@pytest.mark.parametrize("rate", [1e3, 1e30], ids=["worse", "not a number"])
def test_a_block_never_gets_worse(rate: float, ids: Tensor) -> None:
    _, model, training = scene("llama", settings=replace(SETTINGS, learning_rate=rate))
    tensors = {name: one.data_ptr() for name, one in model.named_parameters()}
    before = values_of(model)
    reached = training.run(ids, held_out=HELD_OUT)
    assert not any(one.is_kept for one in reached)
    assert all(one.after == one.before and not one.trained < 1 for one in reached)
    assert not changed(model, before)
    assert tensors == {name: one.data_ptr() for name, one in model.named_parameters()}


def test_a_dense_block_has_nothing_to_learn(ids: Tensor) -> None:
    dense, model, training = scene("llama")
    model.load_state_dict(dense.state_dict())
    reached = training.run(ids, held_out=HELD_OUT)
    assert [(one.before, one.after, one.is_kept) for one in reached] == [
        (0.0, 0.0, False)
    ] * 2
    assert not changed(model, values_of(dense))


def test_a_seed_gives_the_same_weights(ids: Tensor) -> None:
    found = []
    for seed in (0, 0, 1):
        _, model, training = scene("llama", settings=replace(SETTINGS, seed=seed))
        training.run(ids, held_out=HELD_OUT)
        found.append(values_of(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


class Stop(Exception):  # noqa: N818 - what ends a run
    pass


def test_a_run_that_was_cut_off_goes_on(ids: Tensor) -> None:
    _, whole, training = scene("qwen2")
    expected = training.run(ids, held_out=HELD_OUT)

    _, model, training = scene("qwen2")
    block = model.get_submodule(training.inventory.blocks[1])
    calls = []

    def stop(*_: Any) -> None:
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 5:  # in the middle of training
            raise Stop

    handle = block.register_forward_hook(stop)
    with pytest.raises(Stop):
        training.run(ids, held_out=HELD_OUT)
    handle.remove()
    inside = {
        f"{training.inventory.blocks[1]}.{n}" for n, _ in block.named_parameters()
    }
    _, pruned, _ = scene("qwen2")
    assert not changed(model, values_of(pruned)) & inside
    assert not any(one.requires_grad for one in model.parameters())
    assert training.run(ids, held_out=HELD_OUT, first=1) == expected[1:]
    assert not changed(model, values_of(whole))


def test_progress_is_told(ids: Tensor) -> None:
    _, _, training = scene("bert")
    told: list[tuple[int, int]] = []
    training.run(ids, held_out=1, progress=lambda *done: told.append(done))
    assert told == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_fixed_layers_stay(kind: str, ids: Tensor) -> None:
    _, model, training = scene(kind)
    layers = [la for la in training.inventory.layers if la.block is not None]
    fixed = layers[::2]
    training = replace(training, fixed=fixed)
    before = {layer: read_weight(model, layer).clone() for layer in layers}
    values = values_of(model)
    reached = training.run(ids, held_out=HELD_OUT)
    assert all(one.is_kept for one in reached)
    for layer in layers:
        same = torch.equal(before[layer], read_weight(model, layer))
        assert same == (layer in fixed), layer.name
    assert {"norm" in n or "ln_" in n for n in changed(model, values)} == {True, False}


@pytest.mark.parametrize(
    ("action", "fixed"),
    [
        ("magnitude(sparsity=0.5)", False),
        ("wanda(pattern=2:4)", False),
        ("channels(keep=0.5)", False),
        ("flap(keep=0.5)", False),
        ("rtn(bits=4)", True),
        ("wanda(pattern=2:4) + gptq(bits=4)", True),
        ("wanda(pattern=2:4) + eora(rank=4)", True),
        ("slicegpt(keep=0.75)", True),
    ],
)
def test_layers_that_are_stored_as_weights_can_be_trained(
    action: str, fixed: bool
) -> None:
    layer = next(la for la in listed(tiny("llama")).layers if la.role == "down_proj")
    storage = Actions(load_plugins().methods).storage(layer, Action.parse(action))
    assert fixed_layers({layer: storage}) == ([layer] if fixed else [])


def test_a_block_that_was_left_out_stays_so(ids: Tensor) -> None:
    _, model, training = scene("gpt2")
    for layer in training.inventory.layers:
        if layer.block == 0:
            write_weight(model, layer, torch.zeros(layer.shape))
    before = values_of(model)
    reached = training.run(ids, held_out=HELD_OUT)
    assert [one.is_kept for one in reached] == [False, True]
    left_out = training.inventory.blocks[0]
    assert not any(name.startswith(left_out) for name in changed(model, before))


def test_norms_alone_can_be_trained(ids: Tensor) -> None:
    _, model, training = scene("llama")
    training = replace(training, fixed=training.inventory.layers)
    values = values_of(model)
    reached = training.run(ids, held_out=HELD_OUT)
    assert all(one.is_kept for one in reached)
    assert all("norm" in name for name in changed(model, values))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss", "gemma3_text"])
def test_a_model_in_bfloat16_is_trained_in_small_steps(kind: str, ids: Tensor) -> None:
    dense, model = tiny(kind).bfloat16(), tiny(kind).bfloat16()
    prune(model)
    values = DenseParameters.of_copy(model, dense)
    settings = replace(SETTINGS, learning_rate=1e-3)
    training = BlockwiseReconstruction(model, listed(model), values, settings)
    reached = training.run(ids, held_out=HELD_OUT)
    assert all(one.is_kept for one in reached)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


def test_what_was_trained_is_as_it_will_be_stored(ids: Tensor) -> None:
    model = tiny("llama").bfloat16()
    found = listed(model)  # of bfloat16 layers
    dense, model = deepcopy(model).float(), model.float()
    prune(model)
    training = BlockwiseReconstruction(
        model, found, DenseParameters.of_copy(model, dense), SETTINGS
    )
    assert all(one.is_kept for one in training.run(ids, held_out=HELD_OUT))
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.bfloat16().float())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "opt"])
def test_a_stitched_model_knows_its_dense_weights(kind: str, ids: Tensor) -> None:
    dense, copy, training = scene(kind)
    expected = training.run(ids, held_out=HELD_OUT)

    model = tiny(kind)
    stitched = StitchedModel(model, listed(model).layers)
    variants = {}
    for layer in listed(copy).layers:
        if layer.block is not None:
            variants[layer] = halved(stitched.dense_weight(layer))
            stitched.write(layer, PRUNED, variants[layer])
    kept = {layer: weight.clone() for layer, weight in variants.items()}
    values = DenseParameters.of_stitched(stitched)
    training = BlockwiseReconstruction(model, listed(model), values, SETTINGS)
    assert training.run(ids, held_out=HELD_OUT) == expected
    assert not changed(model, values_of(copy))
    # A bank may hold the variants, and the model has to become dense again.
    assert all(torch.equal(variants[layer], kept[layer]) for layer in variants)
    stitched.restore()
    for layer in listed(dense).layers:
        assert torch.equal(read_weight(model, layer), read_weight(dense, layer))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_layers_that_stay_dense_are_known_as_they_were(kind: str, ids: Tensor) -> None:
    model, dense = tiny(kind), tiny(kind)
    stitched = StitchedModel(model, listed(model).layers)
    for layer in stitched.layers[1::2]:
        if layer.block is not None:
            stitched.write(layer, PRUNED, halved(stitched.dense_weight(layer)))
    values = DenseParameters.of_stitched(stitched)
    training = BlockwiseReconstruction(model, listed(model), values, SETTINGS)
    first = training.run(ids, held_out=HELD_OUT)
    assert all(one.is_kept for one in first)
    again = training.run(ids, held_out=HELD_OUT)  # what it learns from is still dense
    assert again[0].before == first[0].after
    with values.on(name for name, _ in dense.named_parameters()):
        assert not changed(model, values_of(dense))


def test_a_bias_that_a_variant_has_brought_is_trained(ids: Tensor) -> None:
    dense, model = tiny("llama"), tiny("llama")
    stitched = StitchedModel(model, listed(model).layers)
    layer = next(la for la in stitched.layers if la.role == "down_proj")
    bias = torch.full((32,), 0.1)
    weight = with_bias(halved(stitched.dense_weight(layer)), bias)
    stitched.write(layer, PRUNED, weight)
    values = DenseParameters.of_stitched(stitched)
    training = BlockwiseReconstruction(model, listed(model), values, SETTINGS)
    judging = ids[-HELD_OUT:]
    worst = relative(between(model, judging)[1], between(dense, judging)[1])
    reached = training.run(ids, held_out=HELD_OUT)
    assert reached[0].before == pytest.approx(worst, rel=1e-4)
    module: Any = model.get_submodule(layer.name)
    assert not torch.equal(module.bias, bias)
    assert torch.equal(bias, torch.full((32,), 0.1))  # the variant's own
    stitched.restore()
    assert module.bias is None


def test_the_dense_stream_begins_at_the_dense_embedding(ids: Tensor) -> None:
    dense, model, training = scene("llama")
    embedding = next(la for la in training.inventory.layers if la.block is None)
    write_weight(model, embedding, halved(read_weight(model, embedding)))
    judging = ids[-HELD_OUT:]
    wanted, given = between(dense, judging), between(model, judging)
    reached = training.run(ids, held_out=HELD_OUT)
    assert reached[0].before == pytest.approx(relative(given[1], wanted[1]), rel=1e-4)


@pytest.mark.parametrize("held_out", [0, -1, WINDOWS])
def test_windows_to_train_on_and_to_judge_by_are_needed(
    held_out: int, ids: Tensor
) -> None:
    _, _, training = scene("llama")
    with pytest.raises(ConfigError, match=f"held_out={held_out}: .* the 15 windows"):
        training.run(ids, held_out=held_out)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: BlockwiseSettings(learning_rate=0.0), "learning_rate=0.0: expected"),
        (lambda: BlockwiseSettings(learning_rate=math.nan), "learning_rate=nan"),
        (lambda: BlockwiseSettings(epochs=0), "epochs=0: expected at least 1"),
        (lambda: BlockwiseSettings(batch=-2), "batch=-2: expected at least 1"),
    ],
    ids=["rate", "nan", "epochs", "batch"],
)
def test_settings_are_checked(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (tiny("gpt2"), "not at all"),
        (tiny("llama", intermediate_size=64), r"with shape \(64, 32\)"),
    ],
    ids=["family", "size"],
)
def test_another_dense_model_is_refused(
    other: nn.Module, found: str, ids: Tensor
) -> None:
    model = tiny("llama")
    before = dict(model.named_parameters())
    values = DenseParameters.of_copy(model, other)
    training = BlockwiseReconstruction(model, listed(model), values)
    with pytest.raises(ModelError, match=f"the dense model has it {found}"):
        training.run(ids, held_out=HELD_OUT)
    after = dict(model.named_parameters())
    assert all(after[name] is one for name, one in before.items())


def test_a_result_says_whether_it_was_kept() -> None:
    better, worse = BlockRecovery("a", 0.2, 0.1), BlockRecovery("b", 0.2, 0.3)
    lost = BlockRecovery("c", 0.2, math.nan)
    assert [one.is_kept for one in (better, worse, lost)] == [True, False, False]
    assert [one.after for one in (better, worse, lost)] == [0.1, 0.2, 0.2]
