"""What several GPUs cannot share is left out of a space, and refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.compressed_tensors_folder import CompressedTensors
from autoprune_plugins.packed import Packed
from tiny_models import CONFIGS, tiny
from tiny_runs import write_text

from autoprune.compression.actions import Actions
from autoprune.compression.storage import Storage
from autoprune.config import Rule, TextConfig
from autoprune.errors import ConfigError, ExportError
from autoprune.evaluation.targets import check_target
from autoprune.evaluation.workbench import Workbench
from autoprune.exporting.exporter import Exporter
from autoprune.exporting.parallel import COLUMNS, ROWS, Heads, TensorParallel
from autoprune.exporting.sharded import Sharded, sharded
from autoprune.models.layers import Inventory, inventory
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer, Policy
from autoprune.searching.formulate import formulate


def divided(
    ways: int, kind: str = "llama", **changes: object
) -> tuple[TensorParallel, Inventory]:
    """Divide a tiny model: 4 heads of 8 rows, 2 of keys, 48 channels, 32 wide."""
    model = tiny(kind, **changes)
    found = inventory(model, register_architectures())
    return TensorParallel.of(model, found, ways), found


def layer_of(found: Inventory, role: str) -> Layer:
    return next(la for la in found.layers if la.role == role and la.block == 0)


def refusal(
    parallel: TensorParallel, found: Inventory, role: str, action: str
) -> str | None:
    layer, actions = layer_of(found, role), Actions(load_plugins().methods)
    storage = actions.storage(layer, actions.canonical(Action.parse(action)))
    return parallel.refuses(layer, storage, Packed())


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layer_of_a_block_is_divided_as_its_place_wants(kind: str) -> None:
    parallel, found = divided(2, kind)
    takers = ("o_proj", "down_proj", "out_proj", "fc2", "output.dense")
    for site in found.sites:
        if site.kind == "embedding":
            assert not parallel.axes.keys() & set(site.layers)
            continue
        takes = site.name.split(".")[-1] in ("o", "down")
        for layer in site.layers:
            assert parallel.axes[layer] == (COLUMNS if takes else ROWS), layer.name
            if layer.role.split("[")[0].endswith(takers):
                assert takes or kind == "bert"
            ways, axis = parallel.ways_of(layer), parallel.axes[layer]
            assert layer.shape[axis] % ways == 0


@pytest.mark.parametrize(
    ("ways", "role", "action", "message"),
    [
        (2, "o_proj", "rtn(bits=4, group=16)", None),
        (2, "o_proj", "rtn(bits=4, group=32)", "has 16 of 32 inputs, and 32 in a row"),
        (4, "o_proj", "rtn(bits=4, group=16)", "has 8 of 32 inputs, and 16 in a row"),
        (4, "o_proj", "rtn(bits=4)", None),
        (2, "q_proj", "rtn(bits=4, group=32)", None),
        (4, "k_proj", "rtn(bits=4, group=32)", None),
        (2, "down_proj", "rtn(bits=4, group=8)", None),
        (2, "down_proj", "rtn(bits=4, group=16)", "24 of 48 inputs, and 16.*scale"),
        (4, "down_proj", "magnitude(pattern=2:4)", None),
        (4, "down_proj", "magnitude(pattern=4:8)", "12 of 48 inputs, .*4:8 goes by 8"),
        (4, "gate_proj", "magnitude(pattern=4:8)", None),
        (2, "down_proj", "magnitude(sparsity=0.5)", None),
        (4, "down_proj", "drop", None),
    ],
)
def test_what_belongs_together_stays_on_one_gpu(
    ways: int, role: str, action: str, message: str | None
) -> None:
    parallel, found = divided(ways)
    reason = refusal(parallel, found, role, action)
    if message is None:
        assert reason is None
    else:
        assert reason is not None
        pattern = rf"with {ways} GPUs each .*{message}"
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(reason)
        assert "Take a " in reason


@pytest.mark.parametrize(
    ("role", "mask", "fits"),
    [
        ("down_proj", "1x8", True),
        ("down_proj", "1x16", False),
        ("down_proj", "16x1", True),
        ("gate_proj", "16x1", False),
        ("gate_proj", "8x16", True),
    ],
)
def test_tiles_are_not_torn(role: str, mask: str, fits: bool) -> None:
    parallel, found = divided(2)
    layer = layer_of(found, role)
    storage = Storage.dense(layer).masked(layer.numel // 2, mask)
    reason = parallel.refuses(layer, storage, Packed())
    assert (reason is None) == fits
    assert fits or f"the pattern {mask} goes by 16" in str(reason)


@pytest.mark.parametrize(
    ("ways", "role", "kept", "fits"),
    [
        (2, "up_proj", 24, True),
        (2, "up_proj", 23, False),
        (4, "down_proj", 24, True),
        (4, "down_proj", 22, False),
        (2, "q_proj", 1, True),  # 2 query heads, and one of keys that both GPUs have
        (4, "q_proj", 1, False),
        (4, "o_proj", 1, False),
    ],
)
def test_units_that_stay_are_shared_evenly(
    ways: int, role: str, kept: int, fits: bool
) -> None:
    parallel, found = divided(ways)
    layer = layer_of(found, role)
    assert layer.cut is not None
    count = layer.numel // layer.cut.units * kept
    storage = Storage.dense(layer).masked(count, "bitmap", units=kept)
    reason = parallel.refuses(layer, storage, Packed())
    assert (reason is None) == fits
    told = f"share the {kept} of {layer.cut.units} {layer.cut.kind} evenly"
    assert fits or told in str(reason)


def test_codes_have_to_fit_cut_and_uncut() -> None:
    parallel, found = divided(2)
    layer = layer_of(found, "down_proj")
    cut = Storage.dense(layer).masked(layer.numel // 48 * 40, "bitmap", units=40)
    # Uncut a GPU has 24 columns, three groups of 8; cut only 20.
    grouped = cut.quantized(4, 8, True)
    assert "has 20 of 40 inputs" in str(parallel.refuses(layer, grouped, Packed()))
    assert parallel.refuses(layer, cut.quantized(4, 4, True), Packed()) is None


def test_a_part_has_to_suit_the_targets_kernels() -> None:
    parallel, found = divided(2, intermediate_size=96)
    layer = layer_of(found, "down_proj")
    target = CompressedTensors()
    whole = Storage.dense(layer).quantized(4, None, True)
    assert target.refuses(layer, whole) is None
    message = "one of 2 GPUs would have to hold it, its 48 inputs are no multiple of 32"
    assert message in str(parallel.refuses(layer, whole, target))
    assert parallel.refuses(layer, whole, Packed()) is None
    made = layer_of(found, "gate_proj")  # divided by rows, which kernels take as is
    assert (
        parallel.refuses(made, Storage.dense(made).quantized(4, None, True), target)
        is None
    )


def test_keys_are_repeated_where_there_are_few() -> None:
    parallel, found = divided(4)
    ways = {la.role: parallel.ways_of(la) for la in found.layers if la.block == 0}
    assert (ways["q_proj"], ways["k_proj"], ways["v_proj"], ways["o_proj"]) == (
        4,
        2,
        2,
        4,
    )
    assert Heads(8, 3, 4).refuses(4) == "3 heads of keys and values"


@pytest.mark.parametrize(
    ("ways", "kind", "changes", "message"),
    [
        (3, "llama", {}, "3 GPUs cannot share the model's 4 attention heads.* 1, 2, 4"),
        (4, "llama", {"intermediate_size": 42}, r"42 outputs of .*gate_proj .*1, 2$"),
        (8, "gpt2", {}, "8 GPUs cannot share the model's 4 attention heads"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(
    ways: int, kind: str, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        divided(ways, kind, **changes)


def test_a_model_of_which_nothing_is_known_is_refused() -> None:
    model = tiny("llama")
    found = inventory(model, register_architectures())
    with pytest.raises(ConfigError, match="nothing tells how .*LlamaForCausalLM"):
        TensorParallel.of(model, replace(found, sites=()), 2)


def test_all_that_a_target_can_be_asked_is_passed_on() -> None:
    asked = {name for name in vars(Exporter) if not name.startswith("_")}
    own = {name for name in vars(Sharded) if not name.startswith("_")}
    parallel, _ = divided(2)
    made = Sharded(CompressedTensors(), parallel)
    assert asked - own <= vars(made).keys()
    assert (made.name, made.fuses) == ("compressed-tensors", True)
    assert made.notes({})[-1] == ("2 GPUs can share every layer (tensor parallelism)")
    plain = {"packed": Packed()}
    assert sharded(plain, None, replace(divided(2)[1], sites=()), 1) == plain


@pytest.fixture
def bench(tmp_path: Path, tiny_checkpoint: Path) -> Workbench:
    text = {"statistics": 2, "fitness": 1, "choice": 1, "report": 1}
    return Workbench.open(
        load_plugins(),
        model=str(tiny_checkpoint),
        task="causal-lm",
        text=TextConfig(source=write_text(tmp_path), window=32, **text),
        target="packed",
        seed=0,
        tensor_parallel=2,
    )


def test_a_space_leaves_out_what_cannot_be_shared(bench: Workbench) -> None:
    rule = Rule(actions=["rtn(bits=4, group=64)", "dense"])
    space = formulate(bench, [rule], {}).space
    wide, dense = Action.parse("rtn(bits=4, group=64)"), Action()
    assert set(space.choices["blocks.0.down"]) == {wide, dense}  # 128 / 2 inputs
    assert set(space.choices["blocks.0.qkv"]) == {wide, dense}
    assert set(space.choices["blocks.0.o"]) == {dense}  # 64 / 2
    told = {site: reason for site, _, reason in space.refused}
    assert told.keys() == {"blocks.0.o", "blocks.1.o"}
    assert "with 2 GPUs each has 32 of 64 inputs" in told["blocks.0.o"]


def test_an_export_is_refused_by_the_same_rule(bench: Workbench) -> None:
    actions = {site.name: "dense" for site in bench.inventory.sites}
    actions["blocks.1.o"] = "rtn(bits=4, group=64, symmetric=true)"
    policy = Policy.from_dict({"actions": actions})
    message = r"layers\.1\.self_attn\.o_proj under rtn.*with 2 GPUs each has 32"
    for target in ("packed", "compressed-tensors"):
        with pytest.raises(ExportError, match=message):
            check_target(bench, policy, target)


def test_too_many_gpus_are_refused_before_a_search(tiny_checkpoint: Path) -> None:
    with pytest.raises(
        ConfigError, match="tensor_parallel: 3 GPUs .* It can be 1, 2, 4"
    ):
        Workbench.open(
            load_plugins(),
            model=str(tiny_checkpoint),
            task="causal-lm",
            text=TextConfig(),
            target="packed",
            seed=0,
            tensor_parallel=3,
        )
