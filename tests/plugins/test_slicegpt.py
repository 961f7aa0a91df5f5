"""SliceGPT: nothing is lost in a subspace; the file does what was measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.gptq import Gptq
from autoprune_plugins.packed import Packed
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.slicegpt import SliceGpt
from autoprune_plugins.transformers_folder import TransformersFolder
from autoprune_plugins.units import Channels
from tiny_exports import Case, case_of
from tiny_models import tiny
from tiny_runs import config_of, write_text
from transformers import PreTrainedModel

from autoprune.compression.actions import Actions
from autoprune.compression.method import Source
from autoprune.compression.storage import Storage
from autoprune.compression.variant import Variant
from autoprune.config import RunConfig
from autoprune.deliver import export
from autoprune.errors import BudgetError, ConfigError, ExportError, MethodError
from autoprune.models.blocks import BlockRunner
from autoprune.models.hidden_statistics import HiddenStatistics, gather_hidden
from autoprune.models.layers import Inventory, inventory, write_weight
from autoprune.plugins import load_plugins
from autoprune.policy import Action, Layer, Policy
from autoprune.run import search
from autoprune.searching.plan import Plan
from autoprune.testing import tiny_statistics

ACTIONS = Actions(
    {m.name: m for m in (SliceGpt(), RoundToNearest(), Gptq(), Channels())}
)
KEEP = Action.parse("slicegpt(keep=0.75)")
IDS = torch.arange(48).reshape(4, 12).mul(7).remainder(64)
WIDTH, KEPT = 32, 24
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "smollm3", "granite"]


def scaled(kind: str, **changes: Any) -> PreTrainedModel:
    """Make a tiny model whose norms scale by more than ones, some of them negative."""
    model = tiny(kind, **changes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + 1)
    return model


def found_in(model: PreTrainedModel) -> Inventory:
    return inventory(model, register_architectures())


def statistics_of(model: PreTrainedModel) -> HiddenStatistics:
    found = found_in(model)
    return gather_hidden(model, found, BlockRunner(model, found, IDS, batch=2))


def sliced_case(model: PreTrainedModel, folder: Path, action: Action = KEEP) -> Case:
    """Put ``slicegpt`` on a tiny model, ready to be exported."""
    model.save_pretrained(folder)
    case = case_of(folder, "AutoModelForCausalLM", ["dense"])
    known = statistics_of(case.dense)
    settings = [ACTIONS.settings(action.steps[0])]
    variants = {}
    for layer in case.job.inventory.layers:
        source = Source(layer, case.job.variant(layer))
        variants[layer] = SliceGpt().compress([source], known, settings)[0][0]
        assert variants[layer].storage == ACTIONS.storage(layer, action)
        write_weight(case.model, layer, variants[layer].weight)
    storages = {layer: variant.storage for layer, variant in variants.items()}
    job = replace(case.job, storages=storages, variant=variants.__getitem__)
    return replace(case, job=job)


def exported(case: Case, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Write and read back; the size has to be what was foretold."""
    folder.mkdir()
    target = TransformersFolder().for_model(case.dense, case.job.inventory)
    target.write(folder, case.job)
    size = target.size_bytes(case.job.storages, case.untouched)
    assert target.written_bytes(folder) == size
    prices = [target.layer_bytes(la, s) for la, s in case.job.storages.items()]
    assert size <= target.size_bytes({}, case.untouched) + sum(prices)
    model = getattr(transformers, case.job.auto_class).from_pretrained(folder)
    assert type(model) is type(case.dense)
    return model, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_cut_model_does_what_the_projected_one_does(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    case = sliced_case(scaled(kind, tie_word_embeddings=tied), tmp_path / "dense")
    model, config = exported(case, tmp_path / "export")
    assert config["hidden_size"] == KEPT and config["head_dim"] == 8
    assert model.lm_head.weight.shape == (64, KEPT)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    off = (case.logits() - case.logits(case.dense)).norm() / case.logits().norm()
    assert off > 0.05  # so that it is no news that they agree
    torch.testing.assert_close(case.logits(model), case.logits(), rtol=1e-4, atol=1e-4)
    ids = torch.arange(3, 9)[None]
    assert model.generate(ids, min_new_tokens=2, max_new_tokens=2).shape == (1, 8)


def test_every_tensor_is_cut_and_nothing_added(tmp_path: Path) -> None:
    case = sliced_case(scaled("llama"), tmp_path / "dense")
    model, _ = exported(case, tmp_path / "export")
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    block = {
        "input_layernorm": (KEPT,),
        "post_attention_layernorm": (KEPT,),
        "self_attn.q_proj": (32, KEPT),
        "self_attn.k_proj": (16, KEPT),
        "self_attn.v_proj": (16, KEPT),
        "self_attn.o_proj": (KEPT, 32),
        "mlp.gate_proj": (48, KEPT),
        "mlp.up_proj": (48, KEPT),
        "mlp.down_proj": (KEPT, 48),
    }
    wanted = {f"model.layers.{b}.{n}": s for b in range(2) for n, s in block.items()}
    ends = ("model.embed_tokens", "lm_head")
    wanted |= dict.fromkeys(ends, (64, KEPT)) | {"model.norm": (KEPT,)}
    assert shapes == {f"{name}.weight": shape for name, shape in wanted.items()}
    ones = model.model.layers[1].input_layernorm.weight
    assert torch.equal(ones, torch.ones(KEPT))


def lying_in(basis: torch.Tensor, **changes: Any) -> PreTrainedModel:
    """Make a model that writes nothing outside of a subspace."""
    model = scaled("llama", **changes)
    inside = basis @ basis.T
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.copy_(parameter @ inside)
        elif "o_proj" in name or "down_proj" in name:
            parameter.copy_(inside @ parameter)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_nothing_is_lost_of_a_subspace(tied: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(WIDTH, KEPT, generator=generator))[0]
    dense = lying_in(basis, tie_word_embeddings=tied)
    known = statistics_of(dense)
    axes = known.axes[:, :KEPT].float()
    torch.testing.assert_close(axes @ axes.T, basis @ basis.T, rtol=0, atol=1e-4)
    case = sliced_case(dense, tmp_path / "dense")
    torch.testing.assert_close(case.logits(), case.logits(dense), rtol=1e-4, atol=1e-4)
    model, config = exported(case, tmp_path / "export")
    assert config["hidden_size"] == KEPT
    torch.testing.assert_close(
        case.logits(model), case.logits(dense), rtol=1e-4, atol=1e-4
    )


def test_the_covariance_is_of_what_norms_read_at_length_one() -> None:
    model = scaled("llama")
    read: list[torch.Tensor] = []
    norms = [m for n, m in model.named_modules() if "norm" in n.rpartition(".")[2]]
    assert len(norms) == 5
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, args: read.append(args[0].double()))
    model(IDS)
    rows = torch.cat([one.reshape(-1, WIDTH) for one in read])
    size = rows.square().sum(1, keepdim=True).sqrt()
    rows = rows / size.where(size > 0, 1.0)  # the padding token is all zeros
    for norm in norms:
        norm._forward_pre_hooks.clear()
    known = statistics_of(model)
    assert known.hessian is not None and known.tokens == len(rows) == 5 * 48
    torch.testing.assert_close(known.hessian, rows.T @ rows, rtol=1e-5, atol=1e-5)
    energy = (rows @ known.axes).square().sum(0)
    assert torch.all(energy[:-1] >= energy[1:] - 1e-6)
    torch.testing.assert_close(
        known.axes.T @ known.axes, torch.eye(WIDTH, dtype=torch.float64)
    )
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_readers_stay_and_writers_are_projected_by_hand() -> None:
    layers = {
        la.name.removeprefix("model."): la for la in found_in(tiny("llama")).layers
    }
    # All vectors along three of four quarters: the last 8 directions are never seen.
    seen = torch.diag(torch.arange(32, 0, -1).double()) * (torch.arange(32) < 24)
    known = HiddenStatistics(9, hessian=seen)
    ones = {"embed_tokens": (64, 32), "layers.0.self_attn.o_proj": (32, 32)}
    ones |= {"layers.1.mlp.down_proj": (32, 48), "layers.1.mlp.up_proj": (48, 32)}
    made = {}
    for name, shape in ones.items():
        source = Source(layers[name], Variant.dense(torch.ones(shape)))
        settings = [ACTIONS.settings(KEEP.steps[0])]
        made[name] = SliceGpt().compress([source], known, settings)[0][0]
    kept = (torch.arange(32) < 24).float()
    for name, rows in zip(ones, (False, True, True), strict=False):
        shape = ones[name]
        wanted = (kept[:, None] if rows else kept[None]).expand(shape)
        assert torch.equal(made[name].weight, wanted)
    assert torch.equal(made["layers.1.mlp.up_proj"].weight, torch.ones(48, 32))
    assert [v.storage.kept for v in made.values()] == [
        64 * 24,
        24 * 32,
        24 * 48,
        48 * 24,
    ]


