"""Convolutions as matrices, and ResNets as blocks, sites and structures."""

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from autoprune_plugins.conv_layers import Convolution
from tiny_convnets import bench_of, pixels, tiny_resnet, windows, write_resnet
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import ModelError, PolicyError
from autoprune.evaluation.workbench import Workbench
from autoprune.models.blocks import BlockRunner
from autoprune.models.layers import inventory, read_weight
from autoprune.models.statistics import Gathering
from autoprune.plugins import Plugins, load_plugins
from autoprune.policy import Action, Layer, Policy


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture(scope="module", params=["basic", "bottleneck"])
def bench(
    request: pytest.FixtureRequest,
    plugins: Plugins,
    tmp_path_factory: pytest.TempPathFactory,
) -> Workbench:
    folder = tmp_path_factory.mktemp(request.param)
    write_resnet(folder / "model", tiny_resnet(request.param))
    return bench_of(folder / "model", plugins, folder / "cache")


def module_of(bench: Workbench, layer: Layer) -> nn.Conv2d:
    found = bench.stitched.model.get_submodule(layer.name)
    assert isinstance(found, nn.Conv2d)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3), "stride": 2},
        {"kernel_size": 3, "padding": (2, 1), "dilation": 2, "stride": (1, 2)},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_a_convolution_is_its_matrix_times_its_rows(options: dict[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 5, bias=False, **options).requires_grad_(False)
        images = torch.randn(3, 2, 9, 8)
    kind, expected = Convolution(), conv(images)
    found = kind.rows(conv, images) @ kind.matrix(conv, conv.weight).T
    found = found.unflatten(0, (3, -1)).transpose(1, 2).view(expected.shape)
    torch.testing.assert_close(found, expected)
    assert kind.columns(conv) * 2 == kind.matrix(conv, conv.weight).shape[1]
    assert kind.refuses(conv) is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"groups": 2}, "grouped convolution: its 2 groups read different"),
        ({"groups": 4}, "depthwise convolution: its 4 groups"),
        ({"padding": 1, "padding_mode": "circular"}, "pads with 'circular' by"),
        ({"padding": "same"}, "pads with 'zeros' by 'same'"),
    ],
    ids=str,
)
def test_what_is_no_matrix_is_refused(options: dict[str, Any], why: str) -> None:
    assert why in str(Convolution().refuses(nn.Conv2d(4, 4, 3, **options)))


def test_channels_last_are_refused_and_never_copied() -> None:
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)  # type: ignore
    assert "channels last" in str(Convolution().refuses(conv))
    with pytest.raises(RuntimeError, match="view"):
        Convolution().matrix(conv, conv.weight)


def test_a_model_with_grouped_convolutions_is_refused_by_name(plugins: Plugins) -> None:
    model = tiny_resnet()
    model.resnet.encoder.stages[1].layers[0].layer[1].convolution = nn.Conv2d(
        8, 8, 3, padding=1, groups=8
    )
    known = list(plugins.objects["architectures"].values())
    match = r"'resnet' .*stages\.1\.layers\.0\.layer\.1\.convolution.* depthwise"
    with pytest.raises(ModelError, match=match):
        inventory(model, known)


def test_blocks_and_sites(bench: Workbench) -> None:
    found, deep = bench.inventory, bench.stitched.model.config.layer_type != "basic"
    assert found.architecture == ("resnet_bottleneck" if deep else "resnet")
    assert found.notes == ()
    assert found.blocks[2] == "resnet.encoder.stages.1.layers.0"
    assert len(found.blocks) == 5
    names = [site.name for site in found.sites if site.name.startswith("blocks.2.")]
    convs = ["conv1", "conv2", *(["conv3"] if deep else []), "shortcut"]
    assert names == [f"blocks.2.{name}" for name in convs]
    assert not any(site.name == "blocks.1.shortcut" for site in found.sites)
    groups = [site.name for site in found.groups if site.kind != "block"]
    streams = ["stages.0.stream", "stages.1.stream"][0 if deep else 1 :]
    assert groups == [*(f"blocks.{n}.filters" for n in range(5)), *streams]


def test_layers_tell_their_kernels_units_and_norms(bench: Workbench) -> None:
    for group in bench.inventory.groups:
        if group.kind == "channels":
            maker, taker = group.layers
            assert maker.cut is not None and taker.cut is not None
            conv = module_of(bench, taker)
            assert (taker.cut.unit, taker.cut.units) == (taker.kernel, conv.in_channels)
            assert (maker.cut.unit, maker.cut.units) == (1, conv.in_channels)
            assert maker.norm == maker.name.replace("convolution", "normalization")
            assert taker.norm is None


