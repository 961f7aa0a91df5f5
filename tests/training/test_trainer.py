"""Recovery on tiny models: masks hold, quality comes back, kills change nothing."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.tasks import CausalLM
from small_disks import small_disk
from tiny_models import tiny
from torch import Tensor, nn

from autoprune.errors import ConfigError, ModelError, RunError
from autoprune.models.layers import inventory
from autoprune.training.losses import LossWeights, RecoveryLoss
from autoprune.training.masks import FrozenMasks
from autoprune.training.progress import Progress
from autoprune.training.settings import TrainingSettings
from autoprune.training.trainer import Recovery, train

LENGTH = 12
SETTINGS = TrainingSettings(
    tokens=8 * 4 * LENGTH,  # 8 steps
    learning_rate=5e-3,
    batch=2,
    accumulation=2,
    weight_decay=0.1,
    checkpoint_every=3,
    validate_every=4,
)
TASK = RecoveryLoss(CausalLM(), None)


def windows(count: int = 6, seed: int = 0) -> Tensor:
    """Text that can be learnt: every token follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 60, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        ids.append(3 + (5 * ids[-1] + 7) % 57)
    return torch.stack(ids, 1)


def compressed(kind: str = "llama") -> tuple[nn.Module, FrozenMasks]:
    """A tiny model without half of its weights."""
    model = tiny(kind)
    generator, kept = torch.Generator().manual_seed(1), {}
    for layer in inventory(model, register_architectures()).layers:
        if layer.block is not None:
            kept[layer] = torch.rand(layer.shape, generator=generator) < 0.5
    return model, FrozenMasks(model, kept)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen2"])
def test_quality_comes_back_with_the_masks_held(kind: str, tmp_path: Path) -> None:
    model, masks = compressed(kind)
    pruned, told = masks.pruned, []
    settings = replace(SETTINGS, tokens=16 * 48, learning_rate=0.02)

    def watch(progress: Progress) -> None:
        masks.check()  # after every step
        told.append(progress)

    found = train(
        model,
        windows(),
        tmp_path,
        loss=TASK,
        masks=masks,
        settings=settings,
        validation=windows(5, seed=1),
        progress=watch,
    )
    assert (found.steps, found.tokens, found.stopped) == (16, 768, "budget")
    assert [step for step, _ in found.validations] == [0, 4, 8, 12, 16]
    losses = [loss for _, loss in found.validations]
    assert losses[-1] < losses[0] - 0.1
    assert masks.pruned == pruned
    assert [one.step for one in told] == list(range(1, 17))
    assert [one.tokens for one in told] == [48 * step for step in range(1, 17)]
    assert told[-1].seconds_left == 0
    assert all(one.seconds_left > 0 for one in told[:-1])
    assert told[-1].loss < told[0].loss
    assert told[3].validation == losses[0] and told[4].validation == losses[1]
    assert told[-1].learning_rate == pytest.approx(0.0, abs=1e-9)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-16"]


def test_validation_is_the_mean_over_all_positions(tmp_path: Path) -> None:
    model, masks = compressed()
    others = windows(5, seed=1)
    with torch.no_grad():
        logits = model(others).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, others[:, 1:].flatten())
    found = train(
        model,
        windows(),
        tmp_path,
        loss=TASK,
        masks=masks,
        settings=SETTINGS,
        validation=others,
    )
    assert found.validations[0][1] == pytest.approx(float(expected), rel=1e-6)