@pytest.mark.parametrize(
    ("kind", "action", "told"),
    [
        ("gpt2", "slicegpt(keep=0.75)", "cannot be rotated.*Name sites such as hidden"),
        ("opt", "slicegpt(keep=0.75)", "cannot be rotated"),
        ("bert", "slicegpt(keep=0.75)", "cannot be rotated"),
        ("gemma", "slicegpt(keep=0.75)", "cannot be rotated"),
        ("gemma2", "slicegpt(keep=0.75)", "cannot be rotated"),
        ("olmo2", "slicegpt(keep=0.75)", "cannot be rotated"),
        ("mixtral", "slicegpt(keep=0.75)", "cannot be rotated"),
        ("llama", "slicegpt(keep=0.9)", "none of 32 directions, which go 8 at a time"),
        ("llama", "slicegpt(keep=0.75) + rtn(bits=4)", r"rtn\(bits=4\) cannot follow"),
        ("llama", "slicegpt(keep=0.75) + gptq(bits=4)", "cannot follow"),
        ("llama", "rtn(bits=4) + slicegpt(keep=0.75)", "slicegpt comes first"),
        ("llama", "slicegpt(keep=0.75) + slicegpt(keep=0.5)", "cannot follow"),
    ],
)
def test_refusals(kind: str, action: str, told: str) -> None:
    layer = found_in(tiny(kind)).layers[1]
    with pytest.raises(MethodError, match=told):
        ACTIONS.storage(layer, Action.parse(action))


