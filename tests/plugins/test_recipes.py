"""Policies in the words of other tools: told in full, or left out with a reason."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from autoprune_plugins.recipes import TOOLS, Recipes
from tiny_exports import Case, tiny_case

from autoprune.compression.storage import Storage
from autoprune.errors import ExportError
from autoprune.exporting.exporter import ExportJob
from autoprune.exporting.marker import MARKER
from autoprune.policy import Action

TARGET = Recipes()
Form = Callable[[Storage], Storage]


def pruned(sparsity: float, mask: str = "bitmap") -> Form:
    return lambda s: s.masked(round(s.numel * (1 - sparsity)), mask)


def rounded(bits: int, group: int | None = None, **more: Any) -> Form:
    settings = {"symmetric": True, **more}
    return lambda s: s.quantized(bits, group, **settings)


def then(first: Form, second: Form) -> Form:
    return lambda s: second(first(s))


POLICY: dict[tuple[int, str], tuple[str, Form]] = {
    (0, "q_proj"): (
        "sparsegpt(pattern=2:4) + gptq(bits=4, group=16)",
        then(pruned(0.5, "2:4"), rounded(4, 16)),
    ),
    (0, "k_proj"): ("sparsegpt(pattern=2:4)", pruned(0.5, "2:4")),
    (0, "v_proj"): ("wanda(sparsity=0.375)", pruned(0.375)),
    (0, "o_proj"): ("magnitude(sparsity=0.5)", pruned(0.5)),
    (0, "gate_proj"): ("rtn(bits=8)", rounded(8)),
    (0, "up_proj"): ("rtn(bits=4)", rounded(4, 16, symmetric=False)),
    (0, "down_proj"): ("gptq(bits=3, group=16)", rounded(3, 16)),
    (1, "q_proj"): ("awq(bits=4)", rounded(4, 32, channel_scales=True)),
    (1, "k_proj"): ("awq(bits=4)", rounded(4, 32, channel_scales=True)),
    (1, "v_proj"): ("awq(bits=4)", rounded(4, 32, channel_scales=True)),
    (1, "o_proj"): ("fp8(per=row)", lambda s: s.coded("fp8_e4m3", None)),
    (1, "gate_proj"): ("nvfp4", lambda s: s.coded("nvfp4", 16)),
    (1, "up_proj"): ("nvfp4", lambda s: s.coded("nvfp4", 16)),
    (1, "down_proj"): ("alps(pattern=1:4)", pruned(0.75, "1:4")),
}


def name_of(block: int, role: str) -> str:
    part = "mlp" if role in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{block}.{part}.{role}"


def job_of(case: Case, policy: dict[tuple[int, str], tuple[str, Form]]) -> ExportJob:
    storages, actions = dict(case.job.storages), {}
    for layer in case.job.inventory.layers:
        if found := policy.get((layer.block or 0, layer.role)):
            actions[layer] = Action.parse(found[0])
            storages[layer] = found[1](Storage.dense(layer))
    return replace(case.job, storages=storages, actions=actions)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return tiny_case("llama", tmp_path_factory.mktemp("tiny") / "dense", ["dense"])


def written(case: Case, job: ExportJob, folder: Path) -> tuple[Any, Any, Any, Any]:
    """Write; give each tool's file and the marker."""
    assert TARGET.write(folder, job) == {}
    texts = [(folder / tool.file).read_text() for tool in TOOLS]
    recipe, dynamic, config = texts
    marker = json.loads((folder / MARKER).read_text())
    return yaml.safe_load(recipe), json.loads(dynamic), yaml.safe_load(config), marker


def told(case: Case, policy: dict[tuple[int, str], tuple[str, Form]]) -> list[str]:
    """Give the notes on a policy, as far as formats say."""
    exporter = TARGET.for_model(case.dense, case.job.inventory)
    return exporter.notes(job_of(case, policy).storages)


