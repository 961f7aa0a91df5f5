"""Adapters on tiny models: masks hold, what is merged is what was trained."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.tasks import CausalLM
from safetensors.torch import load_file
from tiny_models import tiny
from tiny_recovery import (
    EIGHT_STEPS,
    TASK,
    assert_same,
    compressed,
    distilling,
    killed,
    layers_of,
    state,
    windows,
)
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import ConfigError, ModelError, RunError
from autoprune.models.layers import inventory
from autoprune.models.weights import read_weight
from autoprune.policy import Layer
from autoprune.training.lora import LoraSettings, train_lora
from autoprune.training.losses import LossWeights, RecoveryLoss
from autoprune.training.masks import FrozenMasks
from autoprune.training.progress import Progress
from autoprune.training.trainer import Recovery

FAST = replace(EIGHT_STEPS, learning_rate=0.02)


def trace_of(model: nn.Module) -> Any:
    """All of a model that is not a number."""
    modules = [(name, type(one), one.training) for name, one in model.named_modules()]
    flags = [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    return modules, flags, list(vars(model)), model.state_dict().keys()


def learn(
    model: nn.Module, masks: FrozenMasks, folder: Path, **changes: Any
) -> Recovery:
    wanted: dict[str, Any] = {
        "layers": layers_of(model),
        "loss": TASK,
        "masks": masks,
        "settings": FAST,
        "validation": windows(5, seed=1),
    }
    return train_lora(model, windows(), folder, **wanted | changes)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mixtral"])
def test_what_is_merged_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    model, masks = compressed(kind)
    before, trace, pruned = state(model), trace_of(model), masks.pruned
    trained: list[Tensor] = []

    @torch.no_grad()
    def watch(progress: Progress) -> None:
        masks.check()
        if progress.step == 8:
            model.eval()  # dropout of gpt2
            trained.append(model(windows(5, seed=1)).logits)

    found = learn(model, masks, tmp_path, progress=watch)
    assert (found.steps, found.stopped) == (8, "budget")
    masks.check()
    assert masks.pruned == pruned
    assert trace_of(model) == trace
    with torch.no_grad():
        merged = model(windows(5, seed=1)).logits
    torch.testing.assert_close(merged, trained[0], rtol=1e-5, atol=1e-5)
    if kind != "gpt2":  # Conv1D multiplies in another order
        assert torch.equal(merged, trained[0])
    names = {f"{layer.name}.weight" for layer in layers_of(model)}
    after = state(model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == names
    least = 0.015 if kind == "gpt2" else 0.5  # its weights are 10 times smaller
    assert found.validations[-1][1] < found.validations[0][1] - least


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_those_of_a_masked_weight(kind: str, dropout: float) -> None:
    from autoprune.training.adapters import adapters_on

    model, (layer, *_) = tiny(kind), layers_of(tiny(kind))
    weight = read_weight(model, layer).clone()
    bias = getattr(model.get_submodule(layer.name), "bias", None)
    generator = torch.Generator().manual_seed(0)
    pruned = torch.rand(layer.shape, generator=generator) < 0.5
    x = torch.randn(2, 5, layer.shape[1], generator=generator)
    with adapters_on(
        model, [layer], rank=4, alpha=6.0, dropout=dropout, seed=0
    ) as adapters:
        module = adapters.layers[layer].train()
        module.mask(pruned, learnt=False)
        a, b = module.factors
        with torch.no_grad():
            b.normal_(generator=generator)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        with torch.enable_grad():
            torch.manual_seed(3)
            given = module(mine)
            given.square().sum().backward()
            got = mine.grad, a.grad, b.grad
            a.grad = b.grad = None
            torch.manual_seed(3)
            change = (1.5 * b @ a).masked_fill(pruned, 0.0)
            read = functional.dropout(theirs, dropout)
            own = functional.linear(theirs, weight.masked_fill(pruned, 0.0), bias)
            wanted = own + functional.linear(read, change)
            wanted.square().sum().backward()
        torch.testing.assert_close(given, wanted)
        for one, other in zip(got, (theirs.grad, a.grad, b.grad), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_change_masked_at_the_merge_only_is_worse(tmp_path: Path) -> None:
    model, masks = compressed()
    masked = learn(model, masks, tmp_path / "masked").validations[-1][1]
    model, masks = compressed()
    learn(model, FrozenMasks(model, {}), tmp_path / "plain")
    with pytest.raises(ModelError, match="are no longer zero"):
        masks.check()
    masks.apply()
    plain = float(TASK.quality(model, windows(5, seed=1)).mean())
    assert masked < plain - 0.1


@pytest.mark.parametrize("mixed", [True, False])
def test_a_bfloat16_model_keeps_type_and_storage(mixed: bool, tmp_path: Path) -> None:
    model, _ = compressed("qwen2")
    model.to(torch.bfloat16)
    masks = FrozenMasks.of_zeros(model, layers_of(model))
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    trace, version = trace_of(model), weight._version
    found = learn(model, masks, tmp_path, settings=replace(FAST, mixed_precision=mixed))
    assert found.validations[-1][1] < found.validations[0][1] - 0.5
    assert trace_of(model) == trace
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storages
    assert weight._version > version  # who remembers the weights sees the change
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    factors = load_file(checkpoint / "weights.safetensors")
    assert {one.dtype for one in factors.values()} == {torch.float32}


def test_nothing_is_left_behind_by_an_error(tmp_path: Path) -> None:
    model, masks = compressed("qwen2")
    model.model.layers[1].train().requires_grad_()
    before, trace = state(model), trace_of(model)

    def fail(_: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        learn(model, masks, tmp_path, progress=fail)
    assert trace_of(model) == trace
    assert_same(state(model), before)


def test_a_training_that_diverges_changes_nothing(tmp_path: Path) -> None:
    model, masks = compressed()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    before = state(model)
    found = learn(model, masks, tmp_path)
    assert (found.stopped, found.steps) == ("diverged", 1)
    assert_same(state(model), before)


def test_roles_and_fixed_layers(tmp_path: Path) -> None:
    model, masks = compressed()
    before, layers = state(model), layers_of(model)
    fixed = [layer for layer in layers if layer.block == 0]
    lora = LoraSettings(roles=("q_proj", "down_proj"), rank=2, dropout=0.1)
    learn(model, masks, tmp_path, lora=lora, fixed=fixed)
    after = state(model)
    assert [n for n in before if not torch.equal(before[n], after[n])] == [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]


def test_checkpoints_hold_the_adapters_only(tmp_path: Path) -> None:
    model, masks = compressed()
    learn(model, masks, tmp_path, lora=LoraSettings(rank=2))
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    held = load_file(checkpoint / "weights.safetensors")
    layers = layers_of(model)
    assert len(held) == 2 * len(layers)
    assert sum(one.numel() for one in held.values()) == sum(
        2 * sum(layer.shape) for layer in layers
    )


def recover(
    kind: str, folder: Path, progress: Any = None
) -> tuple[nn.Module, Recovery]:
    """With all that has random numbers, and distillation."""
    model, masks = compressed(kind)
    found = learn(
        model,
        masks,
        folder,
        lora=LoraSettings(rank=4, dropout=0.1),
        settings=EIGHT_STEPS,
        loss=distilling(kind),
        progress=progress,
    )
    return model, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_killed_recovery_ends_as_an_undisturbed_one(
    kind: str, tmp_path: Path
) -> None:
    for step in (2, 4, 7):
        assert killed(__file__, kind, step, tmp_path / "killed") == -signal.SIGKILL
    steps: list[int] = []
    model, found = recover(kind, tmp_path / "killed", lambda p: steps.append(p.step))
    wanted, whole = recover(kind, tmp_path / "undisturbed")
    assert steps == [7, 8]
    assert_same(state(model), state(wanted))
    assert found.validations == whole.validations


def test_a_stopped_recovery_goes_on_exactly(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise ZeroDivisionError

    wanted, whole = recover("gpt2", tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        recover("gpt2", tmp_path / "stopped", stop)
    model, found = recover("gpt2", tmp_path / "stopped")
    assert_same(state(model), state(wanted))
    assert found.validations == whole.validations
    told: list[Progress] = []
    again, _ = recover("gpt2", tmp_path / "stopped", told.append)
    assert told == []  # it is not done again, but merged again
    assert_same(state(again), state(wanted))


def test_a_folder_belongs_to_one_recovery(tmp_path: Path) -> None:
    model, masks = compressed()
    learn(model, masks, tmp_path)
    model, masks = compressed()
    with pytest.raises(RunError, match="differs in adapters: .*32.0.*33.0"):
        learn(model, masks, tmp_path, lora=LoraSettings(alpha=33.0))


def named(model: nn.Module, name: str) -> Layer:
    """A layer by name; a head has the shape of the embedding."""
    found = inventory(model, register_architectures()).layers
    known = {layer.name: layer for layer in found}
    known["lm_head"] = replace(known["model.embed_tokens"], name="lm_head")
    return known[name]


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("mixtral", "model.layers.0.mlp.experts.down_proj[1]", "parameter of many exp"),
        ("llama", "model.embed_tokens", "it is a Embedding"),
        ("llama", "lm_head", "losses read the weight of the head"),
        ("qwen2", "lm_head", "another layer has the same parameter"),
    ],
)
def test_layers_that_cannot_have_an_adapter(
    kind: str, name: str, reason: str, tmp_path: Path
) -> None:
    model, masks = compressed(kind)
    layers = [*layers_of(model), named(model, name)]
    trace = trace_of(model)
    with pytest.raises(ModelError, match=reason) as told:
        learn(model, masks, tmp_path, layers=layers)
    assert repr(name) in str(told.value)
    assert trace_of(model) == trace
    assert list(tmp_path.iterdir()) == []


def test_what_makes_no_sense_is_told(tmp_path: Path) -> None:
    model, masks = compressed()
    layers = layers_of(model)
    with pytest.raises(ConfigError, match="role of a layer 'q_prj'.*mean 'q_proj'"):
        learn(model, masks, tmp_path, lora=LoraSettings(roles=("q_prj",)))
    with pytest.raises(ConfigError, match="no layer is left .* 14 layers 2 have a"):
        lora = LoraSettings(roles=("q_proj",))
        learn(model, masks, tmp_path, lora=lora, fixed=layers)
    with pytest.raises(ConfigError, match=r"loss weight l1 is 0\.5"):
        loss = RecoveryLoss(CausalLM(), None, weights=LossWeights(l1=0.5))
        learn(model, masks, tmp_path, loss=loss)
    with pytest.raises(ModelError, match="masks are those of another model"):
        learn(tiny("llama"), masks, tmp_path, layers=layers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 0}, "rank of an adapter is from 1 up, found 0"),
        ({"alpha": 0.0}, r"alpha of an adapter .* found 0\.0"),
        ({"alpha": float("nan")}, "found nan"),
        ({"dropout": 1.0}, r"dropout of an adapter .* found 1\.0"),
        ({"dropout": -0.1}, r"found -0\.1"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LoraSettings(**changes)
