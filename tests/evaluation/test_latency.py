"""Time as a metric: what storages are multiplied as, what they are credited with."""

import pytest
from autoprune_plugins.architectures import register_architectures
from tiny_models import tiny
from tiny_scenes import evidence, scene_of
from transformers import ResNetConfig

from autoprune.compression.actions import Actions
from autoprune.compression.storage import Storage
from autoprune.errors import ModelError
from autoprune.evaluation.anatomy import Anatomy, format_of, linears_of
from autoprune.evaluation.latency import LatencyMs
from autoprune.evaluation.metric import Scene
from autoprune.latency.estimate import credited
from autoprune.latency.opening import open_device
from autoprune.latency.shape import Attention
from autoprune.latency.workload import Workload, find_workload
from autoprune.models.layers import inventory
from autoprune.models.task import output_layer
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer

ACTIONS = Actions(load_plugins().methods)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
"""Wide enough for groups of 64, and for every kernel."""


def anatomy(kind: str, **changes: int | bool) -> Anatomy:
    model = tiny(kind, **changes)
    rows = output_layer(model).weight.shape[0]
    found = inventory(model, register_architectures())
    return Anatomy.of(model.config, found, vocabulary=rows)


@pytest.fixture(scope="module")
def llama() -> Anatomy:
    return anatomy("llama", **WIDE)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return scene_of(tiny("llama", **WIDE))


def metric(
    found: Anatomy, device: str = "h100", workload: str | Workload = "prefill"
) -> LatencyMs:
    work = find_workload(workload) if isinstance(workload, str) else workload
    return LatencyMs(open_device(device), work.on("cuda"), found)


def policy(
    found: Anatomy, action: str, *, kind: str = "weights"
) -> dict[Layer, Storage]:
    """Store every layer in a block under an action; those of one kind of structure."""
    parsed, layers = ACTIONS.canonical(Action.parse(action)), found.inventory.layers
    if kind != "weights":
        groups = [group for group in found.inventory.groups if group.kind == kind]
        chosen = {layer for group in groups for layer in group.layers}
    else:
        chosen = {layer for layer in layers if layer.block is not None}
    return {
        la: ACTIONS.storage(la, parsed) if la in chosen else Storage.dense(la)
        for la in layers
    }


@pytest.mark.parametrize(
    ("action", "form"),
    [
        ("dense", "dense"),
        ("magnitude(sparsity=0.5)", "dense"),
        ("magnitude(sparsity=0.9)", "dense"),
        ("magnitude(pattern=2:4)", "2:4"),
        ("magnitude(pattern=1:4)", "2:4"),
        ("magnitude(pattern=4:8)", "dense"),
        ("rtn(bits=4, group=64)", "int4-g64"),
        ("rtn(bits=3, group=64)", "int3-g64"),
        ("rtn(bits=8, group=64)", "int8-g64"),
        ("rtn(bits=8)", "int8-rows"),
        ("int8_dynamic", "int8"),
        ("fp8", "fp8-row"),
        ("fp8(per=tensor)", "fp8-tensor"),
        ("nf4(group=64)", "nf4"),
        ("magnitude(pattern=2:4) + int8_dynamic", "2:4+int8"),
        ("magnitude(pattern=2:4) + rtn(bits=4, group=64)", "2:4+int4-g64"),
        ("magnitude(sparsity=0.5) + rtn(bits=4, group=64)", "int4-g64"),
    ],
)
def test_a_storage_is_multiplied_as(action: str, form: str, llama: Anatomy) -> None:
    layer = next(la for la in llama.inventory.layers if la.role == "down_proj")
    stored = ACTIONS.storage(layer, ACTIONS.canonical(Action.parse(action)))
    assert format_of(stored) == form
    assert [one.format for one in linears_of(layer, stored)] == [form]


@pytest.mark.parametrize("device", ["h100", "a100", "rtx-4090", "b200"])
@pytest.mark.parametrize("workload", ["decode", "serve", "prefill"])
def test_zeros_without_a_pattern_are_worth_nothing(
    device: str, workload: str, llama: Anatomy, scene: Scene
) -> None:
    timed, dense = metric(llama, device, workload), evidence(scene)
    zeros = evidence(scene, policy(llama, "magnitude(sparsity=0.9)"))
    assert timed.measure(zeros) == timed.measure(dense)
    forecast = timed.forecast(zeros.storages)
    assert forecast.total.ms == timed.forecast(dense.storages).total.ms


def test_the_dense_model_is_credited_with_what_is_predicted(
    llama: Anatomy, scene: Scene
) -> None:
    timed = metric(llama)
    dense = timed.forecast(scene.dense_storages).total.ms
    assert timed.measure(evidence(scene)) == pytest.approx(dense)


def test_a_policy_is_credited_with_the_sum_of_its_prices(
    llama: Anatomy, scene: Scene
) -> None:
    timed, stored = metric(llama), policy(llama, "channels(keep=0.5)", kind="channels")
    total = sum(timed.price(la, one, scene) for la, one in stored.items())
    value = timed.measure(evidence(scene, stored))
    assert timed.total_limit(value, scene) == pytest.approx(total)


