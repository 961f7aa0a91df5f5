"""Policies of a run become folders that load, each verified by a fresh process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import config_of, save_tiny, write_text
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import autoprune
from autoprune.compression.bank import VariantBank
from autoprune.config import RunConfig
from autoprune.deliver import ExportReport, export
from autoprune.errors import ExportError, ModelError, PluginError, RunError
from autoprune.evaluation.provenance import bank_of
from autoprune.exporting.verification import verify
from autoprune.plugins import load_plugins
from autoprune.policy import Policy
from autoprune.run import SearchResult, search
from autoprune.searching.plan import Plan
from autoprune.searching.runs import read_trials, read_winner

IDS = torch.arange(40, 72)[None]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path, text: str) -> RunConfig:
    # Coarse, so that the front stays short: each of its exports takes a new process.
    return config_of(
        tiny_checkpoint,
        text,
        space=[{"actions": ["gptq(bits=[3, 8], group=16)", "wanda(pattern=2:4)"]}],
        search={"trials": 3, "finalists": 1},
        objective={"budgets": {"size_bytes": "60%"}},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> SearchResult:
    """A search that has ended; exports go elsewhere."""
    return search(config, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def plan(config: RunConfig) -> Plan:
    """The same model in this process, to compare exports with."""
    return Plan.make(config, load_plugins())


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def expected_logits(plan: Plan, policy: Policy, bank: VariantBank) -> Tensor:
    """Give the logits of the model in memory with a policy's variants on it."""
    state = {}
    model = AutoModelForCausalLM.from_pretrained(plan.bench.checkpoint.folder).eval()
    modules = dict(model.named_modules())
    for layer, action in plan.bench.per_layer(policy).items():
        state[layer.name] = bank.get(layer, action).weight
        modules[layer.name].weight.data.copy_(state[layer.name])
    return logits(model)