def test_a_bias_in_the_way_is_refused() -> None:
    found = found_in(tiny("llama", attention_bias=True))
    assert found.hidden is None
    assert "no bias on the way" in str(ACTIONS.refuses(found.layers[0], KEEP))
    # Biases behind readers, as in Qwen2, are in no one's way.
    assert found_in(tiny("qwen2")).hidden is not None


def test_another_layer_that_reads_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].router = torch.nn.Linear(WIDTH, 4, bias=False)
    assert found_in(model).hidden is None


def test_widths_are_what_kernels_and_heads_allow() -> None:
    cut = found_in(tiny("llama")).layers[0].hidden
    assert cut is not None and (cut.unit, cut.units) == (8, 4)
    odd = tiny("llama", hidden_size=72, num_attention_heads=3, num_key_value_heads=3)
    cut = found_in(odd).layers[0].hidden
    assert cut is not None and (cut.unit, cut.units) == (24, 3)


def test_it_asks_for_the_whole_model() -> None:
    layer = found_in(tiny("llama")).layers[1]
    source = Source(layer, Variant.dense(torch.ones(layer.shape)))
    settings = [ACTIONS.settings(KEEP.steps[0])]
    with pytest.raises(MethodError, match=r"whole model .* not on .*q_proj alone"):
        SliceGpt().compress([source], tiny_statistics(), settings)


def test_weights_and_sums_that_are_no_numbers_are_told() -> None:
    layer = found_in(tiny("llama")).layers[1]
    broken = torch.full(layer.shape, torch.nan)
    settings = [ACTIONS.settings(KEEP.steps[0])]
    known = HiddenStatistics(1, hessian=torch.eye(WIDTH, dtype=torch.float64))
    with pytest.raises(MethodError, match="q_proj holds NaN"):
        SliceGpt().compress([Source(layer, Variant.dense(broken))], known, settings)


def test_packed_refuses_what_it_cannot_rotate() -> None:
    layer = found_in(tiny("llama")).layers[1]
    reason = Packed().refuses(layer, Storage.dense(layer).narrowed(layer, KEPT))
    assert reason == ("the target packed does not rotate; the target transformers does")