def test_no_more_is_credited_than_is_predicted(llama: Anatomy, scene: Scene) -> None:
    # So many tokens that the products of this small model take longer than a start.
    long = Workload("long", batch=64, prompt=4096, output=1)
    timed, dense = metric(llama, workload=long), evidence(scene)
    for action, kind in [("channels(keep=0.5)", "channels"), ("drop", "block")]:
        stored = policy(llama, action, kind=kind)
        predicted = timed.forecast(stored).total.ms
        credit = timed.measure(evidence(scene, stored))
        assert predicted * (1 - 1e-9) <= credit < timed.measure(dense)


def test_what_cannot_be_told_apart_is_a_tie(llama: Anatomy, scene: Scene) -> None:
    """By a data sheet nobody knows whether 2:4 pays on layers of this size."""
    timed = metric(llama, workload="decode")
    sparse = evidence(scene, policy(llama, "magnitude(pattern=2:4)"))
    assert timed.measure(sparse) == pytest.approx(timed.measure(evidence(scene)))


def test_cut_layers_are_as_small_as_they_are_exported(llama: Anatomy) -> None:
    narrow = llama.shape(policy(llama, "channels(keep=0.5)", kind="channels"))
    sizes = {x.name.rpartition(".")[2]: (x.n, x.k) for x in narrow.blocks[0].linears}
    assert sizes["gate_proj"] == sizes["up_proj"] == (256, 256)
    assert sizes["down_proj"] == (256, 256)
    fewer = llama.shape(policy(llama, "heads(keep=0.5)", kind="heads"))
    sizes = {x.name.rpartition(".")[2]: (x.n, x.k) for x in fewer.blocks[0].linears}
    assert sizes["q_proj"] == (128, 256)
    assert sizes["k_proj"] == sizes["v_proj"] == (64, 256)
    assert sizes["o_proj"] == (256, 128)
    assert fewer.blocks[0].attention == Attention(2, 1, 64)


def test_a_dropped_block_takes_no_time(llama: Anatomy, scene: Scene) -> None:
    stored = policy(llama, "drop", kind="block")
    shape = llama.shape(stored)
    assert all(not block.linears and not block.parts for block in shape.blocks)
    assert all(block.attention is None for block in shape.blocks)
    timed = metric(llama)
    left = timed.forecast(stored).total.parts
    assert left.keys() == {"head", "launch", "rest"}
    assert left["rest"] == 0
    assert timed.measure(evidence(scene, stored)) == pytest.approx(
        left["head"] + left["launch"]
    )


def test_low_rank_factors_are_two_products(llama: Anatomy) -> None:
    layer = next(la for la in llama.inventory.layers if la.role == "down_proj")
    alone = Storage.dense(layer).factored(16, alone=True)
    assert [(x.n, x.k) for x in linears_of(layer, alone)] == [(16, 512), (256, 16)]
    beside = Storage.dense(layer).quantized(4, 64, False).factored(16)
    formats = [x.format for x in linears_of(layer, beside)]
    assert formats == ["int4-g64", "dense", "dense"]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt", "mixtral"])
def test_every_family_has_a_shape(kind: str) -> None:
    found = anatomy(kind)
    stored = {layer: Storage.dense(layer) for layer in found.inventory.layers}
    shape = found.shape(stored)
    weights = sum(x.n * x.k for block in shape.blocks for x in block.linears)
    in_blocks = [la for la in found.inventory.layers if la.block is not None]
    assert weights == sum(layer.numel for layer in in_blocks)
    assert shape.head is not None
    assert shape.blocks[0].attention is not None
    assert metric(found).measure(evidence(scene_of(tiny(kind)))) > 0


def test_a_tied_embedding_is_the_head(llama: Anatomy) -> None:
    tied = anatomy("qwen2", **WIDE)
    assert tied.head is None
    embedding = next(la for la in tied.inventory.layers if la.input is None)
    stored = {la: Storage.dense(la) for la in tied.inventory.layers}
    stored[embedding] = stored[embedding].quantized(8, None, symmetric=True)
    head = tied.shape(stored).head
    assert head is not None
    assert (head.n, head.k, head.format) == (64, 256, "int8")
    assert llama.head is not None


def test_experts_see_their_share_of_the_tokens() -> None:
    found = anatomy("mixtral")
    expert = next(la for la in found.inventory.layers if "experts" in la.name)
    (linear,) = linears_of(expert, Storage.dense(expert))
    assert linear.uses == 0.5


def test_a_workload_of_one_token_has_no_steps(llama: Anatomy, scene: Scene) -> None:
    short = Workload("short", batch=2, prompt=16, output=1)
    timed = metric(llama, workload=short)
    forecast = timed.forecast(scene.dense_storages)
    assert forecast.total.ms == pytest.approx(forecast.prefill.ms)
    assert timed.measure(evidence(scene)) == pytest.approx(forecast.prefill.ms)
    assert credited(forecast.total, forecast.total) == pytest.approx(forecast.total.ms)


def test_time_of_what_is_no_transformer_is_refused() -> None:
    found = inventory(tiny("llama"), register_architectures())
    with pytest.raises(ModelError, match="foretold for transformers, but ResNetConfig"):
        Anatomy.of(ResNetConfig(), found, vocabulary=10)