def check_report(report: ExportReport) -> None:
    """The size is that of the files, and the fresh process found what was measured."""
    files = list(report.folder.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == report.size_bytes
    assert report.verified is not None
    assert report.verified.size_bytes == report.size_bytes
    assert report.verified.perplexity == pytest.approx(
        report.metrics["perplexity"], rel=1e-3
    )
    names = {path.name for path in report.folder.iterdir()}
    assert names >= {"policy.json", "README.md", "config.json", "tokenizer.json"}


@pytest.mark.slow
@pytest.mark.ci
def test_the_winner_is_exported_packed(
    run: SearchResult, plan: Plan, tmp_path: Path
) -> None:
    (report,) = export(run.run_dir, out=tmp_path / "won")
    check_report(report)
    assert report.policy == run.policy
    assert report.size_bytes == run.finals["winner"]["report"]["size_bytes"]
    assert report.metrics == run.finals["winner"]["report"]
    winner = read_winner(run.run_dir)
    expected = expected_logits(plan, report.policy, bank_of(plan.bench, winner))
    assert torch.equal(logits(autoprune.load(report.folder)), expected)
    record = json.loads((report.folder / "policy.json").read_text())
    assert Policy.from_dict(record) == run.policy
    assert record["figures"] == winner["figures"]
    assert record["sizes"]["packed"]["compressed"] == report.size_bytes
    card = (report.folder / "README.md").read_text()
    shown = f"{record['figures']['compressed']['perplexity']:.4g}"
    assert f" {shown} " in card
    with pytest.raises(ExportError, match="won exists already"):
        export(run.run_dir, out=tmp_path / "won")


@pytest.mark.slow
@pytest.mark.ci
def test_the_winner_is_exported_for_plain_transformers(
    run: SearchResult, plan: Plan, tmp_path: Path
) -> None:
    (report,) = export(run.run_dir, out=tmp_path / "won", target="transformers")
    check_report(report)
    assert report.target == "transformers"
    assert report.size_bytes == run.finals["winner"]["sizes"]["transformers"]
    winner = read_winner(run.run_dir)
    expected = expected_logits(plan, report.policy, bank_of(plan.bench, winner))
    model = AutoModelForCausalLM.from_pretrained(report.folder)
    assert torch.equal(logits(model), expected)
    assert AutoTokenizer.from_pretrained(report.folder)("a b")["input_ids"]


@pytest.mark.slow
@pytest.mark.ci
def test_an_export_is_verified_again_and_tells_its_origin(
    run: SearchResult, tmp_path: Path
) -> None:
    (report,) = export(run.run_dir, out=tmp_path / "won", target="transformers")
    assert report.verified is not None
    assert (report.verified.layers, report.verified.logits) == (15, 0)  # to the bit
    found = verify(report.folder)
    assert found is not None
    assert found.logits == 0
    manifest = json.loads((report.folder / "MANIFEST.json").read_text())
    assert Policy.from_dict(manifest["policy"]) == run.policy
    assert set(manifest["splits"]) == {"statistics", "fitness", "choice", "report"}
    assert manifest["model"]["revision"] and "torch" in manifest["versions"]
    with (report.folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(ExportError, match=r"model.safetensors has SHA-256"):
        verify(report.folder)


def test_recipes_have_no_weights_to_load(run: SearchResult, tmp_path: Path) -> None:
    (report,) = export(run.run_dir, out=tmp_path / "told", target="recipes")
    assert (report.verified, report.size_bytes) == (None, 0)
    assert verify(report.folder) is None
    names = {path.name for path in report.folder.iterdir()}
    assert names >= {"recipe.yaml", "policy.json", "README.md", "MANIFEST.json"}
    (report.folder / "recipe.yaml").write_text("")
    with pytest.raises(ExportError, match="recipe.yaml has 0 bytes"):
        verify(report.folder)


def test_a_target_that_cannot_hold_the_winner_says_which_can(
    run: SearchResult, tmp_path: Path
) -> None:
    with pytest.raises(
        ExportError,
        match=r"cannot hold this policy: model\.\S+ under .*can be exported as packed",
    ):
        export(run.run_dir, out=tmp_path / "no", target="compressed-tensors")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.ci
def test_a_trial_is_exported_as_it_was_measured(
    run: SearchResult, plan: Plan, tmp_path: Path
) -> None:
    trial = read_trials(run.run_dir)[1]
    (report,) = export(run.run_dir, trial=1, out=tmp_path / "one")
    check_report(report)
    assert report.policy == trial.policy
    assert report.size_bytes == trial.metrics["size_bytes"]
    expected = expected_logits(plan, trial.policy, plan.bank)
    assert torch.equal(logits(autoprune.load(report.folder)), expected)
    record = json.loads((report.folder / "policy.json").read_text())
    assert record["trial"] == 1
    assert record["figures"]["compressed"] == report.metrics


@pytest.mark.slow
def test_a_mix_of_variants_is_exported_as_it_is_recorded(
    run: SearchResult, plan: Plan, tmp_path: Path
) -> None:
    shutil.copytree(run.run_dir, tmp_path / "run")
    record = read_winner(run.run_dir)
    record.pop("mix", None)
    policy = Policy.from_dict(record)
    sites = [name for name in policy if name.startswith("blocks.1.")]
    plain = bank_of(plan.bench, record)
    record["mix"] = {"reference": None, "sites": sites}
    (tmp_path / "run/policy.json").write_text(json.dumps(record))
    (report,) = export(tmp_path / "run", out=tmp_path / "mixed")
    check_report(report)
    found = logits(autoprune.load(report.folder))
    expected = expected_logits(plan, policy, bank_of(plan.bench, record))
    assert torch.equal(found, expected)
    assert not torch.equal(found, expected_logits(plan, policy, plain))
    assert (
        json.loads((report.folder / "policy.json").read_text())["mix"] == record["mix"]
    )


@pytest.mark.slow
def test_a_trial_of_a_further_round_is_exported_as_it_was_measured(
    config: RunConfig, plan: Plan, tmp_path: Path
) -> None:
    twice = config.search.model_copy(update={"rounds": 2, "refine": "none"})
    result = search(config.model_copy(update={"search": twice}), tmp_path / "run")
    trial = read_trials(result.run_dir / "round-2")[1]
    (report,) = export(result.run_dir, trial="round-2/1", out=tmp_path / "one")
    check_report(report)
    assert report.policy == trial.policy
    record = json.loads((report.folder / "policy.json").read_text())
    assert record["trial"] == "round-2/1"
    bank = plan.bench.bank(Policy.from_dict(record["reference"]))
    found = plan.bench.measure(trial.policy, bank, "fitness").metrics
    assert found["kl"] == trial.metrics["kl"]
    expected = expected_logits(plan, trial.policy, bank)
    assert torch.equal(logits(autoprune.load(report.folder)), expected)


@pytest.mark.slow
def test_the_front_is_exported_into_a_folder_of_folders(
    run: SearchResult, tmp_path: Path
) -> None:
    reports = export(run.run_dir, front=True, out=tmp_path / "all")
    points = [(r.size_bytes, r.policy.fingerprint) for r in reports]
    assert points == sorted(points)
    rows = run.trials.set_index("policy")
    for report in reports:
        check_report(report)
        row = rows.loc[report.policy.fingerprint]
        assert report.folder.name == f"trial-{row['number']}"
        smaller = run.trials[run.trials["size_bytes"] <= row["size_bytes"]]
        assert row["kl"] == smaller["kl"].min()


@pytest.mark.slow
@pytest.mark.ci
def test_a_masked_model_goes_the_whole_way(
    text: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = save_tiny("bert", tmp_path / "model", tiny_tokenizer)
    config = config_of(
        model,
        text,
        task="masked-lm",
        space=[{"actions": ["gptq(bits=[3, 4], group=16)", "wanda(pattern=2:4)"]}],
        objective={"budgets": {"size_bytes": "70%"}},
        search={"trials": 3, "finalists": 1},
    )
    result = search(config, tmp_path / "run")
    assert (result.trials["state"] == "complete").all()
    (report,) = export(tmp_path / "run")
    assert report.folder == tmp_path / "run/export-packed"
    check_report(report)
    loaded = autoprune.load(report.folder)
    assert type(loaded).__name__ == "BertForMaskedLM"
    card = (report.folder / "README.md").read_text()
    assert "AutoModelForMaskedLM" in card or "autoprune.load" in card


def test_what_was_not_searched_is_not_exported(run: SearchResult) -> None:
    with pytest.raises(RunError, match="has no trial 99; it has 3, counted from 0"):
        export(run.run_dir, trial=99)
    with pytest.raises(RunError, match="nowhere is no run folder"):
        export("nowhere")


def test_an_unknown_target_is_named(run: SearchResult) -> None:
    with pytest.raises(PluginError, match="unknown exporter 'paked'. Did you mean 'pa"):
        export(run.run_dir, target="paked")


def test_a_search_that_was_stopped_has_no_winner(
    config: RunConfig, tmp_path: Path
) -> None:
    search(config, tmp_path / "run", stop=lambda: True)
    with pytest.raises(RunError, match="has no winner yet.*name a trial"):
        export(tmp_path / "run")
    with pytest.raises(RunError, match="no trial that keeps every limit"):
        export(tmp_path / "run", front=True)


def test_a_text_that_has_changed_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    search(config_of(tiny_checkpoint, text), tmp_path / "run")
    write_text(tmp_path, documents=290)
    with pytest.raises(
        RunError, match=r"made with has changed:\n  text\.report: '\w{16}' then"
    ):
        export(tmp_path / "run")


def test_a_model_that_is_gone_is_told(
    tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    search(config_of(tmp_path / "model", text), tmp_path / "run")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ModelError, match=f"there is no model '{tmp_path}/model'"):
        export(tmp_path / "run")
