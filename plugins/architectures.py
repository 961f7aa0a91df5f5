"""Where the blocks and sites of the usual model families are."""

from collections.abc import Sequence

from autoprune.hookspecs import hookimpl
from autoprune.models.layers import Architecture, SiteRule

_ATTENTION = (
    SiteRule("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    SiteRule("o", ("self_attn.o_proj",)),
)

_GATED = (
    *_ATTENTION,
    SiteRule("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    SiteRule("down", ("mlp.down_proj",)),
)

LLAMA = Architecture(
    "llama",
    (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "smollm3",
        "granite",
        "olmo2",
        "gemma",
        "gemma2",
        "gemma3_text",
    ),
    "model.layers",
    _GATED,
    "model.embed_tokens",
)
"""Decoders with q, k, v, o and a gated MLP, under Llama's names."""

GEMMA3 = Architecture(
    "gemma3",
    ("gemma3",),
    "model.language_model.layers",
    _GATED,
    "model.language_model.embed_tokens",
)
"""Gemma 3 with its vision tower, which stays untouched."""

MIXTRAL = Architecture(
    "mixtral",
    ("mixtral", "qwen3_moe", "olmoe", "gpt_oss"),
    "model.layers",
    (
        *_ATTENTION,
        SiteRule("experts.gate_up", ("mlp.experts.gate_up_proj",)),
        SiteRule("experts.down", ("mlp.experts.down_proj",)),
    ),
    "model.embed_tokens",
)
"""Mixtures of experts, all stored in two parameters; the router stays untouched."""

GPT2 = Architecture(
    "gpt2",
    ("gpt2",),
    "transformer.h",
    (
        SiteRule("qkv", ("attn.c_attn",)),
        SiteRule("o", ("attn.c_proj",)),
        SiteRule("up", ("mlp.c_fc",)),
        SiteRule("down", ("mlp.c_proj",)),
    ),
    "transformer.wte",
)
"""GPT-2, whose q, k and v are one matrix."""

OPT = Architecture(
    "opt",
    ("opt",),
    "model.decoder.layers",
    (
        _ATTENTION[0],
        SiteRule("o", ("self_attn.out_proj",)),
        SiteRule("up", ("fc1",)),
        SiteRule("down", ("fc2",)),
    ),
    "model.decoder.embed_tokens",
)
"""OPT."""

BERT = Architecture(
    "bert",
    ("bert",),
    "bert.encoder.layer",
    (
        SiteRule(
            "qkv",
            ("attention.self.query", "attention.self.key", "attention.self.value"),
        ),
        SiteRule("o", ("attention.output.dense",)),
        SiteRule("up", ("intermediate.dense",)),
        SiteRule("down", ("output.dense",)),
    ),
    "bert.embeddings.word_embeddings",
)
"""BERT with any head on top: masked language modelling, classification."""


@hookimpl
def register_architectures() -> Sequence[Architecture]:
    """Return the descriptions of the usual model families."""
    return [LLAMA, GEMMA3, MIXTRAL, GPT2, OPT, BERT]