def test_it_is_adamw_with_the_course_of_transformers(tmp_path: Path) -> None:
    """The same weights as from a loop of ten plain lines."""
    from transformers import get_scheduler

    settings = replace(SETTINGS, weight_decay=0.0, warmup=0.25)
    model, masks = compressed()
    train(model, windows(), tmp_path, loss=TASK, masks=masks, settings=settings)
    plain, masks = compressed()
    plain.requires_grad_()
    optimizer = torch.optim.AdamW(
        plain.parameters(), settings.learning_rate, fused=True
    )
    optimizer.param_groups[0]["weight_decay"] = 0.0
    course = get_scheduler("cosine", optimizer, 2, 8)
    batches = windows()[settings.order(6, 8)].split(2)
    with masks.held(optimizer):
        for step in range(8):
            optimizer.zero_grad()
            for ids in batches[2 * step : 2 * step + 2]:
                (plain(ids, labels=ids).loss / 2).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            course.step()
    for name, parameter in plain.named_parameters():
        found = model.get_parameter(name)
        torch.testing.assert_close(found, parameter.detach(), rtol=1e-3, atol=1e-5)


def test_distillation_brings_the_dense_model_nearer(tmp_path: Path) -> None:
    model, masks = compressed()
    weights = LossWeights(task=0.0, divergence=1.0, hidden=1.0, temperature=2.0)
    blocks = inventory(model, register_architectures()).blocks
    dense = tiny("llama")
    loss = RecoveryLoss(CausalLM(), None, weights=weights, teacher=dense, blocks=blocks)
    before, told = state(dense), []
    train(
        model,
        windows(),
        tmp_path,
        loss=loss,
        masks=masks,
        settings=SETTINGS,
        progress=told.append,
    )
    assert told[-1].terms["divergence"] < 0.7 * told[0].terms["divergence"]
    assert told[-1].terms["hidden"] < told[0].terms["hidden"]
    assert_same(state(dense), before)
    assert not any(p.requires_grad or p.grad is not None for p in dense.parameters())


def test_l1_makes_weights_smaller(tmp_path: Path) -> None:
    sizes = []
    for l1 in (0.0, 0.05):
        model, masks = compressed()
        loss = RecoveryLoss(CausalLM(), None, weights=LossWeights(l1=l1))
        folder = tmp_path / str(l1)
        train(model, windows(), folder, loss=loss, masks=masks, settings=SETTINGS)
        sizes.append(sum(float(p.abs().sum()) for p in model.parameters()))
    assert sizes[1] < 0.95 * sizes[0]


def test_what_is_not_named_stays(tmp_path: Path) -> None:
    model, masks = compressed()
    before = state(model)
    name = "model.layers.1.mlp.up_proj.weight"
    train(
        model,
        windows(),
        tmp_path,
        loss=TASK,
        masks=masks,
        settings=SETTINGS,
        trained=[name],
    )
    after = state(model)
    changed = [one for one in before if not torch.equal(after[one], before[one])]
    assert changed == [name]
    with pytest.raises(ModelError, match=r"no parameter 'lm_hat.weight' .*\(1 of 2"):
        train(
            model,
            windows(),
            tmp_path / "other",
            loss=TASK,
            masks=masks,
            settings=SETTINGS,
            trained=[name, "lm_hat.weight"],
        )


@pytest.mark.parametrize("mixed", [True, False])
def test_a_bfloat16_model_is_float32_meanwhile(mixed: bool, tmp_path: Path) -> None:
    model, masks = compressed("qwen2")
    model.to(torch.bfloat16)
    masks = FrozenMasks.of_zeros(
        model, inventory(model, register_architectures()).layers
    )
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    seen = set()

    def watch(_: Progress) -> None:
        seen.update(p.dtype for p in model.parameters())
        masks.check()

    settings = replace(SETTINGS, mixed_precision=mixed)
    found = train(
        model,
        windows(),
        tmp_path,
        loss=TASK,
        masks=masks,
        settings=settings,
        validation=windows(5, seed=1),
        progress=watch,
    )
    assert seen == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storages
    assert found.validations[-1][1] < found.validations[0][1]
    masks.check()