def test_an_image_meets_a_layer_once_a_patch(bench: Workbench) -> None:
    # 16 x 16 pixels: the stem leaves 4 x 4, every stage but the first halves that.
    by_name = {layer.name: layer.uses for layer in bench.inventory.layers}
    assert by_name["resnet.encoder.stages.0.layers.0.layer.1.convolution"] == 16
    assert by_name["resnet.encoder.stages.1.layers.1.layer.0.convolution"] == 4
    assert by_name["resnet.encoder.stages.2.layers.0.layer.1.convolution"] == 1
    compute = bench.metric("gflop_per_token").price
    layer = bench.inventory.layers[0]
    storage = bench.actions.storage(layer, Action())
    assert compute(layer, storage, bench.scene()) == 2 * layer.numel * layer.uses / 1e9


def test_statistics_are_those_of_patches(bench: Workbench) -> None:
    ids = bench.splits["statistics"].ids[:5]
    given: dict[str, Tensor] = {}
    handles = [
        module_of(bench, layer).register_forward_pre_hook(
            lambda _, args, name=str(layer.input): given.update({name: args[0]})
        )
        for layer in bench.layers
    ]
    with torch.no_grad():
        bench.task.features(
            bench.stitched.model, bench.task.batch(ids, bench.tokenizer)
        )
    for handle in handles:
        handle.remove()
    read, sums = dict(given), {}
    for layer in bench.layers:
        sums[str(layer.input)] = Gathering({"hessian", "input_norm"}, layer.shape[1])
    runner = BlockRunner(bench.stitched.model, bench.inventory, ids, batch=2)
    hidden = runner.start()
    for block in range(len(bench.inventory.blocks)):
        hidden = runner.collect(block, hidden, lambda name, x: sums[name].add(x))
    for layer in bench.layers:
        conv = module_of(bench, layer)
        patches = functional.unfold(
            read[str(layer.input)],
            conv.kernel_size,
            padding=conv.padding,  # type: ignore[arg-type]
            stride=conv.stride,
        )
        rows = patches.transpose(1, 2).flatten(0, 1)
        found = sums[str(layer.input)].result()
        assert found.tokens == len(rows) == 5 * layer.uses
        torch.testing.assert_close(found.hessian, rows.T @ rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.square_sum, rows.square().sum(0))


def test_run_block_by_block_it_gives_the_same(bench: Workbench) -> None:
    model, ids = bench.stitched.model, bench.splits["fitness"].ids[:5]
    runner = BlockRunner(model, bench.inventory, ids, batch=2)
    hidden = runner.start()
    for block in range(len(bench.inventory.blocks)):
        hidden = runner.run(block, hidden)
    values = bench.task.batch(ids, bench.tokenizer).inputs
    with torch.no_grad():
        whole = model.resnet(**values).last_hidden_state
    torch.testing.assert_close(torch.cat(hidden), whole)  # in other batches
    finished = torch.cat(runner.finish(hidden))
    assert torch.equal(finished, torch.cat(hidden))


@pytest.mark.parametrize(
    ("text", "zeros", "levels"),
    [
        ("magnitude(sparsity=0.5)", 0.5, 1024),
        ("wanda(sparsity=0.5)", 0.5, 1024),
        ("sparsegpt(pattern=2:4)", 0.5, 1024),
        ("gptq(bits=4)", 0.0, 16),
        ("taylor(sparsity=0.5)", 0.5, 1024),
        ("synflow(sparsity=0.5)", 0.5, 1024),
        ("int8_dynamic", 0.0, 256),
    ],
)
def test_methods_for_matrices_treat_convolutions(
    bench: Workbench, text: str, zeros: float, levels: int
) -> None:
    policy = Policy.uniform(bench.inventory.sites, Action.parse(text))
    metrics = bench.measure(policy, bench.bank(), "fitness").metrics
    assert 0 < metrics["kl"] < float("inf")
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["size_bytes"] < bench.scene().dense_bytes
    for layer in bench.layers:
        weight = read_weight(bench.stitched.model, layer)
        assert float((weight == 0).float().mean()) >= zeros
        assert all(len(row.unique()) <= levels for row in weight)


def narrowed(conv: nn.Conv2d, norm: Any, rows: Tensor, columns: Tensor) -> Any:
    """Make a convolution, and the norm behind it, of some filters and channels."""
    small = nn.Conv2d(
        len(columns),
        len(rows),
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        bias=False,
    )
    small.weight.data = conv.weight[rows][:, columns].clone()
    behind = nn.BatchNorm2d(len(rows)).eval()
    behind.weight.data, behind.bias.data = norm.weight[rows], norm.bias[rows]
    behind.running_mean, behind.running_var = (
        norm.running_mean[rows],
        norm.running_var[rows],
    )
    return small, behind


