"""A policy is taken to other checkpoints of the shape that it was made for."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import WINDOW, config_of, save_tiny, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import autoprune
from autoprune.config import TextConfig
from autoprune.errors import (
    ConfigError,
    ExportError,
    MethodError,
    ModelError,
    PluginError,
    PolicyError,
)
from autoprune.policy import DENSE, Policy
from autoprune.policy_files import read_policy
from autoprune.run import SearchResult, search
from autoprune.transfer import apply, evaluate


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    source = write_text(tmp_path_factory.mktemp("text"))
    return TextConfig(
        source=source, window=WINDOW, statistics=4, fitness=2, choice=2, report=2
    )


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, text: TextConfig
) -> SearchResult:
    """A search that has ended."""
    config = config_of(
        tiny_checkpoint, text.source, search={"trials": 3, "finalists": 1}
    )
    return search(config, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A checkpoint of the same shape, with other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    return changed(tiny_checkpoint, folder)


def changed(source: Path, folder: Path, **config: int) -> Path:
    """Save a model like another one, drawn anew."""
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(source, **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.ci
def test_a_policy_is_applied_to_another_checkpoint(
    run: SearchResult, other: Path, text: TextConfig, tmp_path: Path
) -> None:
    report = apply(
        run.run_dir / "policy.json", model=str(other), out=tmp_path / "out", text=text
    )
    assert report.policy == run.policy
    assert report.size_bytes == run.finals["winner"]["report"]["size_bytes"]
    assert report.verified.perplexity == pytest.approx(report.metrics["perplexity"])
    # Measured before in another process, by the same protocol.
    figures = evaluate(str(other), policy=run.policy, text=text)
    assert figures["policy"] == report.metrics
    assert figures["dense"]["kl"] == pytest.approx(0, abs=1e-5)
    assert 0 < figures["policy"]["kl"]
    record = json.loads((tmp_path / "out/policy.json").read_text())
    assert record["figures"] == {
        "dense": figures["dense"],
        "compressed": report.metrics,
    }
    assert record["model"]["source"] == str(other)
    # Solved on its own inputs: the policy is its own reference.
    assert Policy.from_dict(record["reference"]) == report.policy
    loaded = autoprune.load(report.folder)
    dense = AutoModelForCausalLM.from_pretrained(other)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(loaded.state_dict()[name], dense.state_dict()[name])


def test_a_policy_is_measured_without_an_export(
    run: SearchResult, tiny_checkpoint: Path, text: TextConfig
) -> None:
    found = evaluate(str(tiny_checkpoint), policy=run.policy, text=text)
    assert found["dense"] == run.finals["dense"]
    # The winner may have been measured with the variants of the search's reference.
    winner = run.finals["winner"]
    expected = winner["report"] if winner["resolved"] else found["policy"]
    assert found["policy"] == expected
    assert found["policy"]["size_bytes"] == winner["report"]["size_bytes"]
    assert evaluate(str(tiny_checkpoint), text=text) == {"dense": found["dense"]}


def test_size_depends_on_the_target(
    run: SearchResult, tiny_checkpoint: Path, text: TextConfig
) -> None:
    found = evaluate(
        str(tiny_checkpoint), policy=run.policy, text=text, target="transformers"
    )
    sizes = run.finals["winner"]["sizes"]
    assert found["policy"]["size_bytes"] == sizes["transformers"]


def test_a_policy_does_not_fit_a_deeper_model(
    run: SearchResult, tiny_checkpoint: Path, text: TextConfig, tmp_path: Path
) -> None:
    deeper = changed(tiny_checkpoint, tmp_path / "deeper", num_hidden_layers=3)
    message = "covers 9 of 13 sites.*first without an action: 'blocks.2.qkv'"
    with pytest.raises(PolicyError, match=message):
        apply(run.policy, model=str(deeper), out=tmp_path / "out", text=text)
    with pytest.raises(PolicyError, match=message):
        evaluate(str(deeper), policy=run.policy, text=text)
    assert not (tmp_path / "out").exists()


def test_a_policy_does_not_fit_a_shallower_model(
    run: SearchResult, tiny_checkpoint: Path, text: TextConfig, tmp_path: Path
) -> None:
    shallow = changed(tiny_checkpoint, tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(PolicyError, match="that the model lacks: 'blocks.1.qkv'"):
        apply(run.policy, model=str(shallow), out=tmp_path / "out", text=text)


@pytest.mark.slow
@pytest.mark.ci
def test_a_policy_is_taken_to_another_depth_and_width(
    run: SearchResult, tiny_checkpoint: Path, text: TextConfig, tmp_path: Path
) -> None:
    larger = {"num_hidden_layers": 4, "intermediate_size": 256, "hidden_size": 128}
    deeper = changed(tiny_checkpoint, tmp_path / "deeper", **larger)
    report = apply(
        run.policy, model=str(deeper), out=tmp_path / "out", text=text, adapt=True
    )
    assert run.policy is not None
    for block, source in enumerate((0, 0, 1, 1)):
        for part in ("qkv", "o", "gate_up", "down"):
            taken = report.policy[f"blocks.{block}.{part}"]
            assert taken == run.policy[f"blocks.{source}.{part}"]
    assert report.policy["embedding"] == run.policy["embedding"]
    assert report.verified.layers == 29
    assert report.metrics["kl"] > 0


def test_another_family_is_no_matter_of_depth(
    run: SearchResult,
    text: TextConfig,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = save_tiny("gpt2", tmp_path / "model", tiny_tokenizer)
    with pytest.raises(PolicyError, match="no site 'blocks.0.gate_up'"):
        apply(run.policy, model=str(model), out=tmp_path / "out", text=text, adapt=True)
    lacking = Policy({"embedding": DENSE, "blocks.1.qkv": DENSE})
    with pytest.raises(PolicyError, match=r"every block, .* found blocks \[1\]"):
        apply(lacking, model=str(model), out=tmp_path / "out", text=text, adapt=True)


def test_a_policy_does_not_fit_another_family(
    run: SearchResult,
    text: TextConfig,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = save_tiny("gpt2", tmp_path / "model", tiny_tokenizer)
    with pytest.raises(PolicyError, match="first without an action: 'blocks.0.up'"):
        apply(run.policy, model=str(model), out=tmp_path / "out", text=text)


def test_a_group_that_divides_here_need_not_divide_there(
    tiny_checkpoint: Path, text: TextConfig, tmp_path: Path
) -> None:
    narrow = changed(tiny_checkpoint, tmp_path / "narrow", intermediate_size=120)
    plain = evaluate(str(narrow), text=text)
    assert plain["dense"]["sparsity"] == 0
    policy = policy_with(tiny_checkpoint, text, "rtn(bits=4, group=64)")
    message = r"layers.0.mlp.down_proj cannot take 'rtn\(bits=4, group=64\)'.*64.*120"
    with pytest.raises(MethodError, match=message):
        apply(policy, model=str(narrow), out=tmp_path / "out", text=text)


def policy_with(model: Path, text: TextConfig, action: str) -> Policy:
    """Give all down projections an action."""
    from autoprune.plugins import load_plugins
    from autoprune.policy import Action
    from autoprune.searching.plan import Plan

    plan = Plan.make(config_of(model, text.source), load_plugins())
    return Policy(
        {
            site.name: Action.parse(action) if site.name.endswith("down") else DENSE
            for site in plan.problem.space.sites
        }
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read the policy .*policy\.json: .*No such file"),
        ("{", r"cannot read the policy .*policy\.json: Expecting property name"),
        ("[]", r"cannot read the policy .*policy\.json: not a policy"),
        ('{"actions": {"a": "rtn("}}', r"policy\.json: cannot read 'rtn\('"),
        ('{"actions": {}, "format": 99}', r"policy\.json: the policy has format 99"),
        (b"\xff\xfe", r"cannot read the policy .*policy\.json: .*decode byte 0xff"),
    ],
    ids=["missing", "cut", "list", "action", "format", "bytes"],
)
def test_a_damaged_policy_is_told(
    content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "policy.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PolicyError, match=message):
        read_policy(path)


def test_unknown_names_are_told(
    run: SearchResult, tiny_checkpoint: Path, text: TextConfig, tmp_path: Path
) -> None:
    place = {"out": tmp_path / "out", "text": text}
    model = str(tiny_checkpoint)
    with pytest.raises(ModelError, match="there is no model '/no/where'"):
        apply(run.policy, model="/no/where", **place)
    with pytest.raises(PluginError, match="unknown exporter 'paked'"):
        apply(run.policy, model=model, target="paked", **place)
    with pytest.raises(PluginError, match="unknown task 'causal'"):
        evaluate(model, task="causal", text=text)
    with pytest.raises(PolicyError, match="unknown method 'gptk'. Did you mean 'gptq'"):
        wrong = {site: "gptk(bits=4)" for site in run.policy}
        apply(Policy.from_dict({"actions": wrong}), model=model, **place)
    assert not (tmp_path / "out").exists()


def test_the_task_is_the_one_that_the_policy_was_made_for(
    run: SearchResult, tiny_checkpoint: Path, text: TextConfig, tmp_path: Path
) -> None:
    record = json.loads((run.run_dir / "policy.json").read_text())
    assert record["task"] == "causal-lm"
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(record | {"task": "made-for-this"}))
    with pytest.raises(PluginError, match="made-for-this"):
        evaluate(str(tiny_checkpoint), policy=file, text=text)
    with pytest.raises(PluginError, match="made-for-this"):
        apply(file, model=str(tiny_checkpoint), out=tmp_path / "out", text=text)


def test_an_export_with_a_damaged_policy_is_named(
    text: TextConfig, tmp_path: Path
) -> None:
    (tmp_path / "autoprune.json").write_text("{}")
    (tmp_path / "policy.json").write_text("{broken")
    with pytest.raises(PolicyError, match="cannot read the policy .*policy.json"):
        evaluate(str(tmp_path), task="causal-lm", text=text)


@pytest.fixture(scope="module")
def pruned(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, text: TextConfig
) -> SearchResult:
    """A search whose winner takes statistics of all kinds but gradients."""
    config = config_of(
        tiny_checkpoint,
        text.source,
        space=[{"actions": ["sparsegpt(sparsity=[0.6, 0.7])"]}],
        objective={},
        search={"trials": 2, "finalists": 1},
    )
    return search(config, tmp_path_factory.mktemp("pruned") / "run")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A sibling: the tiny checkpoint after a few steps on other words."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).train()
    ids = torch.tensor(
        [tokenizer("The tuned one speaks of verse, not of things. " * 3)["input_ids"]]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_tuned_sibling_takes_statistics_anew_or_reuses_them(
    pruned: SearchResult, tuned: Path, text: TextConfig, tmp_path: Path
) -> None:
    reports = {
        way: apply(
            pruned.run_dir,
            model=str(tuned),
            out=tmp_path / way,
            text=text,
            statistics=way,
        )
        for way in ("anew", "reuse")
    }
    kl = {way: report.metrics["kl"] for way, report in reports.items()}
    # The same zeros count, other weights; both better than magnitude, which sees none.
    sizes = {report.size_bytes for report in reports.values()}
    assert len(sizes) == 1
    assert kl["anew"] != kl["reuse"]
    assert pruned.policy is not None
    plain = {site: "magnitude(sparsity=0.7)" for site in pruned.policy}
    plain |= {"embedding": "dense"}
    blind = evaluate(str(tuned), policy=Policy.from_dict({"actions": plain}), text=text)
    assert max(kl.values()) < blind["policy"]["kl"]
    told = json.loads((tmp_path / "reuse" / "policy.json").read_text())
    winner = json.loads((pruned.run_dir / "policy.json").read_text())
    assert told["model"]["source"] == str(tuned)
    assert told["statistics"]["model"] == winner["model"]
    assert told["reference"] == winner["reference"]
    assert told["figures"]["compressed"] == reports["reuse"].metrics
    card = (tmp_path / "reuse" / "README.md").read_text()
    assert "Statistics were not taken from this model: those of `checkpoint`" in card
    assert "statistics" not in json.loads((tmp_path / "anew/policy.json").read_text())
    # An export that reused statistics says whose they were, and passes them on.
    again = apply(
        tmp_path / "reuse",
        model=str(tuned),
        out=tmp_path / "again",
        text=text,
        statistics="reuse",
    )
    assert again.metrics == reports["reuse"].metrics


def with_record(run: SearchResult, folder: Path, **changes: object) -> Path:
    """Copy the policy of a run with other things beside it; None takes one away."""
    record = json.loads((run.run_dir / "policy.json").read_text()) | changes
    path = folder / "changed.json"
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
    return path


def test_statistics_that_cannot_be_reused_are_refused(
    pruned: SearchResult, tuned: Path, text: TextConfig, tmp_path: Path
) -> None:
    def refused(policy: Path | Policy, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            apply(
                policy,
                model=str(tuned),
                out=tmp_path / "out",
                text=text,
                statistics="reuse",
            )
        assert not (tmp_path / "out").exists()

    record = json.loads((pruned.run_dir / "policy.json").read_text())
    assert pruned.policy is not None
    refused(pruned.policy, PolicyError, "a policy by itself does not say whose")
    bare = with_record(pruned, tmp_path, model=None)
    refused(bare, PolicyError, "whose statistics could be reused: its 'model' is None")
    half = with_record(pruned, tmp_path, text={"source": "builtin"})
    refused(half, PolicyError, r"its 'text' is \{'source': 'builtin'\}")
    gone = with_record(pruned, tmp_path, model={"source": "/no/where", "revision": ""})
    refused(gone, PolicyError, r"of /no/where cannot be reused: .*no model.*anew")
    changed_model = with_record(
        pruned, tmp_path, model=record["model"] | {"revision": "abc"}
    )
    refused(changed_model, PolicyError, "its model was abc when .* and is .* now")
    changed_text = with_record(
        pruned, tmp_path, text=record["text"] | {"fingerprint": "abc"}
    )
    refused(changed_text, PolicyError, "its text was abc when .* and is .* now")
    actions = {site: "gblm(sparsity=0.5)" for site in pruned.policy}
    steep = with_record(pruned, tmp_path, actions=actions | {"embedding": "dense"})
    refused(steep, MethodError, "gblm reads gradient_square")
    with pytest.raises(ConfigError, match="unknown way of statistics 'reuze'.*'reuse'"):
        apply(
            pruned.run_dir, model=str(tuned), out=tmp_path / "out", statistics="reuze"
        )
    with pytest.raises(PolicyError, match="another depth has other ones"):
        apply(
            pruned.run_dir,
            model=str(tuned),
            out=tmp_path / "out",
            adapt=True,
            statistics="reuse",
        )


def test_a_sibling_of_another_width_cannot_reuse_them(
    pruned: SearchResult, tiny_checkpoint: Path, text: TextConfig, tmp_path: Path
) -> None:
    wide = changed(tiny_checkpoint, tmp_path / "wide", intermediate_size=256)
    message = "gate_proj is 256 x 64.*, and there 128 x 64"
    with pytest.raises(PolicyError, match=message):
        apply(
            pruned.run_dir,
            model=str(wide),
            out=tmp_path / "out",
            text=text,
            statistics="reuse",
        )
    assert not (tmp_path / "out").exists()


def test_an_export_that_gpus_cannot_share_is_refused(
    tiny_checkpoint: Path, text: TextConfig, tmp_path: Path
) -> None:
    policy = policy_with(tiny_checkpoint, text, "rtn(bits=4, group=128)")
    message = "down_proj under rtn.*with 2 GPUs each has 64 of 128 inputs, and 128"
    with pytest.raises(ExportError, match=message):
        apply(
            policy,
            model=str(tiny_checkpoint),
            out=tmp_path / "out",
            text=text,
            tensor_parallel=2,
        )
    assert not (tmp_path / "out").exists()
