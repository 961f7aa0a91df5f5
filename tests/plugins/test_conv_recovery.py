"""A ResNet gets quality back by training, with its batch norms as they were."""

import pytest
import torch
from tiny_convnets import tiny_resnet, write_images, write_resnet

from autoprune.config import TextConfig
from autoprune.evaluation.scheduled import own_bank
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import load_plugins
from autoprune.policy import DENSE, Action, Policy


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("resnet")
    model = write_resnet(folder / "model", tiny_resnet())
    return Workbench.open(
        load_plugins(),
        model=str(model),
        task="image-classification",
        text=TextConfig(
            source=write_images(folder / "images.jsonl", 200),
            statistics=16,
            fitness=8,
            choice=8,
            report=20,
            recovery=96,
        ),
        target="packed",
        seed=0,
        cache=folder / "cache",
    )


def policy_of(bench: Workbench, action: str, schedule: str) -> Policy:
    found = Action.parse(action)
    return Policy(
        {
            site.name: DENSE if site.layers[0].block is None else found
            for site in bench.inventory.sites
        },
        schedule,
    )


@pytest.mark.parametrize("action", ["kernels(sparsity=0.5)", "wanda(pattern=2:4)"])
@pytest.mark.parametrize(
    "recovery",
    [
        "distill(tokens=24000, learning_rate=0.01, batch=8)",
        "blockwise(tokens=24000, learning_rate=0.01, batch=8)",
    ],
)
def test_training_gives_quality_back(
    bench: Workbench, action: str, recovery: str
) -> None:
    kl = {}
    before = {n: b.clone() for n, b in bench.stitched.model.named_buffers()}
    for schedule in ("one-shot", f"one-shot + {recovery}"):
        policy = policy_of(bench, action, schedule)
        bank = own_bank(bench, policy)
        kl[schedule] = bench.measure(policy, bank, "report").metrics["kl"]
        for layer, one in bench.per_layer(policy).items():
            if one.steps:
                stored, variant = bench.storages(policy)[layer], bank.get(layer, one)
                assert variant.mask is not None and variant.storage == stored
                assert not variant.weight[~variant.mask].any()
    assert kl[f"one-shot + {recovery}"] < 0.8 * kl["one-shot"]
    after = dict(bench.stitched.model.named_buffers())
    assert all(torch.equal(after[name], one) for name, one in before.items())