def test_llm_compressor_gets_a_modifier_for_each_kind(
    tiny_llama: Case, tmp_path: Path
) -> None:
    job = job_of(tiny_llama, POLICY)
    stage = written(tiny_llama, job, tmp_path)[0]["autoprune_stage"]
    assert list(stage) == [
        "sparsegpt_2_of_4_modifiers",
        "wandapruning_0.5_modifiers",
        "wandapruning_0.375_modifiers",
        "sparsegpt_1_of_4_modifiers",
        "awq_modifiers",
        "gptq_modifiers",
        "quantization_modifiers",
    ]
    sparse = stage["sparsegpt_2_of_4_modifiers"]["SparseGPTModifier"]
    assert sparse == {
        "sparsity": 0.5,
        "mask_structure": "2:4",
        "targets": [name_of(0, "k_proj"), name_of(0, "q_proj")],
    }
    # It counts the weights that go, AutoPrune those that stay.
    fourth = stage["sparsegpt_1_of_4_modifiers"]["SparseGPTModifier"]
    assert (fourth["sparsity"], fourth["mask_structure"]) == (0.75, "3:4")
    awq = stage["awq_modifiers"]["AWQModifier"]["mappings"]
    assert awq == [
        {
            "smooth_layer": "model.layers.1.input_layernorm",
            "balance_layers": [name_of(1, f"{one}_proj") for one in "qkv"],
        }
    ]
    gptq = stage["gptq_modifiers"]["GPTQModifier"]["config_groups"]
    assert [group["targets"] for group in gptq.values()] == [[name_of(0, "down_proj")]]
    assert gptq["group_0"]["weights"] == {
        "num_bits": 3,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group",
        "group_size": 16,
    }


def test_schemes_are_such_as_compressed_tensors_reads(
    tiny_llama: Case, tmp_path: Path
) -> None:
    schemes = pytest.importorskip("compressed_tensors.quantization")
    job = job_of(tiny_llama, POLICY)
    stage = written(tiny_llama, job, tmp_path)[0]["autoprune_stage"]
    found = {}
    for modifiers in stage.values():
        for arguments in modifiers.values():
            for group in arguments.get("config_groups", {}).values():
                scheme = schemes.QuantizationScheme(**group)
                found |= dict.fromkeys(scheme.targets, scheme.weights)
    only_pruned = {(0, "k_proj"), (0, "v_proj"), (0, "o_proj"), (1, "down_proj")}
    assert found.keys() == {name_of(*place) for place in POLICY.keys() - only_pruned}
    fine = schemes.preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    own = found[name_of(1, "gate_proj")]
    for field in ("num_bits", "type", "strategy", "group_size", "scale_dtype"):
        assert getattr(own, field) == getattr(fine, field), field


def test_gptqmodel_gets_a_rule_for_every_module(
    tiny_llama: Case, tmp_path: Path
) -> None:
    dynamic = written(tiny_llama, job_of(tiny_llama, POLICY), tmp_path)[1]
    rules = dynamic["dynamic"]
    assert len(rules) == 15  # 14 layers and the head
    assert rules[r"+:^model\.layers\.0\.mlp\.up_proj$"] == {
        "bits": 4,
        "group_size": 16,
        "sym": False,
    }
    assert rules[r"+:^model\.layers\.0\.mlp\.gate_proj$"]["group_size"] == -1
    assert rules[r"-:^model\.layers\.0\.self_attn\.q_proj$"] == {}
    assert rules["-:^lm_head$"] == {}
    signs = [pattern[:2] for pattern in rules]
    assert signs == sorted(signs, reverse=True)
    assert (dynamic["bits"], dynamic["group_size"], dynamic["sym"]) == (4, 32, True)


