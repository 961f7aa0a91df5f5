"""Courses in which training says what goes: LoRAPrune, and group lasso before a cut."""

from pathlib import Path

import pytest
import torch
from tiny_trainings import open_bench, policy_of, stopping_at, write_lines

from autoprune.compression.variant import Variant
from autoprune.errors import ConfigError, PolicyError
from autoprune.evaluation.scheduled import own_bank
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Action, Layer, Policy

LORAPRUNE = "during + loraprune(tokens=1024, learning_rate=0.01, rank=4"
UNITS = {
    "blocks.0.mlp": Action.parse("channels(keep=0.5)"),
    "blocks.1.mlp": Action.parse("channels(keep=0.25)"),
}


@pytest.fixture(scope="module")
def bench(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("bench")
    text = write_lines(folder)
    return open_bench(load_plugins(), tiny_checkpoint, text, folder / "c")


def units(bench: Workbench, schedule: str) -> Policy:
    """Channels of the two MLPs, not equally many."""
    names = [site.name for site in bench.inventory.sites_for(set(UNITS))]
    return Policy({name: UNITS.get(name, DENSE) for name in names}, schedule)


def variants(bench: Workbench, policy: Policy) -> dict[Layer, Variant]:
    """What a course makes, as it is declared."""
    bank, declared = own_bank(bench, policy), bench.storages(policy)
    actions = {la: one for la, one in bench.per_layer(policy).items() if one.steps}
    bank.make(actions.items())
    found = {la: bank.get(la, one) for la, one in actions.items()}
    for layer, variant in found.items():
        assert variant.storage == declared[layer]
        assert variant.mask is not None
        assert int(variant.mask.sum()) == declared[layer].kept
        assert not variant.base[~variant.mask].any()
    return found


@pytest.mark.parametrize(
    "action",
    [
        "magnitude(pattern=2:4)",
        pytest.param(
            "magnitude(sparsity=0.3) + rtn(bits=4, group=16)", marks=pytest.mark.slow
        ),
    ],
)
def test_adapters_prune_what_the_policy_stores(bench: Workbench, action: str) -> None:
    found = variants(bench, policy_of(bench, action, f"{LORAPRUNE})"))
    plain = variants(bench, policy_of(bench, action, "one-shot"))
    for layer, variant in found.items():
        assert variant.mask is not None
        assert not variant.mask.equal(plain[layer].mask)


def test_adapters_prune_units_as_many_as_each_structure_is_to_lose(
    bench: Workbench,
) -> None:
    policy = units(bench, f"{LORAPRUNE})")
    found = variants(bench, policy)
    for block, share in ((0, 0.5), (1, 0.25)):
        parts = [one for layer, one in found.items() if layer.block == block]
        *makers, taker = [one.mask for one in parts if one.mask is not None]
        assert all(maker.any(1).equal(taker.any(0)) for maker in makers)
        assert int(taker.any(0).sum()) == share * taker.shape[1]


def test_a_course_that_was_interrupted_ends_the_same(bench: Workbench) -> None:
    one, other = (units(bench, f"{LORAPRUNE}, seed={seed})") for seed in (1, 1))
    undisturbed = variants(bench, one)
    store = bench.store.files
    bank = own_bank(bench, one)
    for layer, action in bench.per_layer(one).items():
        if action.steps:
            store.discard(bank.key(layer, action), "test")
    with stopping_at(5), pytest.raises(KeyboardInterrupt):
        variants(bench, other)
    found = variants(bench, other)
    assert all(torch.equal(found[la].weight, undisturbed[la].weight) for la in found)


def test_group_lasso_empties_units_before_they_are_cut(bench: Workbench) -> None:
    course = "late(start=0.5) + finetune(tokens=2048, learning_rate=0.01"
    empty = []
    for strength in (0, 2):
        found = variants(bench, units(bench, f"{course}, group_lasso={strength})"))
        makers = [one for la, one in found.items() if la.role == "gate_proj"]
        masks = [one.mask.any(1) for one in makers if one.mask is not None]
        rows = [~one.weight.any(1) for one in makers]
        empty.append([int((m & r).sum()) for m, r in zip(masks, rows, strict=True)])
    assert empty[0] == [0, 0] and min(empty[1]) > 0  # more is empty than is cut


def test_who_prunes_is_checked(bench: Workbench) -> None:
    with pytest.raises(PolicyError, match=r"Write during \+ loraprune"):
        own_bank(bench, units(bench, "one-shot + loraprune(tokens=1024)"))
    tiles = policy_of(bench, "magnitude(sparsity=0.5, tile=4x4)", f"{LORAPRUNE})")
    with pytest.raises(
        ConfigError, match="q_proj and 13 others of 14 layers are to be"
    ):
        variants(bench, tiles)
    wrong = "late + distill(tokens=2048, group_lasso=0.1)"
    with pytest.raises(ConfigError, match="but the policy removes no channels, heads"):
        variants(bench, policy_of(bench, "magnitude(sparsity=0.5)", wrong))


@pytest.mark.parametrize("recovery", ["loraprune", "lora"])
def test_a_training_that_diverges_is_no_result(bench: Workbench, recovery: str) -> None:
    wild = "tokens=1024, learning_rate=0.9, clip=0, hidden=1000000"
    wild += ", rank=4, alpha=1000000"
    schedule = "during" if recovery == "loraprune" else "late"
    policy = units(bench, f"{schedule} + {recovery}({wild})")
    with pytest.raises(ConfigError, match="phase 1 of .* diverged: at step . the loss"):
        variants(bench, policy)
