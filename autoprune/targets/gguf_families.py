"""Which models llama.cpp runs, under which architecture, and what it asks of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gguf import MODEL_ARCH, get_tensor_name_map

from autoprune.compression.storage import Part
from autoprune.models.layers import Inventory
from autoprune.targets.gguf_blocks import VALUES

_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """What llama.cpp makes of a type of models.

    Attributes:
        model_class: The class of transformers.
        arch: The architecture.
        paired: True if it rotates neighbouring rows of queries and keys together, where
            transformers takes rows that are half a head apart.
        heads: True if queries may be wider or narrower than the hidden state.
        biased: Roles of layers that may have a bias.
        uneven: The architecture for blocks of different widths; None if there is none.
        factors: True if it takes ``ROPE_FACTORS``.
        known: True if transformers loads a GGUF file into the same class.
    """

    model_class: str
    arch: MODEL_ARCH
    paired: bool = False
    heads: bool = True
    biased: tuple[str, ...] = _QKV
    uneven: MODEL_ARCH | None = None
    factors: bool = False
    known: bool = True


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        MODEL_ARCH.LLAMA,
        paired=True,
        biased=(*_QKV, "o_proj", *_MLP),
        uneven=MODEL_ARCH.DECI,
        factors=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        MODEL_ARCH.LLAMA,
        paired=True,
        biased=(*_QKV, "o_proj", *_MLP),
        uneven=MODEL_ARCH.DECI,
        factors=True,
        known=False,  # as gguf has no such architecture, which transformers looks up
    ),
    "qwen2": Family("Qwen2ForCausalLM", MODEL_ARCH.QWEN2, heads=False),
    "qwen3": Family("Qwen3ForCausalLM", MODEL_ARCH.QWEN3),
}
"""By the type that a configuration names."""


def family_of(config: Any) -> Family:
    """Look up what llama.cpp makes of a model; of others as of a Llama."""
    return FAMILIES.get(str(getattr(config, "model_type", None)), FAMILIES["llama"])


def rope(config: Any) -> dict[str, Any]:
    """Give the settings of the rotary embedding."""
    return dict(getattr(config, "rope_parameters", None) or {})


def head_dim(config: Any) -> int:
    """Count the rows of one head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


@cache
def names_of(arch: MODEL_ARCH, blocks: int) -> Any:
    """Give the translation of names, for so many blocks."""
    return get_tensor_name_map(arch, blocks)


def named(names: Any, name: str) -> str:
    """Translate the name of a tensor; as it is where GGUF has no word for it."""
    return str(names.get_name(name, try_suffixes=(".weight", ".bias")) or name)


def misfit(
    model: Any, inventory: Inventory, untouched: Mapping[str, Part]
) -> str | None:
    """Say what of a model llama.cpp could not run as it is, or None.

    Args:
        model: The model; its weights are not looked at.
        inventory: Its layers.
        untouched: Its other tensors.
    """
    config, family = model.config, family_of(model.config)
    kind = str(getattr(config, "model_type", None))
    if kind not in FAMILIES or family.model_class != type(model).__name__:
        return (
            f"the target gguf writes models of the types {', '.join(FAMILIES)}, not "
            f"{kind!r} as {type(model).__name__}. The target packed writes any model"
        )
    settings = rope(config)
    allowed = ("default", "linear", *(("llama3",) if family.factors else ()))
    if settings.get("rope_type", "default") not in allowed:
        return (
            f"its rotary embedding is of the type {settings['rope_type']!r}, written "
            f"are {', '.join(allowed)}. The target packed writes any model"
        )
    wide = head_dim(config) * config.num_attention_heads
    checks = {
        "hidden_act": config.hidden_act == "silu",
        "partial_rotary_factor": settings.get("partial_rotary_factor", 1.0) == 1.0,
        "head_dim": family.heads or wide == config.hidden_size,
    }
    if wrong := [one for one, fits in checks.items() if not fits]:
        found = settings.get(wrong[0], getattr(config, wrong[0], None))
        return (
            f"its {wrong[0]} is {found!r}, which llama.cpp's {kind} does not run. The "
            "target packed writes any model"
        )
    return _unknown_parts(inventory, untouched, family)


def _unknown_parts(
    inventory: Inventory, untouched: Mapping[str, Part], family: Family
) -> str | None:
    arch = family.arch.name.lower()
    names = names_of(family.arch, len(inventory.blocks))
    layers = [f"{layer.name}.weight" for layer in inventory.layers]
    for tensor in (*untouched, *layers):
        stem, _, last = tensor.rpartition(".")
        odd = last == "bias" and stem.rpartition(".")[2] not in family.biased
        if odd or named(names, tensor) == tensor:
            return f"llama.cpp's {arch} has no place for its tensor {tensor!r}"
    dtypes = {part.dtype for part in untouched.values()}
    dtypes |= {layer.dtype for layer in inventory.layers}
    if odd_types := sorted(dtypes - VALUES.keys()):
        return f"it has tensors in {odd_types[0]}, written are {', '.join(VALUES)}"
    known = {(group.kind, group.layers[0].block) for group in inventory.groups}
    for block in range(len(inventory.blocks)):
        if not known >= {("heads", block), ("channels", block)}:
            return f"the heads or channels of its block {block} are not known"
    return None
