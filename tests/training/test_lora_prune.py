"""LoRAPrune on tiny models: exact counts at every step, by the paper's importance."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from tiny_recovery import (
    EIGHT_STEPS,
    LENGTH,
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

from autoprune.errors import ConfigError, ModelError, RunError
from autoprune.models.weights import read_weight
from autoprune.policy import Layer
from autoprune.training.goals import UNITS, Goal, by_unit, structures
from autoprune.training.lora import LoraPruneSettings, LoraSettings
from autoprune.training.lora_prune import LoraPruning, prune_lora
from autoprune.training.masks import FrozenMasks
from autoprune.training.progress import Progress
from autoprune.training.ramps import Ramp

RAMP = Ramp("cubic", final=1.0, start=1, end=4)
STEPS = replace(EIGHT_STEPS, learning_rate=0.02)


def goals(layers: list[Layer], pattern: str | None = None) -> dict[Layer, Goal]:
    """Half of the weights of each layer, or of its units."""
    found = {}
    for layer in layers:
        count = layer.cut.units if pattern == UNITS and layer.cut else layer.numel
        found[layer] = Goal(count // 2, pattern)
    return found


def learn(
    model: nn.Module, folder: Path, pattern: str | None = None, **changes: Any
) -> LoraPruning:
    wanted: dict[str, Any] = {
        "goals": goals(layers_of(model), pattern),
        "loss": TASK,
        "masks": FrozenMasks(model, {}),
        "settings": STEPS,
        "pruning": LoraPruneSettings(ramp=RAMP),
        "validation": windows(5, seed=1),
    }
    return prune_lora(model, windows(), folder, **wanted | changes)


def watching(
    model: nn.Module, layers: list[Layer], seen: dict[Layer, list[Tensor]]
) -> Callable[[Progress], None]:
    """Keep what is pruned of each layer after each step."""

    def watch(_: Progress) -> None:
        for layer in layers:
            module: Any = model.get_submodule(layer.name)
            seen.setdefault(layer, []).append(module.pruned.clone())

    return watch


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_counts_are_exact_at_every_step(
    kind: str, pattern: str | None, tmp_path: Path
) -> None:
    model, seen = tiny(kind), dict[Layer, list[Tensor]]()
    layers = layers_of(model)
    found = learn(model, tmp_path, pattern, progress=watching(model, layers, seen))
    sparsities = [RAMP.sparsity(step) / 2 for step in range(8)]
    assert len(set(sparsities)) == 4  # 0, two on the way, and 0.5
    for layer, masks in seen.items():
        counts = [int(mask.sum()) for mask in masks]
        assert counts == [round(s * layer.numel) for s in sparsities]
        for before, after in zip(masks[:-1], masks[1:], strict=True):
            assert (after | before).equal(after)  # what is pruned stays so
        weight = read_weight(model, layer)
        assert masks[-1].equal(weight == 0)
        assert not weight[masks[-1]].signbit().any()
        if pattern == "2:4":
            assert int(masks[2].view(-1, 4).sum(1).max()) <= 2
            assert set(masks[-1].view(-1, 4).sum(1).tolist()) == {2}
    found.masks.check()
    assert sum(found.masks.pruned.values()) == sum(la.numel // 2 for la in layers)


def test_units_go_as_a_whole(tmp_path: Path) -> None:
    model = tiny("llama")  # 48 channels, and 2 groups of 2 heads each
    found = learn(model, tmp_path, UNITS)
    for parts in structures(layers_of(model)).values():
        gone = []
        for layer in parts:
            assert layer.cut is not None
            zeros = by_unit(layer.cut, read_weight(model, layer) == 0)
            assert zeros.all(1).equal(zeros.any(1))
            gone.append(zeros.all(1).tolist())
        assert sum(gone[0]) * 2 == len(gone[0])
        assert all(one == gone[0] for one in gone)
    assert found.recovery.validations[-1][1] < found.recovery.validations[0][1]


def test_channels_of_conv1d_go_as_a_whole(tmp_path: Path) -> None:
    model = tiny("gpt2")
    layers = [layer for layer in layers_of(model) if ".mlp." in layer.name]
    learn(model, tmp_path, goals=goals(layers, UNITS))
    for block in model.transformer.h:
        gone = (block.mlp.c_fc.weight == 0).all(0)  # stored as [in, out]
        assert int(gone.sum()) * 2 == len(gone)
        assert gone.equal((block.mlp.c_proj.weight == 0).all(1))


def test_importance_is_the_papers() -> None:
    """By what a step of gradient descent takes off the product, written out."""
    from autoprune.training.adapters import adapters_on
    from autoprune.training.lora_guide import importance

    model = tiny("llama")
    layer = layers_of(model)[0]
    generator = torch.Generator().manual_seed(0)
    pruned = torch.rand(layer.shape, generator=generator) < 0.5
    with adapters_on(
        model, [layer], rank=3, alpha=6.0, dropout=0.0, seed=0
    ) as adapters:
        module = adapters.layers[layer]
        module.mask(pruned, learnt=True)
        a, b = module.factors
        assert not importance(module).any()  # there is no gradient yet
        with torch.no_grad():
            b.normal_(generator=generator)
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = torch.randn(b.shape, generator=generator)
            gradient = 2.0 * (b @ a - (b - b.grad) @ (a - a.grad))
            weight = read_weight(tiny("llama"), layer) + 2.0 * b @ a
            wanted = (gradient * weight.masked_fill(pruned, 0.0)) ** 2
            torch.testing.assert_close(importance(module), wanted)
            b.zero_(), a.grad.zero_()  # as before the first step
            gradient = 2.0 * b.grad @ a
            wanted = (gradient * read_weight(tiny("llama"), layer)) ** 2
            torch.testing.assert_close(
                importance(module), wanted.masked_fill(pruned, 0.0)
            )


def test_earlier_weights_go_first_on_ties_and_memory_fades() -> None:
    from autoprune.training.adapters import adapters_on
    from autoprune.training.lora_guide import PruningGuide, importance

    model = tiny("llama")
    layer = layers_of(model)[0]
    settings = LoraPruneSettings(ramp=Ramp(final=1.0, end=1), decay=0.75)
    with adapters_on(
        model, [layer], rank=3, alpha=6.0, dropout=0.0, seed=0
    ) as adapters:
        guide = PruningGuide(adapters, {layer: Goal(256)}, settings)
        module = adapters.layers[layer]
        a, b = module.factors
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        b.grad[5:] = 1.0  # rows before have no importance
        guide.before_step(0)
        once = importance(module)
        torch.testing.assert_close(module.importance, 0.25 * once)
        guide.before_step(1)
        torch.testing.assert_close(module.importance, (0.25 + 0.1875) * once)
        assert module.pruned is not None
        # Of 32 x 32 weights 256 go: five rows of zeros, then the least of the others.
        assert module.pruned[:5].all() and int(module.pruned.sum()) == 256
        b.grad.zero_()
        module.importance.zero_()
        kept = guide.kept()[layer]
        assert kept.equal(~module.pruned)
        module.pruned.zero_()
        guide.before_step(1)
        assert module.pruned[:8].all() and not module.pruned[8:].any()


def test_training_makes_up_for_what_is_pruned(tmp_path: Path) -> None:
    model = tiny("llama")
    settings = replace(STEPS, tokens=16 * 4 * LENGTH)
    found = learn(model, tmp_path, settings=settings)
    dense, after = found.recovery.validations[0][1], found.recovery.validations[-1][1]
    assert after < dense - 0.5
    one_shot = tiny("llama")
    kept = {la: read_weight(model, la) != 0 for la in layers_of(model)}
    FrozenMasks(one_shot, kept)
    assert after < float(TASK.quality(one_shot, windows(5, seed=1)).mean()) - 0.5


def recover(
    kind: str, folder: Path, progress: Any = None
) -> tuple[nn.Module, LoraPruning]:
    model = tiny(kind)
    lora = LoraSettings(rank=4, dropout=0.1)
    loss = distilling(kind)
    return model, learn(model, folder, "2:4", lora=lora, loss=loss, progress=progress)


@pytest.mark.slow
def test_a_killed_pruning_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    assert killed(__file__, "gpt2", 4, tmp_path / "killed") == -signal.SIGKILL
    steps: list[int] = []
    model, _ = recover("gpt2", tmp_path / "killed", lambda p: steps.append(p.step))
    wanted, _ = recover("gpt2", tmp_path / "undisturbed")
    assert steps == [4, 5, 6, 7, 8]
    assert_same(state(model), state(wanted))


def test_a_stopped_pruning_goes_on_exactly(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise ZeroDivisionError

    model, whole = recover("llama", tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        recover("llama", tmp_path / "stopped", stop)
    again, found = recover("llama", tmp_path / "stopped")
    assert_same(state(again), state(model))
    assert found.masks.pruned == whole.masks.pruned
    assert found.recovery.validations == whole.recovery.validations


def test_one_that_diverges_changes_nothing(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    before = state(model)
    ramp = Ramp("constant", final=1.0)
    found = learn(model, tmp_path, pruning=LoraPruneSettings(ramp=ramp))
    assert (found.recovery.stopped, found.masks.pruned) == ("diverged", {})
    assert_same(state(model), before)


def test_a_folder_belongs_to_one_pruning(tmp_path: Path) -> None:
    learn(tiny("llama"), tmp_path)
    with pytest.raises(RunError, match="differs in goals"):
        learn(tiny("llama"), tmp_path, "2:4")


def test_what_makes_no_sense_is_told(tmp_path: Path) -> None:
    model, masks = compressed()
    with pytest.raises(ModelError, match=r"q_proj' has pruned .*\(14 of 14 layers"):
        learn(model, tmp_path, masks=masks)
    model = tiny("llama")
    with pytest.raises(ConfigError, match="ramp ends at step 4, .* has 4 steps"):
        learn(model, tmp_path, settings=replace(STEPS, tokens=4 * 4 * LENGTH))
    with pytest.raises(ConfigError, match="found target None and patience 3"):
        learn(model, tmp_path, settings=replace(STEPS, patience=3))
    with pytest.raises(ModelError, match="q_proj' has 32 columns, .* of 3:5 do not"):
        learn(model, tmp_path, "3:5")
    uneven = goals(layers_of(model), UNITS)
    uneven[next(iter(uneven))] = Goal(0, UNITS)
    with pytest.raises(ModelError, match="q_proj' and its structure .* different num"):
        learn(model, tmp_path, goals=uneven)
    with pytest.raises(ModelError, match="q_proj' shares its units with layers"):
        learn(model, tmp_path, UNITS, lora=LoraSettings(roles=("q_proj",)))
    with pytest.raises(ModelError, match="attn.c_attn' has no units"):
        learn(tiny("gpt2"), tmp_path, UNITS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"decay": 1.0}, r"decay of importance .* found 1\.0"),
        ({"ramp": Ramp(final=0.5)}, r"ramp of shares of a goal ends at 1, found 0\.5"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LoraPruneSettings(**changes)
