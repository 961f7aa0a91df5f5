"""Exports by the clock, on this machine's processor; predictions of a real profile."""

import json
from pathlib import Path

import pytest
import torch
from test_latency_cli import run as run_command
from tiny_runs import write_text
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import autoprune
from autoprune.config import TextConfig
from autoprune.errors import ConfigError, ExportError, ProfileError
from autoprune.latency.profiles import profiles_that_ship
from autoprune.policy import Action, Policy
from autoprune.proving import Proven, prove
from autoprune.transfer import apply

PROFILE = sorted(profiles_that_ship())[0]


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A model wide enough that products are most of its time."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype=torch.float32,
    )
    folder = tmp_path_factory.mktemp("proving") / "checkpoint"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def exported(checkpoint: Path, out: Path, action: str, target: str) -> Path:
    sites = [
        f"blocks.{i}.{n}" for i in range(2) for n in ("qkv", "o", "gate_up", "down")
    ]
    policy = Policy(
        {"embedding": Action()} | dict.fromkeys(sites, Action.parse(action))
    )
    text = TextConfig(
        source=write_text(checkpoint.parent),
        window=32,
        statistics=2,
        fitness=1,
        choice=1,
        report=1,
    )
    report = apply(policy, model=str(checkpoint), out=out, target=target, text=text)
    return report.folder


def proven(folder: Path) -> Proven:
    return prove(folder, device=PROFILE, workloads=["decode"], seconds=3.0)


@pytest.fixture(scope="module")
def int8(checkpoint: Path) -> Path:
    return exported(checkpoint, checkpoint.parent / "int8", "int8_dynamic", "packed")


def test_an_export_is_loaded_with_kernels_for_a_workload(int8: Path) -> None:
    ids = torch.arange(3, 40)[None]
    plain = autoprune.load(int8)
    fast = autoprune.load(int8, workload="decode", device=PROFILE)
    kinds = {type(module).__name__ for module in fast.modules()}
    assert "KernelLinear" in kinds
    assert "KernelLinear" not in {type(module).__name__ for module in plain.modules()}
    with torch.inference_mode():
        expected, found = (
            model(input_ids=ids).logits.float().log_softmax(-1)
            for model in (plain, fast)
        )
    assert (expected - found).abs().max() < 0.2  # activations are rounded as well
    with pytest.raises(ConfigError, match="unknown workload 'decoding'"):
        autoprune.load(int8, workload="decoding", device=PROFILE)


def test_an_export_runs_on_the_kernels_of_its_formats(int8: Path) -> None:
    found = proven(int8)
    assert all(name.startswith("cpu.int8.") for name in found.kernels)
    assert sum(found.kernels.values()) == 14
    assert [one.phase for one in found.proofs] == ["prefill", "decode"]
    for one in found.proofs:
        assert one.measured_ms > 0 and one.dense_ms > 0
        assert one.interval_ms[0] < one.predicted_ms < one.interval_ms[1]
        assert one.error == pytest.approx(one.predicted_ms / one.measured_ms - 1)
    prefill = found.proofs[0]
    # 8-bit products of 128 tokens: faster on every processor that has units for them.
    assert prefill.predicted_ratio < 0.8


def test_zeros_run_on_the_dense_kernel(checkpoint: Path) -> None:
    out = checkpoint.parent / "zeros"
    folder = exported(checkpoint, out, "magnitude(sparsity=0.5)", "packed")
    found = proven(folder)
    assert found.kernels == {}
    assert {one.predicted_ratio for one in found.proofs} == {1.0}


@pytest.mark.slow
def test_plain_folders_show_their_two_of_four(checkpoint: Path) -> None:
    out = checkpoint.parent / "pattern"
    folder = exported(checkpoint, out, "magnitude(pattern=2:4)", "transformers")
    found = proven(folder)
    assert found.kernels == {}  # no kernel of a processor skips them
    assert {one.predicted_ratio for one in found.proofs} == {1.0}


def test_the_command_prints_predicted_beside_measured(int8: Path) -> None:
    asked = ["--measure-latency", "--device", PROFILE]
    found = run_command("evaluate", int8, *asked, "--json")
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert data["export"]["perplexity"] > 1
    assert len(data["latency"]["proofs"]) == 2


def test_what_cannot_be_run_is_told(checkpoint: Path, int8: Path) -> None:
    with pytest.raises(ProfileError, match="Did you mean 'h100'"):
        prove(int8, device="h10")
    with pytest.raises(ExportError, match="there is no folder"):
        prove(checkpoint / "nothing", device=PROFILE)
