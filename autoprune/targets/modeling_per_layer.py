# SPDX-License-Identifier: Apache-2.0
"""A decoder whose blocks have widths of their own.

AutoPrune puts this file beside the weights that it cuts. transformers reads it where
``trust_remote_code=True`` allows it; AutoPrune's own loader first checks that not a
byte of it has changed. It computes what Llama and Mistral compute, in their own code.

What a block has otherwise than the rest stands in ``per_layer_config`` of the
configuration, by the number of the block: ``intermediate_size``,
``num_attention_heads``, ``num_key_value_heads``; ``biases``, the linear layers that
have one; and ``skip``, where ``attention`` or ``mlp`` are left out.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)


class PerLayerConfig(MistralConfig):
    """The configuration: Mistral's, with biases."""

    model_type = "autoprune_per_layer"
    biases: list[str] | None = None

    @property
    def layer_types(self) -> list[str]:
        """Tell the cache of transformers which blocks have no keys and values.

        ``moe`` is its word for a block without an attention of its own.
        """
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        skips = [getattr(block, "skip", ()) for block in self.per_layer_config]
        return ["moe" if "attention" in skip else kind for skip in skips]


class NoChannels(nn.Module):
    """Stands where an MLP was left out, and adds nothing to the hidden state."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Give a zero."""
        return hidden_states.new_zeros(())


class NoHeads(nn.Module):
    """The same for an attention, which gives its weights as well.

    It is not called one: transformers would look in this file for how it is computed.
    """

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """Give a zero, and no weights."""
        return hidden_states.new_zeros(()), None


class PerLayerBlock(MistralDecoderLayer):
    """A block as wide as its part of the configuration says."""

    def __init__(self, config: PerLayerConfig, layer_idx: int) -> None:
        own: Any = config.per_layer_config[layer_idx]
        super().__init__(own, layer_idx)
        # A change of the attention's implementation reaches the common one only.
        self.self_attn.config = config
        for name in own.biases or ():
            part = self.self_attn if hasattr(self.self_attn, name) else self.mlp
            rows, columns = getattr(part, name).weight.shape
            part.add_module(name, nn.Linear(columns, rows, bias=True))
        skip = getattr(own, "skip", ())
        if "attention" in skip:
            self.add_module("input_layernorm", nn.Identity())
            self.add_module("self_attn", NoHeads())
        if "mlp" in skip:
            self.add_module("post_attention_layernorm", nn.Identity())
            self.add_module("mlp", NoChannels())


class PerLayerModel(MistralModel):
    """The decoder without its head."""

    config_class = PerLayerConfig
    _no_split_modules = ["PerLayerBlock"]

    def __init__(self, config: PerLayerConfig) -> None:
        # Mistral's own would ask for a width that all blocks have.
        MistralPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, config.pad_token_id
        )
        blocks = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([PerLayerBlock(config, index) for index in blocks])
        self.norm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MistralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PerLayerForCausalLM(MistralForCausalLM):
    """The decoder with its head over the words of the vocabulary."""

    config_class = PerLayerConfig
    _no_split_modules = ["PerLayerBlock"]

    def __init__(self, config: PerLayerConfig) -> None:
        MistralPreTrainedModel.__init__(self, config)
        self.model = PerLayerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
