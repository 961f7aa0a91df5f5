"""Tokenizers as GGUF tells them, and as transformers reads them from it."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from tiny_gguf import TEXT, byte_tokenizer, piece_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from autoprune.errors import ExportError
from autoprune.targets.gguf_tokenizer import Vocabulary, vocabulary

WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA.replace("{1,3}", "")


def split(rule: str) -> Any:
    one = pre_tokenizers.Split(Regex(rule), "isolated")
    return pre_tokenizers.Sequence([one, BYTES])


def reread(vocabulary: Vocabulary, folder: Path) -> Any:
    """Write the key-values alone, and let transformers read them."""
    writer = GGUFWriter(folder / "model.gguf", "llama")
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")


def test_tokens_types_and_merges() -> None:
    tokenizer = byte_tokenizer()
    found = vocabulary(tokenizer, 320)
    assert (found.model, found.pre) == ("gpt2", "smollm")
    size = len(tokenizer)
    assert found.tokens[:3] == ["<end>", "<start>", "<unk>"]
    assert found.types[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert found.tokens[size - 1] == "[tag]"
    assert found.types[size - 1] == TokenType.USER_DEFINED
    assert found.tokens[size] == f"[PAD{size}]"
    assert set(found.types[size:]) == {TokenType.UNUSED}
    assert len(found.tokens) == len(found.types) == 320
    ids = tokenizer.get_vocab()
    assert [found.tokens[ids[token]] for token in ids] == list(ids)
    left, right = found.merges[0].split(" ")
    assert left + right in ids
    assert found.special == {"eos": 0, "bos": 1, "unknown": 2}
    assert found.flags == {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": False,
    }
    assert found.template is not None and "messages" in found.template


def test_transformers_reads_merges_of_bytes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(WORDS)  # single digits it would not split off
    found = vocabulary(tokenizer, len(tokenizer))
    assert found.pre == "gpt-2"
    read = reread(found, tmp_path)
    assert read(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert read.eos_token == "<end>" and read.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("space", [True, False])
def test_transformers_reads_pieces(space: bool, tmp_path: Path) -> None:
    tokenizer = piece_tokenizer(space=space)
    found = vocabulary(tokenizer, len(tokenizer))
    assert found.model == "llama" and not found.merges
    assert found.flags["add_space_prefix"] is space
    assert found.flags["add_bos_token"] is True
    assert found.types[0] == TokenType.UNKNOWN and found.types[3] == TokenType.BYTE
    read = reread(found, tmp_path)
    text = "the cat sat on the ñandú"
    plain = read(text, add_special_tokens=False).input_ids
    wanted = tokenizer(text, add_special_tokens=False).input_ids
    first = 0 if space else 1  # transformers puts a space before the first word always
    assert plain[first:] == wanted[first:]
    assert len(plain) == len(wanted) > 10


@pytest.mark.parametrize(
    ("rule", "ignore", "name"),
    [(LLAMA, True, "llama-bpe"), (QWEN, False, "qwen2")],
)
def test_splitting_rules_by_their_expression(
    rule: str, ignore: bool, name: str
) -> None:
    tokenizer = byte_tokenizer(split(rule))
    tokenizer.backend_tokenizer.model.ignore_merges = ignore
    assert vocabulary(tokenizer, 320).pre == name
    tokenizer.backend_tokenizer.model.ignore_merges = not ignore
    with pytest.raises(ExportError, match="by a rule that is none of llama.cpp's"):
        vocabulary(tokenizer, 320)


def no_end(tokenizer: Any) -> None:
    tokenizer.eos_token = None


def lower(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def other_words(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def before_spaces(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_end, "no token that ends a text"),
        (lower, "splits or normalizes"),
        (other_words, '"Whitespace"'),
        (before_spaces, '"add_prefix_space": true'),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused(change: Any, message: str) -> None:
    tokenizer = byte_tokenizer()
    change(tokenizer)
    with pytest.raises(ExportError, match=message):
        vocabulary(tokenizer, 320)


def test_other_kinds_and_sizes_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ExportError, match="type 'WordLevel' with 0 merges"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=words), 320)
    with pytest.raises(ExportError, match=r"has ids up to \d+, the embedding 100 rows"):
        vocabulary(byte_tokenizer(), 100)
    with pytest.raises(ExportError, match="has no tokenizer.json"):
        vocabulary(object(), 100)


def test_pieces_with_other_spaces_are_refused() -> None:
    tokenizer = piece_tokenizer(space=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "_")
    with pytest.raises(ExportError, match="writes spaces otherwise than Sentence"):
        vocabulary(tokenizer, 400)
