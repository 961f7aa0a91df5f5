"""Tiny models with tokenizers that llama.cpp knows, and policies of all kinds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from autoprune_plugins.drop import Drop
from autoprune_plugins.fp8 import Fp8
from autoprune_plugins.hqq import Hqq
from autoprune_plugins.magnitude import Magnitude
from autoprune_plugins.microscaling import Mxfp4
from autoprune_plugins.rtn import RoundToNearest
from autoprune_plugins.units import Channels, Heads
from tiny_exports import Case, case_of
from tiny_models import tiny
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from autoprune.compression.actions import Actions
from autoprune.compression.method import Source
from autoprune.compression.structured import StructuredMethod
from autoprune.compression.variant import Variant
from autoprune.models.layers import read_weight, write_weight
from autoprune.models.statistics import NO_STATISTICS
from autoprune.policy import Action, Layer, Site

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": None,
}
"""Widths that 32 divides; a group of heads is 32 columns of the output projection."""

TEXT = "The cat sat on 2 mats; the 13 rats ran. It's naïve, isn't it?\n  Yes!"
"""Digits, contractions, spaces, letters beyond ASCII: where splitting rules differ."""

_METHODS = (
    Channels(),
    Heads(),
    Drop(),
    RoundToNearest(),
    Magnitude(),
    Hqq(),
    Mxfp4(),
    Fp8(),
)
ACTIONS = Actions({method.name: method for method in _METHODS})


def byte_tokenizer(splitter: Any = None) -> PreTrainedTokenizerFast:
    """Train merges of bytes on a line of text; ids 0 to 2 are special, 3 a tag."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<end>", "<start>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    tokenizer.add_tokens([AddedToken("[tag]", normalized=False)])
    names = {"eos_token": special[0], "bos_token": special[1], "unk_token": special[2]}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def piece_tokenizer(*, space: bool) -> PreTrainedTokenizerFast:
    """Make a tokenizer of pieces with bytes to fall back on, as SentencePiece does.

    Args:
        space: Whether a text gets a space before it.
    """
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("t", "h"), ("th", "e"), ("a", "t"), ("▁", "the"), ("▁", "c"), ("o", "n")]
    words += [left + right for left, right in merges]
    words += sorted({"▁", *"abcdefghijklmnopqrstuvwxyz"})
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁")] if space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def gguf_case(
    kind: str,
    folder: Path,
    policy: dict[str, str] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: Any = None,
    **changes: Any,
) -> Case:
    """Put actions on sites or structures of a tiny model; the others stay dense.

    Args:
        kind: Type of the model.
        folder: Where the dense model is put.
        policy: Actions by the names of sites; ``*`` for all that are no structures.
        dtype: Of the dense model.
        tokenizer: Its tokenizer; one of bytes by default.
        **changes: Other settings of the model.
    """
    tiny(kind, **{**SIZES, **changes}).to(dtype).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    case = case_of(folder, "AutoModelForCausalLM", ["dense"])
    found = case.job.inventory
    sites = {site.name: site for site in (*found.sites, *found.groups)}
    variants = {layer: case.job.variant(layer) for layer in case.job.storages}
    for name, text in (policy or {}).items():
        for site in found.sites if name == "*" else [sites[name]]:
            for layer, variant in _made(case, site, Action.parse(text)).items():
                write_weight(case.model, layer, variant.weight)
                variants[layer] = variant
    storages = {layer: variant.storage for layer, variant in variants.items()}
    job = replace(case.job, storages=storages, variant=variants.__getitem__)
    return replace(case, job=job)


def _made(case: Case, site: Site, action: Action) -> dict[Layer, Variant]:
    made = [Variant.dense(read_weight(case.dense, la).clone()) for la in site.layers]
    for step in action.steps:
        method, settings = ACTIONS.method(step), [ACTIONS.settings(step)]
        sources = [Source(*pair) for pair in zip(site.layers, made, strict=True)]
        if isinstance(method, StructuredMethod):
            made = [one[0] for one in method.compress_site(sources, {}, settings)]
        else:
            made = [
                method.compress([one], NO_STATISTICS, settings)[0][0] for one in sources
            ]
    return dict(zip(site.layers, made, strict=True))
