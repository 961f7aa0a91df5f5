"""What every test may ask for. Heavy imports are late, so that collecting is quick."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Before torch and the hub's client are imported, because both read them only then.
# One thread: the same bits on every machine, and no waiting for cores that are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The user's cache is never touched, whatever the environment says. Here, not in a
# fixture: doctests of the package do not see the fixtures of this folder.
_CACHE = tempfile.TemporaryDirectory(prefix="autoprune-tests-")
os.environ["AUTOPRUNE_CACHE"] = _CACHE.name


LONGEST = {"test_kills.py", "test_cli.py", "test_run.py", "test_workers.py"}
"""Files that take a minute or more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, since a file's tests stay in one process."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def rng() -> "torch.Generator":
    """A seeded generator, for everything random in a test."""
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def tiny_model() -> "LlamaForCausalLM":
    """A random Llama of 2 blocks, the same at every call; a test may change it."""
    return _tiny_model()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of bytes: ids 0 to 255 are the bytes, 0 ends a text."""
    return _tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ``tiny_model`` and ``tiny_tokenizer``; read only, copy to change."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    _tiny_model().save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)
    return folder


def _tiny_model() -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,  # so that compression shows in the logits
        bos_token_id=0,
        eos_token_id=0,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global one
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def _tiny_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's letters for bytes: printable ones stand for themselves, the others
    # follow in order from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    end = letters[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, model_max_length=256
    )
