"""Sites of a convolutional network are made narrower, and it computes the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_convnets import bench_of, pixels, policy_on, tiny_resnet, write_resnet
from tiny_models import tiny
from torch import Tensor, nn

from autoprune.compression.storage import Storage
from autoprune.errors import ExportError
from autoprune.evaluation.workbench import Workbench
from autoprune.exporting.cutting import Cutter
from autoprune.exporting.exporter import ExportJob
from autoprune.exporting.narrowing import Narrower, cutter_for
from autoprune.models.biases import put_bias
from autoprune.models.checkpoints import load_model
from autoprune.models.layers import inventory, write_weight
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer, Policy


@pytest.fixture(scope="module", params=["basic", "bottleneck"])
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Workbench:
    folder = tmp_path_factory.mktemp(request.param)
    write_resnet(folder / "model", tiny_resnet(request.param))
    return bench_of(folder / "model", load_plugins(), folder / "cache")


def job_of(bench: Workbench, kind: str, text: str) -> ExportJob:
    return bench.job(policy_on(bench, kind, text), bench.bank())


def masked(job: ExportJob, cutter: Cutter) -> tuple[Any, dict[Layer, Tensor]]:
    """Give the model with a policy on it, and the units that its layers keep."""
    model: Any = load_model(job.checkpoint, job.auto_class)
    kept = {}
    for layer in job.inventory.layers:
        variant = job.variant(layer)
        write_weight(model, layer, variant.weight)
        put_bias(model, layer, variant.bias)
        kept[layer] = cutter.kept(layer, variant)
    return model, kept


def narrower_of(job: ExportJob) -> Cutter:
    cutter = cutter_for(load_model(job.checkpoint, job.auto_class), job.inventory)
    assert isinstance(cutter, Narrower)
    return cutter


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(pixels()).logits
    return logits


@pytest.mark.parametrize(
    ("kind", "text", "note"),
    [
        ("channels", "filters(keep=0.25) + rtn(bits=8)", "cut channels: 8 of 32 stay"),
        ("channels", "flap(keep=0.5)", "5 layers get a bias"),
        ("stream", "stream_filters(keep=0.75) + rtn(bits=4)", "cut stream: "),
    ],
)
def test_a_narrower_network_computes_what_the_masked_one_does(
    bench: Workbench, kind: str, text: str, note: str
) -> None:
    job = job_of(bench, kind, text)
    cutter = narrower_of(job)
    model, kept = masked(job, cutter)
    before = logits_of(model)
    assert not torch.allclose(before, logits_of(bench.stitched.model), atol=1e-3)
    remains, notes = cutter.decide(job.storages)
    assert note in notes[0]
    stored = {name: one.shape for name, one in cutter.empty(remains)[1].items()}
    small = cutter.cut(model, remains, kept)
    torch.testing.assert_close(logits_of(small), before, rtol=1e-5, atol=1e-5)
    assert {name: one.shape for name, one in small.state_dict().items()} == stored
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
        if isinstance(module, nn.BatchNorm2d):
            assert len(module.running_var) == module.num_features  # type: ignore


def test_each_site_keeps_its_own_share(bench: Workbench) -> None:
    texts = {
        "blocks.0.filters": "filters(keep=0.5)",
        "blocks.1.filters": "filters(keep=0.25)",
        "stages.1.stream": "stream_filters(keep=0.75)",
    }
    actions = {site.name: Action() for site in bench.inventory.sites_for(texts)}
    actions |= {name: Action.parse(text) for name, text in texts.items()}
    job = bench.job(Policy(actions), bench.bank())
    cutter = narrower_of(job)
    remains, notes = cutter.decide(job.storages)
    wide = bench.stitched.model.config.hidden_sizes[1]
    kept_of = {"blocks.0.filters": 2, "blocks.1.filters": 1}
    assert dict(remains.units) == {**kept_of, "stages.1.stream": wide * 3 // 4}
    assert notes[0] == "cut channels: 3 of 8 stay, sites: 2"
    assert notes[1] == f"cut stream: {wide * 3 // 4} of {wide} stay, sites: 1"
    model, kept = masked(job, cutter)
    before = logits_of(model)
    small = cutter.cut(model, remains, kept)
    torch.testing.assert_close(logits_of(small), before, rtol=1e-5, atol=1e-5)


def test_a_layer_says_alone_how_small_it_gets(bench: Workbench) -> None:
    job = job_of(bench, "channels", "filters(keep=0.25)")
    cutter = narrower_of(job)
    for group in job.inventory.groups:
        if group.kind == "channels":
            maker, taker = group.layers
            (out, read), (last, columns) = maker.shape, taker.shape
            assert cutter.own_shape(maker, job.storages[maker]) == (out // 4, read)
            assert cutter.own_shape(taker, job.storages[taker]) == (last, columns // 4)
    dense = Storage.dense(maker)
    assert cutter.own_shape(maker, dense) == maker.shape


def test_a_site_of_which_one_layer_keeps_all_stays_as_it_is(bench: Workbench) -> None:
    job = job_of(bench, "channels", "filters(keep=0.5)")
    cutter = narrower_of(job)
    taker = next(la for la in job.storages if la.cut and la.cut.axis == "columns")
    storages = {**job.storages, taker: Storage.dense(taker)}
    remains, _ = cutter.decide(storages)
    site = job.inventory.group_of(taker).name
    assert len(remains.units) == 4 and site not in dict(remains.units)


def test_layers_that_keep_other_units_are_told(bench: Workbench) -> None:
    job = job_of(bench, "channels", "filters(keep=0.5)")
    cutter = narrower_of(job)
    model, kept = masked(job, cutter)
    taker = next(la for la in kept if la.cut and la.cut.axis == "columns")
    match = f"{taker.name} keeps [124] units, but 2 were declared.* method that removed"
    for other in (kept[taker][:1], (kept[taker] + 1) % 4, torch.arange(4)):
        with pytest.raises(ExportError, match=match):
            cutter.cut(model, cutter.decide(job.storages)[0], {**kept, taker: other})


def test_other_zeros_stay(bench: Workbench) -> None:
    job = job_of(bench, "block", "drop")
    cutter = narrower_of(job)
    told = "dropped blocks 0, 1, 2, 3, 4 stay as zeros of full size: norms add to them"
    assert cutter.decide(job.storages) == (cutter.whole, [told])
    job = job_of(bench, "weights", "magnitude(sparsity=0.5)")
    storages = {la: replace(s, mask="bitmap") for la, s in job.storages.items()}
    assert cutter.decide(storages) == (cutter.whole, [])
    model, kept = masked(job, cutter)
    before = logits_of(model)
    assert not any(len(units) for units in kept.values())
    assert torch.equal(logits_of(cutter.cut(model, cutter.whole, kept)), before)


def test_what_no_kind_makes_narrower_is_cut_by_its_configuration() -> None:
    model = tiny("llama")
    found = inventory(model, register_architectures())
    cutter = cutter_for(model, found)
    assert type(cutter) is Cutter
    layer = found.layers[0]
    assert cutter.own_shape(layer, Storage.dense(layer)) == layer.shape