def test_all_else_is_as_before(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, masks = compressed("gpt2")
    model.config.use_cache = True
    weight = model.get_parameter("transformer.wte.weight")
    version, own = weight._version, dict(vars(model))
    # Those of ``random`` are drawn from by beartype, which checks types here.
    torch.manual_seed(5), np.random.seed(5)
    numbers = torch.rand(1), np.random.rand()
    torch.manual_seed(5), np.random.seed(5)
    with caplog.at_level(logging.WARNING):
        train(
            model,
            windows(),
            tmp_path,
            loss=TASK,
            masks=masks,
            settings=SETTINGS,
            validation=windows(5, seed=1),
        )
    assert (torch.rand(1), np.random.rand()) == numbers
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert model.config.use_cache is True
    assert weight._version > version  # who remembers the weights sees the change
    assert vars(model).keys() == own.keys()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


SCRIPT = """
    import os, signal, sys, torch
    from pathlib import Path
    sys.path[:0] = {paths!r}
    import test_trainer as t
    from autoprune.training.loop import RecoveryLoop
    from autoprune.training.trainer import train

    kind, at, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])

    def die(progress):
        if at == f"step {{progress.step}}":
            os.kill(os.getpid(), signal.SIGKILL)

    if at.startswith("saving"):
        save = RecoveryLoop._save_rng_state

        def half(self, output_dir):  # weights and optimizer are there, no more
            if at == f"saving {{self.state.global_step}}":
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, output_dir)

        RecoveryLoop._save_rng_state = half
    t.recover(kind, folder, die)
"""


def recover(
    kind: str, folder: Path, progress: Any = None
) -> tuple[nn.Module, Recovery]:
    model, masks = compressed(kind)
    # gpt2 has dropout, so that random numbers count.
    loss = RecoveryLoss(
        CausalLM(), None, weights=LossWeights(divergence=0.5), teacher=tiny(kind)
    )
    found = train(
        model,
        windows(),
        folder,
        loss=loss,
        masks=masks,
        settings=SETTINGS,
        validation=windows(5, seed=1),
        progress=progress,
    )
    return model, found


def in_process(kind: str, at: str, folder: Path) -> int:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = textwrap.dedent(SCRIPT).format(paths=paths)
    command = [sys.executable, "-c", code, kind, at, str(folder)]
    return subprocess.run(command, capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        pytest.param("gpt2", ["step 5"], marks=pytest.mark.ci),
        ("gpt2", ["step 2", "step 3", "saving 6", "step 8"]),
        ("mixtral", ["step 4", "saving 8"]),
    ],
)
def test_a_killed_recovery_ends_as_an_undisturbed_one(
    kind: str, kills: list[str], tmp_path: Path
) -> None:
    for at in kills:
        assert in_process(kind, at, tmp_path / "killed") == -signal.SIGKILL, at
    steps: list[int] = []
    model, found = recover(kind, tmp_path / "killed", lambda p: steps.append(p.step))
    wanted, _ = recover(kind, tmp_path / "undisturbed")
    assert_same(state(model), state(wanted))
    assert 0 < len(steps) < 8  # it did not begin anew
    assert not (tmp_path / "killed" / "part").exists()
    assert [step for step, _ in found.validations] == [0, 4, 8]


def test_a_stopped_recovery_goes_on_exactly(tmp_path: Path) -> None:
    """The same as by kills, in this process and for every step."""

    class Stop(Exception):
        pass

    wanted, whole = recover("gpt2", tmp_path / "whole")
    for step in (3, 4, 7):

        def stop(progress: Progress, at: int = step) -> None:
            if progress.step == at:
                raise Stop

        folder = tmp_path / str(step)
        with pytest.raises(Stop):
            recover("gpt2", folder, stop)
        model, found = recover("gpt2", folder)
        assert_same(state(model), state(wanted))
        assert found.validations == whole.validations


def test_a_finished_recovery_is_not_done_again(tmp_path: Path) -> None:
    wanted, first = recover("llama", tmp_path)
    told: list[Progress] = []
    model, again = recover("llama", tmp_path, told.append)
    assert told == []
    assert_same(state(model), state(wanted))
    assert replace(again, seconds=0.0) == replace(first, seconds=0.0)


