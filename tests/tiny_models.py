"""A tiny random model of every family that is described, made offline."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

_LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts_per_tok": 2}
_SLIDING = {"sliding_window": 4}
_KINDS = ["sliding_attention", "full_attention"]
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | _SLIDING,
    "qwen2": _LLAMA | {"tie_word_embeddings": True},
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "olmo2": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _SLIDING | {"layer_types": _KINDS},
    "gemma3_text": _LLAMA | _SLIDING | {"layer_types": _KINDS},
    "gemma3": {
        "text_config": _LLAMA | _SLIDING | {"layer_types": _KINDS},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
    },
    "mixtral": _LLAMA | _EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": _LLAMA | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24},
    "olmoe": _LLAMA | _EXPERTS | {"num_experts": 4},
    "gpt_oss": _LLAMA
    | _EXPERTS
    | {"num_local_experts": 4, "rope_parameters": {"rope_type": "default"}},
    "gpt2": _GPT2 | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
    "opt": _LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bert": _LLAMA,
}
"""Settings of a small model, by model type."""


def tiny(kind: str, **changes: Any) -> PreTrainedModel:
    """Make the model of a type, the same at every call."""
    settings = CONFIGS[kind] | changes
    if kind in ("gpt2", "opt", "bert"):
        names = ("head_dim", "num_key_value_heads", "intermediate_size")
        unknown = names if kind == "opt" else names[:2]
        settings = {k: v for k, v in settings.items() if k not in unknown}
    config = AutoConfig.for_model(kind, **settings)
    factory = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global one
        torch.manual_seed(0)
        model = factory.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros would hide a bias that is left out
                torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)
