"""A workbench measures policies on a real checkpoint, end to end."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from autoprune.config import TextConfig
from autoprune.errors import (
    ConfigError,
    MethodError,
    ModelError,
    PluginError,
    PolicyError,
    TextError,
)
from autoprune.evaluation.workbench import Workbench
from autoprune.models.checkpoints import load_model
from autoprune.plugins import Plugins, load_plugins
from autoprune.policy import DENSE, Action, Policy

WANDA = Action.parse("wanda(pattern=2:4)")
JOINT = Action.parse("magnitude(sparsity=0.5) + rtn(bits=4, group=16)")


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [
        f"Line {i} says that {i * i} is the square of {i}.\n\n" for i in range(900)
    ]
    path.write_text("".join(lines))
    return f"file:{path}"


def open_bench(
    plugins: Plugins, model: str, text: str, cache: Path, **changes: str
) -> Workbench:
    names = {"task": "causal-lm", "target": "packed"} | changes
    return Workbench.open(
        plugins,
        model=model,
        text=TextConfig(
            source=text, window=32, statistics=6, fitness=4, choice=3, report=2
        ),
        seed=0,
        cache=cache,
        **names,
    )


@pytest.fixture
def bench(
    plugins: Plugins, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> Workbench:
    return open_bench(plugins, str(tiny_checkpoint), text, tmp_path / "cache")


def policy(bench: Workbench, action: Action, *, start: str = "blocks.") -> Policy:
    return Policy(
        {
            site.name: action if site.name.startswith(start) else DENSE
            for site in bench.inventory.sites
        }
    )


def test_everything_is_there_after_opening(bench: Workbench) -> None:
    shapes = {name: tuple(split.ids.shape) for name, split in bench.splits.items()}
    assert shapes == {
        "statistics": (6, 32),
        "fitness": (4, 32),
        "choice": (3, 32),
        "report": (2, 32),
    }
    assert len(bench.layers) == 15
    assert bench.compute_dtype in (torch.float32, torch.bfloat16)
    assert {"model.norm.weight"} <= bench.untouched.keys()
    assert "lm_head.weight" not in bench.untouched  # tied


def test_the_dense_model_measures_as_dense(bench: Workbench) -> None:
    found = bench.dense_metrics("fitness")
    assert found.keys() == bench.metrics.keys()
    assert abs(found["kl"]) < 1e-5
    assert found["quality_drop"] == pytest.approx(0, abs=1e-5)
    assert found["compression_ratio"] == 1.0
    assert found["sparsity"] == found["model_sparsity"] == 0.0
    assert found["bits_per_weight"] == 32.0


def test_perplexity_is_that_of_plain_transformers(
    bench: Workbench, tiny_checkpoint: Path
) -> None:
    model = load_model(bench.checkpoint, dtype=bench.compute_dtype)
    losses = [
        model(ids[None], labels=ids[None]).loss.double()
        for ids in bench.splits["report"].ids
    ]
    expected = float(torch.stack(losses).mean().exp())
    found = bench.dense_metrics("report")["perplexity"]
    exact = bench.compute_dtype is torch.float32
    assert found == pytest.approx(expected, rel=1e-5 if exact else 5e-3)


def test_a_policy_is_measured(bench: Workbench) -> None:
    bank = bench.bank()
    found = bench.measure(policy(bench, JOINT), bank, "fitness")
    values = found.metrics
    assert values["kl"] > 0.01
    assert values["compression_ratio"] > 2
    assert values["gflop_per_token"] < bench.dense_metrics("fitness")["gflop_per_token"]
    assert values["sparsity"] == 0.5
    assert found.quality is not None and found.quality.mean_kl == values["kl"]
    assert found.timings.keys() == {"put_s", "run_s"}
    assert all(seconds > 0 for seconds in found.timings.values())


def test_a_measurement_depends_on_the_policy_alone(bench: Workbench) -> None:
    """Whatever was on the model before, and in whatever order."""
    policies = [
        policy(bench, WANDA),
        policy(bench, DENSE),
        policy(bench, JOINT, start="blocks.1"),
        policy(bench, JOINT, start="embedding"),
    ]
    bank = bench.bank()
    first = [bench.measure(p, bank, "fitness").metrics for p in policies]
    again = [bench.measure(p, bank, "fitness").metrics for p in reversed(policies)]
    assert first == again[::-1]


def test_other_banks_give_other_weights(bench: Workbench) -> None:
    wanted = policy(bench, WANDA)
    dense, propagated = bench.bank(), bench.bank(policy(bench, WANDA))
    one = bench.measure(wanted, dense, "fitness").metrics
    other = bench.measure(wanted, propagated, "fitness").metrics
    assert one["size_bytes"] == other["size_bytes"]
    assert dense.name != propagated.name


def test_metrics_without_a_model_do_not_touch_it(bench: Workbench) -> None:
    names = ["size_bytes", "sparsity"]
    found = bench.measure(policy(bench, WANDA), bench.bank(), "fitness", metrics=names)
    assert list(found.metrics) == names
    assert found.quality is None
    assert set(bench.stitched.actions.values()) == {DENSE}
    assert not list(bench.store.folder.glob("*/*"))
    everything = bench.measure(policy(bench, WANDA), bench.bank(), "fitness").metrics
    assert found.metrics["size_bytes"] == everything["size_bytes"]


def test_a_teacher_is_dense_whatever_is_on_the_model(bench: Workbench) -> None:
    bench.measure(policy(bench, JOINT), bench.bank(), "fitness")
    assert bench.teacher("choice").dense.kl.abs().max() < 1e-5
    found = bench.measure(policy(bench, JOINT), bench.bank(), "choice")
    assert found.metrics["kl"] > 0.01


def test_a_tied_embedding_is_no_second_head(bench: Workbench) -> None:
    assert bench.inventory.tied
    assert bench.scene().head_numel == 0


def test_a_masked_model_is_measured(
    plugins: Plugins, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    """BERT with the tiny tokenizer, whose byte 1 becomes the mask."""
    from tiny_models import tiny
    from transformers import AutoTokenizer

    model = tiny("bert").__class__(
        tiny("bert").config.__class__(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(tmp_path / "bert")
    bench = open_bench(
        plugins, str(tmp_path / "bert"), text, tmp_path / "cache", task="masked-lm"
    )
    assert bench.scene().head_numel == 0
    assert abs(bench.dense_metrics("fitness")["kl"]) < 1e-5
    for start in ("blocks.", "embedding"):
        action = WANDA if start == "blocks." else JOINT
        found = bench.measure(
            policy(bench, action, start=start), bench.bank(), "fitness"
        )
        assert found.metrics["kl"] > 1e-3
        assert math.isfinite(found.metrics["perplexity"])


def test_an_export_gets_what_was_measured(bench: Workbench) -> None:
    wanted, bank = policy(bench, JOINT), bench.bank()
    job = bench.job(wanted, bank)
    assert job.storages == bench.storages(wanted)
    for layer in bench.layers:
        assert job.variant(layer).storage == job.storages[layer]


def test_a_policy_of_another_model_is_refused(bench: Workbench) -> None:
    wanted = Policy({"blocks.0.qkv": WANDA})
    with pytest.raises(PolicyError, match="covers 1 of 9 sites.*'embedding'"):
        bench.measure(wanted, bench.bank(), "fitness")


def test_an_action_that_a_layer_refuses_is_refused(bench: Workbench) -> None:
    wanted = policy(bench, Action.parse("rtn(bits=4, group=48)"))
    with pytest.raises(MethodError, match="q_proj cannot take .*group 48 does not div"):
        bench.measure(wanted, bench.bank(), "fitness")
    on_embedding = policy(bench, WANDA, start="embedding")
    with pytest.raises(
        MethodError, match=r"embed_tokens cannot take 'wanda\(pattern=2"
    ):
        bench.storages(on_embedding)


def test_an_unknown_metric_is_refused(bench: Workbench) -> None:
    with pytest.raises(ConfigError, match="unknown metric 'size_byte'. Did you mean"):
        bench.metric("size_byte")
    with pytest.raises(ConfigError, match="unknown metric 'klx'"):
        bench.measure(
            policy(bench, DENSE), bench.bank(), "fitness", metrics=["kl", "klx"]
        )


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "nowhere"}, ModelError, "nowhere"),
        ({"task": "causal"}, PluginError, "unknown task 'causal'. Did you mean 'caus"),
        (
            {"target": "paked"},
            PluginError,
            "unknown exporter 'paked'. Did you mean 'pa",
        ),
        ({"text": "builtn"}, TextError, "unknown text source 'builtn'. Did you mean"),
        ({"task": "masked-lm"}, ModelError, "cannot load .* as AutoModelForMaskedLM"),
    ],
    ids=["model", "task", "target", "text", "wrong-task"],
)
def test_what_is_not_there_is_named(
    changes: dict[str, str],
    kind: type[Exception],
    message: str,
    plugins: Plugins,
    tiny_checkpoint: Path,
    text: str,
    tmp_path: Path,
) -> None:
    given = {"model": str(tiny_checkpoint), "text": text, "task": "causal-lm"} | changes
    model, source = given.pop("model"), given.pop("text")
    with pytest.raises(kind, match=message):
        open_bench(plugins, model, source, tmp_path, **given)


def test_too_little_text_is_refused(
    plugins: Plugins, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words, no more than that.")
    with pytest.raises(TextError, match="has not one window of 32 tokens"):
        open_bench(plugins, str(tiny_checkpoint), f"file:{short}", tmp_path)


def test_a_changed_model_does_not_find_the_variants_of_the_old_one(
    plugins: Plugins, tiny_checkpoint: Path, text: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    keys = []
    for change in (False, True):
        if change:
            model = load_model(
                open_bench(plugins, str(folder), text, tmp_path).checkpoint
            )
            model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
            model.save_pretrained(folder)
        bench = open_bench(plugins, str(folder), text, tmp_path)
        keys.append(bench.bank().key(bench.layers[1], JOINT))
    assert keys[0] != keys[1]
