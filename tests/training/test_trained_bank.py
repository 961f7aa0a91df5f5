"""Policies go through their courses on a real tiny model, and end as declared."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_trainings import LENGTH, open_bench, policy_of, stopping_at, write_lines

from autoprune.compression.bank import VariantBank
from autoprune.errors import ConfigError, PolicyError, RunError
from autoprune.evaluation.scheduled import own_bank, trained_bank
from autoprune.evaluation.workbench import Workbench
from autoprune.models.layers import read_weight
from autoprune.models.text import TokenWindows
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Action, Layer, Policy
from autoprune.training.blockwise import BlockwiseReconstruction

PATTERN = "wanda(pattern=2:4)"
JOINT = "sparsegpt(pattern=2:4) + gptq(bits=4, group=16)"
MLPS = {"blocks.0.mlp", "blocks.1.mlp"}
DISTILL = "distill(tokens=1024, learning_rate=0.003)"


@pytest.fixture(scope="module")
def bench(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("bench")
    return open_bench(
        load_plugins(), tiny_checkpoint, write_lines(folder), folder / "c"
    )


def kl(bench: Workbench, policy: Policy) -> float:
    return bench.measure(policy, own_bank(bench, policy), "report").metrics["kl"]


def weights(bench: Workbench, bank: VariantBank, policy: Policy) -> dict[Layer, Any]:
    actions = bench.per_layer(policy)
    bank.make(actions.items())
    return {la: bank.get(la, one).weight for la, one in actions.items() if one.steps}


@pytest.mark.parametrize(
    ("action", "schedule"),
    [
        (JOINT, f"one-shot + {DISTILL}"),
        ("magnitude(sparsity=0.7)", f"gradual(steps=2, start=0.3) + {DISTILL}"),
        (PATTERN, "progressive(stages=2) + blockwise(tokens=2048)"),
        (JOINT, "one-shot + lora(tokens=1024, learning_rate=0.01, rank=4)"),
        (
            PATTERN,
            "iterative(rounds=2, rewind=weights) + "
            "distill(tokens=4096, learning_rate=0.003)",
        ),
    ],
)
def test_variants_are_stored_as_declared_and_better(
    bench: Workbench, action: str, schedule: str
) -> None:
    policy = policy_of(bench, action, schedule)
    bank, declared = own_bank(bench, policy), bench.storages(policy)
    for layer, one in bench.per_layer(policy).items():
        variant = bank.get(layer, one)
        assert variant.storage == declared[layer]
        if variant.mask is not None:
            assert int(variant.mask.sum()) == declared[layer].kept
            gone = variant.weight[~variant.mask]
            assert not gone.any() and not gone.signbit().any()
    assert kl(bench, policy) < kl(bench, policy_of(bench, action, "one-shot"))


def test_channels_stay_removed_and_are_cut_alike(bench: Workbench) -> None:
    units = Action.parse("channels(keep=0.5)")
    sites = [site.name for site in bench.inventory.sites_for(MLPS)]
    policy, plain = (
        Policy({n: units if n in MLPS else DENSE for n in sites}, schedule)
        for schedule in (f"iterative(rounds=2) + {DISTILL}", "one-shot")
    )
    bank, declared = own_bank(bench, policy), bench.storages(policy)
    for site in bench.inventory.sites_for(MLPS):
        if site.name in MLPS:
            kept = [bank.get(la, units).mask for la in site.layers]
            assert all(declared[la].units for la in site.layers)
            *makers, taker = [m for m in kept if m is not None]
            assert all(torch.equal(m.any(1), taker.any(0)) for m in makers)
    assert kl(bench, policy) < kl(bench, plain)


def test_quantizing_keeps_the_mask_that_was_trained(bench: Workbench) -> None:
    course = f"one-shot + {DISTILL}"
    joint, pruned = (policy_of(bench, one, course) for one in (JOINT, JOINT[:22]))
    masks = [
        {
            layer: bank.get(layer, one).mask
            for layer, one in bench.per_layer(policy).items()
            if one.steps
        }
        for policy in (joint, pruned)
        for bank in [own_bank(bench, policy)]
    ]
    for layer, mask in masks[0].items():
        assert mask is not None and torch.equal(mask, masks[1][layer])


def test_the_dense_model_is_what_it_was(bench: Workbench) -> None:
    bench.stitched.restore()
    model = bench.stitched.model
    before = {la: read_weight(model, la).clone() for la in bench.layers}
    policy = policy_of(bench, PATTERN, "one-shot + blockwise(tokens=2048, seed=1)")
    own_bank(bench, policy).make(bench.per_layer(policy).items())
    assert all(torch.equal(read_weight(model, la), one) for la, one in before.items())
    assert abs(bench.dense_metrics("report")["kl"]) < 1e-5


def test_what_a_one_shot_policy_shares_is_not_trained(bench: Workbench) -> None:
    plain = policy_of(bench, "wanda(sparsity=0.3)", "one-shot")
    before = kl(bench, plain)
    kl(bench, policy_of(bench, "wanda(sparsity=0.3)", f"one-shot + {DISTILL}"))
    assert kl(bench, plain) == before


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(3, marks=pytest.mark.slow),
        7,
        pytest.param(11, marks=pytest.mark.slow),
    ],
)
def test_a_course_that_was_interrupted_ends_the_same(
    bench: Workbench, step: int
) -> None:
    schedule = "iterative(rounds=2) + distill(tokens=2048, learning_rate=0.003"
    one, other = (
        policy_of(bench, PATTERN, f"{schedule}{rest})")
        for rest in (f", patience={100 + step}", f", patience={200 + step}")
    )
    undisturbed = weights(bench, own_bank(bench, one), one)
    with stopping_at(step), pytest.raises(KeyboardInterrupt):
        weights(bench, own_bank(bench, other), other)
    found = weights(bench, own_bank(bench, other), other)
    assert all(torch.equal(found[la], weight) for la, weight in undisturbed.items())
    left = bench.store.folder.parent / "recoveries"
    assert not [path for path in left.iterdir() if path.is_dir()]


def test_a_variant_that_is_gone_is_trained_again(bench: Workbench) -> None:
    policy = policy_of(bench, PATTERN, "one-shot + blockwise(tokens=2048)")
    bank = own_bank(bench, policy)
    before = weights(bench, bank, policy)
    layer = next(iter(before))
    bench.store.files.discard(bank.key(layer, bench.per_layer(policy)[layer]), "test")
    after = weights(bench, own_bank(bench, policy), policy)
    assert all(torch.equal(after[la], weight) for la, weight in before.items())


def test_blocks_are_trained_on_no_more_tokens_than_asked_for(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = BlockwiseReconstruction.run

    def run(self: BlockwiseReconstruction, ids: torch.Tensor, **rest: Any) -> Any:
        trained = len(ids) - rest["held_out"]
        seen.append((trained * LENGTH, self.settings.epochs))
        return original(self, ids, **rest)

    monkeypatch.setattr(BlockwiseReconstruction, "run", run)
    for tokens in (40, 320, 4000):  # of 56 windows that train
        policy = policy_of(bench, PATTERN, f"one-shot + blockwise(tokens={tokens})")
        own_bank(bench, policy).make(bench.per_layer(policy).items())
    assert seen == [(LENGTH, 1), (320, 1), (56 * LENGTH, 2)]


def test_bad_courses_are_refused_by_name(bench: Workbench) -> None:
    trained = f"one-shot + {DISTILL}"
    with pytest.raises(ConfigError, match="has nothing to train: the policy prunes no"):
        kl(bench, policy_of(bench, "rtn(bits=4, group=16)", trained))
    with pytest.raises(PolicyError, match="unknown schedule 'one-shoot'"):
        kl(bench, policy_of(bench, PATTERN, "one-shoot"))
    with pytest.raises(ConfigError, match="phase 1 of 1 of .* 10 tokens are not"):
        kl(bench, policy_of(bench, PATTERN, "one-shot + distill(tokens=10)"))
    with pytest.raises(ConfigError, match="10 tokens are not enough for one window"):
        kl(bench, policy_of(bench, PATTERN, "one-shot + blockwise(tokens=10)"))
    policy = policy_of(bench, PATTERN, trained)
    with pytest.raises(PolicyError, match="variants are those of 'one-shot'"):
        bench.measure(policy, bench.bank(policy), "report")
    with pytest.raises(PolicyError, match="was trained under 'wanda"):
        bank = trained_bank(bench, policy)
        other = policy_of(bench, "wanda(sparsity=0.5)", trained)
        bench.measure(other, bank, "report")


def test_a_full_disk_is_told_before_a_training(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(bench.store.folder)
    policy = policy_of(bench, PATTERN, "late + distill(tokens=2048, seed=8)")
    weights = sum(layer.numel for layer in bench.layers if layer.block is not None)
    for free, fits in ((34 * weights - 1, False), (34 * weights, True)):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _, free=free: usage._replace(free=free)
        )
        if fits:
            kl(bench, policy)
        else:
            with pytest.raises(RunError, match="checkpoints of the training take up"):
                kl(bench, policy)


def test_a_course_needs_text_of_its_own(
    bench: Workbench, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for windows, message in ((0, "no text is set aside for it"), (1, "found 1. Give")):
        poor = open_bench(
            load_plugins(),
            tiny_checkpoint,
            write_lines(tmp_path),
            tmp_path / "cache",
            recovery=windows,
        )
        if windows:  # a text that has no more of them
            one = TokenWindows.of(poor.splits["recovery"].ids[:1], "recovery", "")
            poor.splits = {**poor.splits, "recovery": one}
        with pytest.raises(ConfigError, match=message):
            kl(poor, policy_of(poor, PATTERN, f"one-shot + {DISTILL}"))