def test_layers_that_differ_are_not_cut(tmp_path: Path) -> None:
    case = sliced_case(scaled("llama"), tmp_path / "dense")
    storages: dict[Layer, Storage] = dict(case.job.storages)
    first = next(iter(storages))
    storages[first] = Storage.dense(first)
    target = TransformersFolder().for_model(case.dense, case.job.inventory)
    (note,) = target.notes(storages)
    assert note == "directions stay as zeros of full size: layers do not keep the same"
    dense = {layer: Storage.dense(layer) for layer in storages}
    sizes = [target.size_bytes(one, case.untouched) for one in (storages, dense)]
    assert sizes[0] == sizes[1]


def test_a_model_that_is_not_projected_is_not_cut(tmp_path: Path) -> None:
    case = sliced_case(scaled("llama"), tmp_path / "dense")
    job = replace(
        case.job,
        variant=lambda layer: Variant.dense(
            case.dense.get_parameter(f"{layer.name}.weight")
        ),
    )
    with pytest.raises(ExportError, match="has more than 24 of 32 directions"):
        exported(replace(case, job=job), tmp_path / "export")


def whole(checkpoint: Path, folder: Path, **changes: Any) -> RunConfig:
    """Make the configuration of a space whose only site is the whole model."""
    actions = ["slicegpt(keep=[0.5, 0.75])", "dense"]
    settings: dict[str, Any] = {
        "space": [{"sites": "hidden", "actions": actions}],
        "objective": {"metric": "kl"},
        "search": {"trials": 4, "finalists": 2},
        "export": "transformers",
    }
    return config_of(checkpoint, write_text(folder), **settings | changes)


def test_a_bank_takes_dense_inputs_whatever_its_reference(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    plan = Plan.make(whole(tiny_checkpoint, tmp_path), load_plugins(), cache=tmp_path)
    plan.bank.make(plan.pairs)
    assert plan.bank.missing(plan.pairs) == []
    policy = Policy({"hidden": KEEP})
    assert plan.bank.reference  # one of these variants itself
    other = plan.bench.bank()
    assert not other.reference and other.name != plan.bank.name
    other.make(plan.pairs)
    for layer, action in plan.pairs:
        weight = plan.bank.get(layer, action).weight
        assert torch.equal(other.get(layer, action).weight, weight)
    metrics = plan.bench.measure(policy, plan.bank, "fitness").metrics
    assert metrics["sparsity"] == pytest.approx(0.25)
    assert metrics["bits_per_weight"] == pytest.approx(0.75 * 32)
    assert metrics["kl"] > 0.01
    dense = plan.bench.dense_metrics("fitness")
    assert 0.7 < metrics["size_bytes"] / dense["size_bytes"] < 0.8


@pytest.mark.slow
def test_a_search_over_the_whole_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    budget = {"metric": "kl", "budgets": {"size_bytes": "90%"}}
    config = whole(tiny_checkpoint, tmp_path, objective=budget)
    found = search(config, tmp_path / "run")
    assert found.policy is not None and set(found.policy) == {"hidden"}
    assert str(found.policy["hidden"]) == "slicegpt(keep=0.75)"
    folder = tmp_path / "out"
    export(tmp_path / "run", target="transformers", out=folder)  # verifies itself
    assert json.loads((folder / "config.json").read_text())["hidden_size"] < 32 * 4
    tight = {"metric": "kl", "budgets": {"size_bytes": "10%"}}
    with pytest.raises(BudgetError, match="no policy of the space meets"):
        Plan.make(whole(tiny_checkpoint, tmp_path, objective=tight), load_plugins())


@pytest.mark.parametrize(
    ("space", "told"),
    [
        (
            {"hidden": "slicegpt(keep=0.75)", "blocks.*.mlp": "channels(keep=0.5)"},
            "both hold",
        ),
        ({"blocks.*": "slicegpt(keep=0.75)"}, "whole sites. Name sites such as hidden"),
        ({"hidden": "channels(keep=0.5)"}, "acts on whole sites"),
        ({"hidden": "slicegpt(keep=0.75)"}, "target packed does not rotate"),
    ],
    ids=["overlap", "blocks", "channels", "packed"],
)
def test_spaces_that_do_not_fit(
    space: dict[str, str], told: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rules = [{"sites": sites, "actions": [text]} for sites, text in space.items()]
    config = config_of(tiny_checkpoint, write_text(tmp_path), space=rules, objective={})
    with pytest.raises(ConfigError, match=told):
        Plan.make(config, load_plugins())