def test_modelopt_gets_both_arguments(tiny_llama: Case, tmp_path: Path) -> None:
    config = written(tiny_llama, job_of(tiny_llama, POLICY), tmp_path)[2]
    mode, rules = config["sparsify"]["mode"][0]
    assert (mode, config["sparsify"]["pattern"]) == ("sparsegpt", "2:4 sparsity")
    assert rules["nn.Linear"] == {
        "*": None,
        name_of(0, "k_proj"): {},
        name_of(0, "q_proj"): {},
    }
    first, *entries = config["quantize"]["quant_cfg"]
    assert first == {"quantizer_name": "*", "enable": False}
    numerics = {
        e["quantizer_name"].removesuffix(".weight_quantizer"): e["cfg"] for e in entries
    }
    assert numerics[name_of(0, "gate_proj")] == {"num_bits": 8, "axis": 0}
    assert numerics[name_of(0, "q_proj")] == {
        "num_bits": 4,
        "block_sizes": {-1: 16, "type": "static"},
    }
    assert numerics[name_of(1, "o_proj")] == {"num_bits": [4, 3], "axis": 0}
    assert numerics[name_of(1, "up_proj")]["block_sizes"]["scale_bits"] == [4, 3]
    assert config["quantize"]["algorithm"] == "max"


def test_what_is_left_out_and_what_stands_in_is_told(
    tiny_llama: Case, tmp_path: Path
) -> None:
    marker = written(tiny_llama, job_of(tiny_llama, POLICY), tmp_path)[3]
    assert {file: len(left) for file, left in marker["left_out"].items()} == {
        "recipe.yaml": 0,
        "gptqmodel_dynamic.json": 8,
        "modelopt_config.yaml": 4,
    }
    notes = "\n".join(marker["notes"])
    for part in (
        "recipe.yaml: WandaPruningModifier stands in for magnitude in 1 layers",
        "recipe.yaml: QuantizationModifier stands in for gptq in 1 layers",
        "recipe.yaml: SparseGPTModifier stands in for alps in 1 layers",
        "gptqmodel_dynamic.json: gptq stands in for awq in 3 layers",
        "k_proj and 4 more: GPTQModel does not prune, and would fill the zeros again",
        "ModelOpt rounds weights without zero points",
        "ModelOpt prunes 2:4 only, no unstructured zeros",
    ):
        assert part in notes


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (lambda s: replace(s, hidden=16), "hidden state would have to be rotated"),
        (lambda s: s.factored(2), "factors of low rank"),
        (lambda s: s.masked(512, "16x32", units=1), "units of the model: cut it"),
        (lambda s: s.masked(0, "32x32"), "units of the model: cut it first"),
        (lambda s: replace(pruned(0.5, "2:4")(s), permuted=True), "another order"),
        (lambda s: pruned(0.5)(s).biased(), "a bias that is added"),
        (lambda s: s.masked(512, "16x16"), "tiles of 16x16 cannot be told"),
    ],
)
def test_what_no_tool_can_do_is_told_once(
    form: Form, reason: str, tiny_llama: Case
) -> None:
    notes = told(tiny_llama, {(1, "o_proj"): ("unknown", form)})
    assert len(notes) == 1
    assert notes[0].startswith(f"every file leaves out {name_of(1, 'o_proj')}: ")
    assert reason in notes[0]


@pytest.mark.parametrize(
    ("form", "reasons"),
    [
        (
            lambda s: s.coded("nf4", 16),
            ["llm-compressor has no nf4", "no nf4", "ModelOpt has no nf4"],
        ),
        (
            rounded(4, 5),
            [
                "32 inputs are no multiple of 5",
                "32 inputs are no multiple of groups of 5",
                "32 inputs are no multiple of 5",
            ],
        ),
        (
            lambda s: s.coded("nvfp4", 16),
            ["wants all of gate_proj, up_proj in NVFP4, or none", "no nvfp4"],
        ),
        (pruned(0.5, "4:8"), ["GPTQModel does not prune", "prunes 2:4 only, no 4:8"]),
    ],
)
def test_what_a_tool_lacks_is_told_for_it(
    form: Form, reasons: list[str], tiny_llama: Case
) -> None:
    notes = told(tiny_llama, {(1, "gate_proj"): ("unknown", form)})
    assert len(notes) == len(reasons)
    for note, reason in zip(notes, reasons, strict=True):
        assert reason in note