def shrink(place: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    """Cut what holds a convolution and its norm, in place."""
    conv, norm = place.convolution, place.normalization
    rows = torch.arange(conv.out_channels) if rows is None else rows
    columns = torch.arange(conv.in_channels) if columns is None else columns
    place.convolution, place.normalization = narrowed(conv, norm, rows, columns)


def kept_rows(conv: nn.Conv2d) -> Tensor:
    return conv.weight.flatten(1).any(1).nonzero().flatten()


def put(bench: Workbench, names: set[str], text: str) -> None:
    sites = bench.inventory.sites_for(names)
    action = Action.parse(text)
    policy = Policy({s.name: action if s.name in names else Action() for s in sites})
    bench.bank().put(bench.per_layer(policy))


def test_a_cut_network_gives_what_the_zeroed_one_does(bench: Workbench) -> None:
    names = {g.name for g in bench.inventory.groups if g.kind == "channels"}
    put(bench, names, "filters(keep=0.5)")
    zeroed = bench.stitched.model
    small = deepcopy(zeroed)
    for path in bench.inventory.blocks:
        block: Any = small.get_submodule(path)
        maker = len(block.layer) - 2
        kept = kept_rows(block.layer[maker].convolution)
        assert len(kept) == block.layer[maker].convolution.out_channels // 2
        shrink(block.layer[maker], kept, None)
        shrink(block.layer[maker + 1], None, kept)
    with torch.no_grad():
        before, after = zeroed(pixels()).logits, small(pixels()).logits
    torch.testing.assert_close(after, before)
    bench.stitched.restore()
    with torch.no_grad():
        assert not torch.allclose(zeroed(pixels()).logits, before)


def test_a_stream_is_cut_through_all_that_it_connects(bench: Workbench) -> None:
    names = {g.name for g in bench.inventory.groups if g.kind == "stream"}
    put(bench, names, "stream_filters(keep=0.5)")
    zeroed = bench.stitched.model
    small: Any = deepcopy(zeroed)
    stages = small.resnet.encoder.stages
    for index, (stage, following) in enumerate(pairwise(stages)):
        if f"stages.{index}.stream" not in names:
            continue
        kept = kept_rows(stage.layers[0].layer[-1].convolution)
        assert len(kept) == stage.layers[0].layer[-1].convolution.out_channels // 2
        shrink(stage.layers[0].shortcut, kept, None)  # whatever it kept
        for number, block in enumerate(stage.layers):
            shrink(block.layer[-1], kept, None)
            if number:
                shrink(block.layer[0], None, kept)
        shrink(following.layers[0].layer[0], None, kept)
        shrink(following.layers[0].shortcut, None, kept)
    with torch.no_grad():
        before, after = zeroed(pixels()).logits, small(pixels()).logits
    torch.testing.assert_close(after, before)
    bench.stitched.restore()


def test_a_stream_and_filters_inside_of_it_exclude_each_other(bench: Workbench) -> None:
    names = {"blocks.2.filters", "stages.1.stream"}
    with pytest.raises(PolicyError, match=r"'stages\.1\.stream'|'blocks\.2\.filters'"):
        bench.inventory.sites_for(names)


def test_what_belongs_to_the_classifier_or_the_stem_is_not_offered() -> None:
    known = list(load_plugins().objects["architectures"].values())
    found = inventory(tiny_resnet(embedding_size=8), known)  # a shortcut from the start
    streams = [site.name for site in found.groups if site.kind == "stream"]
    assert streams == ["stages.0.stream", "stages.1.stream"]
    one = inventory(tiny_resnet(hidden_sizes=[8], depths=[2]), known)
    assert not [site for site in one.groups if site.kind == "stream"]


def test_exports_are_read_back(bench: Workbench, tmp_path: Path) -> None:
    text = "filters(keep=0.5) + rtn(bits=8)"
    names = {g.name for g in bench.inventory.groups if g.kind == "channels"}
    sites = bench.inventory.sites_for(names)
    action = Action.parse(text)
    policy = Policy({s.name: action if s.name in names else Action() for s in sites})
    bank = bench.bank()
    bank.put(bench.per_layer(policy))
    given = pixels(side=16)
    with torch.no_grad():
        expected = bench.stitched.model(given).logits
    for target in ("packed", "transformers"):
        exporter, folder = bench.exporters[target], tmp_path / target
        folder.mkdir()
        job = bench.job(policy, bank)
        exporter.write(folder, job)
        size = exporter.size_bytes(job.storages, bench.untouched)
        assert exporter.written_bytes(folder) == size
        with torch.no_grad():
            assert torch.equal(exporter.load(folder)(given).logits, expected)
    bench.stitched.restore()


def test_windows_reach_the_model_as_pixels(bench: Workbench) -> None:
    feed = bench.inventory.feed
    assert feed is not None
    values = feed(windows(2))["pixel_values"]
    assert values.shape == (2, 1, 16, 16)