@pytest.mark.parametrize(
    ("changes", "stopped", "steps"),
    [
        ({"target": 100.0}, "target", 0),
        ({"target": 4.0, "validate_every": 1}, "target", 0),
        ({"learning_rate": 1.0, "patience": 2, "validate_every": 1}, "patience", 2),
    ],
)
def test_a_criterion_ends_it_before_its_budget(
    changes: dict[str, Any], stopped: str, steps: int, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, **changes)

    def once() -> tuple[nn.Module, Recovery]:
        model, masks = compressed()
        found = train(
            model,
            windows(),
            tmp_path,
            loss=TASK,
            masks=masks,
            settings=settings,
            validation=windows(5, seed=1),
        )
        return model, found

    model, found = once()
    assert found.stopped == stopped
    assert found.steps >= steps and found.steps < 8
    if stopped == "patience":
        assert found.steps == found.validations[-1][0]
    again, same = once()  # as if killed before anybody heard of the end
    assert_same(state(again), state(model))
    assert replace(same, seconds=0.0) == replace(found, seconds=0.0)


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path) -> None:
    model, masks = compressed()
    settings = replace(SETTINGS, learning_rate=10.0, clip=0.0, warmup=0.0)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    found = train(model, windows(), tmp_path, loss=TASK, masks=masks, settings=settings)
    assert (found.stopped, found.steps) == ("diverged", 1)


def test_a_folder_belongs_to_one_recovery(tmp_path: Path) -> None:
    recover("llama", tmp_path)
    model, masks = compressed()
    settings = replace(SETTINGS, seed=7, checkpoint_every=2)
    with pytest.raises(RunError, match=r"differs in dense model, loss, settings, val"):
        train(model, windows(), tmp_path, loss=TASK, masks=masks, settings=settings)
    (tmp_path / "recovery.json").write_text("{")
    with pytest.raises(RunError, match="cannot use .*recovery.json"):
        recover("llama", tmp_path)


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    recover("llama", tmp_path)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "checkpoint-8" / "weights.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    with pytest.raises(RunError, match=r"1 differ, first 'model.norm.weight'"):
        recover("llama", tmp_path)


def test_checkpoints_hold_what_training_changes_only(tmp_path: Path) -> None:
    recover("llama", tmp_path)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {
        "weights.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history] == [0, 4, 8]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    # One checkpoint takes 0.25 MB, and two lie there while the second is written.
    with small_disk(tmp_path / "small", 400_000) as folder:
        with pytest.raises(RunError, match=r"checkpoint-6: .* make room"):
            recover("llama", folder)
        shutil.copytree(folder, tmp_path / "large")
    model, _ = recover("llama", tmp_path / "large")
    wanted, _ = recover("llama", tmp_path / "whole")
    assert_same(state(model), state(wanted))


def test_too_few_tokens_are_told(tmp_path: Path) -> None:
    model, masks = compressed()
    settings = replace(SETTINGS, tokens=47)
    with pytest.raises(ConfigError, match=r"47 tokens .* 2 x 2 windows of 12.* 48"):
        train(model, windows(), tmp_path, loss=TASK, masks=masks, settings=settings)


def test_what_does_not_fit_together_is_told(tmp_path: Path) -> None:
    model, masks = compressed()
    with pytest.raises(ModelError, match="masks are those of another model"):
        train(
            tiny("llama"),
            windows(),
            tmp_path,
            loss=TASK,
            masks=masks,
            settings=SETTINGS,
        )
    settings = replace(SETTINGS, patience=3)
    with pytest.raises(ConfigError, match=r"patience 3 needs windows to validate on"):
        train(model, windows(), tmp_path, loss=TASK, masks=masks, settings=settings)
    assert list(tmp_path.iterdir()) == []