def test_layers_that_are_no_linear_modules_are_left_out(tmp_path: Path) -> None:
    case = tiny_case("gpt2", tmp_path / "dense", ["nm(pattern=2:4)"])
    (tmp_path / "export").mkdir()
    recipe, dynamic, config, marker = written(case, case.job, tmp_path / "export")
    assert (recipe, config) == ({"autoprune_stage": {}}, {})
    assert list(dynamic["dynamic"]) == ["-:^lm_head$"]
    assert "no linear module of its own" in marker["notes"][0]


def test_awq_is_not_smoothed_where_others_read_the_same(
    tiny_llama: Case, tmp_path: Path
) -> None:
    policy = {(0, "q_proj"): POLICY[1, "q_proj"]}
    recipe, *_, marker = written(tiny_llama, job_of(tiny_llama, policy), tmp_path)
    assert list(recipe["autoprune_stage"]) == ["quantization_modifiers"]
    note = "recipe.yaml: QuantizationModifier stands in for awq in 1 layers"
    assert note in marker["notes"]


def test_modelopt_takes_the_algorithm_of_most_layers(
    tiny_llama: Case, tmp_path: Path
) -> None:
    gptq = {(0, one): ("gptq(bits=4)", rounded(4)) for one in ("q_proj", "k_proj")}
    policy = {**gptq, (0, "v_proj"): ("rtn(bits=4)", rounded(4))}
    config, marker = written(tiny_llama, job_of(tiny_llama, policy), tmp_path)[2:]
    assert config["quantize"]["algorithm"] == "gptq"
    assert "modelopt_config.yaml: gptq stands in for rtn in 1 layers" in marker["notes"]


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("recipe.yaml", "sparsity: 0.375", "sparsity: 0.5", "v_proj'.*0.5.*0.375"),
        ("recipe.yaml", "num_bits: 3", "num_bits: 4", r"down_proj.*bits=4.*bits=3"),
        ("recipe.yaml", "GPTQModifier", "QuantizationModifier", "down_proj"),
        ("recipe.yaml", "autoprune_stage", "other", "cannot be read: KeyError"),
        ("gptqmodel_dynamic.json", '"sym": false', '"sym": true', "up_proj"),
        ("gptqmodel_dynamic.json", "{", "", "cannot be read: JSONDecodeError"),
        ("gptqmodel_dynamic.json", "+:^", "-:^", "None, expected Treatment"),
        ("modelopt_config.yaml", "-1: 32", "-1: 16", "group=16.*expected.*group=32"),
        ("modelopt_config.yaml", "mode:", "pattern:", "cannot be read: KeyError"),
    ],
)
def test_a_changed_file_is_told(
    file: str, old: str, new: str, message: str, tiny_llama: Case, tmp_path: Path
) -> None:
    job = job_of(tiny_llama, POLICY)
    TARGET.write(tmp_path, job)
    TARGET.check(tmp_path, job)
    change(tmp_path / file, old, new)
    with pytest.raises(ExportError, match=message):
        TARGET.check(tmp_path, job)


def test_there_is_nothing_to_load_or_to_weigh(tiny_llama: Case, tmp_path: Path) -> None:
    assert not TARGET.weights
    storages = tiny_llama.job.storages
    assert TARGET.size_bytes(storages, tiny_llama.untouched) == 0
    assert {TARGET.layer_bytes(la, s) for la, s in storages.items()} == {0}
    assert TARGET.written_bytes(tmp_path) == 0
    with pytest.raises(ExportError, match="hold no weights: let one of the tools"):
        TARGET.load(tmp_path)


def test_usage_names_the_files() -> None:
    usage = TARGET.usage("here", "AutoModelForCausalLM")
    assert all(f"here/{tool.file}" in usage for tool in TOOLS)
