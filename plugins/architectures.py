"""Where the blocks and sites of the usual model families are."""

from collections.abc import Sequence

from autoprune.hookspecs import hookimpl
from autoprune.models.architecture import (
    Architecture,
    HiddenRule,
    SiteRule,
    StructureRule,
)

_ATTENTION = (
    SiteRule("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    SiteRule("o", ("self_attn.o_proj",)),
)

_GATED = (
    *_ATTENTION,
    SiteRule("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    SiteRule("down", ("mlp.down_proj",)),
)

_EXPERTS = (
    *_ATTENTION,
    SiteRule("experts.gate_up", ("mlp.experts.gate_up_proj",)),
    SiteRule("experts.down", ("mlp.experts.down_proj",)),
)

_HEADS = StructureRule(
    "attention",
    "heads",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
)

_CHANNELS = StructureRule(
    "mlp", "channels", ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
)

_HIDDEN = HiddenRule(
    ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"),
    (
        ("input_layernorm", _HEADS.makers),
        ("post_attention_layernorm", _CHANNELS.makers),
    ),
    (*_HEADS.takers, *_CHANNELS.takers),
    "model.norm",
)
"""Not for Gemma, which scales embeddings by their width and norms what is added."""

LLAMA = Architecture(
    "llama",
    (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "smollm3",
        "granite",
        "gemma",
        "gemma2",
        "gemma3_text",
    ),
    "model.layers",
    _GATED,
    "model.embed_tokens",
    (_HEADS, _CHANNELS),
    _HIDDEN,
)
"""Decoders with q, k, v, o and a gated MLP, under Llama's names."""

OLMO2 = Architecture(
    "olmo2", ("olmo2",), "model.layers", _GATED, "model.embed_tokens", (_CHANNELS,)
)
"""OLMo 2 norms queries and keys over all heads together: none can go alone."""

GEMMA3 = Architecture(
    "gemma3",
    ("gemma3",),
    "model.language_model.layers",
    _GATED,
    "model.language_model.embed_tokens",
    (_HEADS, _CHANNELS),
)
"""Gemma 3 with its vision tower, which stays untouched."""

MIXTRAL = Architecture(
    "mixtral",
    ("mixtral", "qwen3_moe", "gpt_oss"),
    "model.layers",
    _EXPERTS,
    "model.embed_tokens",
    (_HEADS,),
)
"""Mixtures of experts, all stored in two parameters; the router stays untouched."""

OLMOE = Architecture(
    "olmoe", ("olmoe",), "model.layers", _EXPERTS, "model.embed_tokens", ()
)
"""OLMoE, with OLMo's norms and Mixtral's experts: it has no structure."""

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
    (StructureRule("mlp", "channels", ("mlp.c_fc",), ("mlp.c_proj",)),),
)
"""GPT-2, whose q, k and v are one matrix: its heads are no structure here."""

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
    (
        StructureRule("attention", "heads", _HEADS.makers, ("self_attn.out_proj",)),
        StructureRule("mlp", "channels", ("fc1",), ("fc2",)),
    ),
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
    (
        StructureRule(
            "attention",
            "heads",
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            ("attention.output.dense",),
        ),
        StructureRule("mlp", "channels", ("intermediate.dense",), ("output.dense",)),
    ),
)
"""BERT with any head on top: masked language modelling, classification."""


@hookimpl
def register_architectures() -> Sequence[Architecture]:
    """Return the descriptions of the usual model families."""
    return [LLAMA, OLMO2, GEMMA3, MIXTRAL, OLMOE, GPT2, OPT, BERT]
