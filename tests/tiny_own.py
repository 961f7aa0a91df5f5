"""A transformer that no library knows: every name in it is its own.

Also a plugin, so that a fresh process can load it; it describes nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from autoprune import hookimpl
from autoprune.models.architecture import Architecture


class OwnConfig(PreTrainedConfig):
    """Sizes, under names of their own."""

    model_type = "own_transformer"

    def __init__(
        self,
        words: int = 64,
        width: int = 32,
        inner: int = 48,
        depth: int = 2,
        queries: int = 4,
        groups: int = 2,
        **others: Any,
    ) -> None:
        self.words, self.width, self.inner, self.depth = words, width, inner, depth
        self.queries, self.groups = queries, groups
        super().__init__(**others)


class Norm(nn.Module):
    """Divides by the root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Piece(nn.Module):
    """A block: groups of queries that share keys and values, and a gated MLP."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.queries, self.groups = config.queries, config.groups
        narrow = config.width // config.queries * config.groups
        self.first, self.second = Norm(config.width), Norm(config.width)
        self.ask = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, narrow)
        self.tell = nn.Linear(config.width, narrow, bias=False)
        self.mix = nn.Linear(config.width, config.width, bias=False)
        self.door = nn.Linear(config.width, config.inner, bias=False)
        self.wide = nn.Linear(config.width, config.inner, bias=False)
        self.back = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.first(x)
        each = self.queries // self.groups
        q = self.ask(h).view(batch, length, self.groups, each, -1)
        k = self.key(h).view(batch, length, self.groups, -1)
        v = self.tell(h).view(batch, length, self.groups, -1)
        scores = torch.einsum("biged,bjgd->bgeij", q, k) / q.shape[-1] ** 0.5
        chances = scores.masked_fill(mask, -torch.inf).softmax(-1)
        mixed = torch.einsum("bgeij,bjgd->biged", chances, v)
        x = x + self.mix(mixed.reshape(batch, length, -1))
        h = self.second(x)
        return x + self.back(functional.silu(self.door(h)) * self.wide(h))


class OwnBase(PreTrainedModel):
    """What all of them share."""

    config_class = OwnConfig
    base_model_prefix = "trunk"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.2)


class OwnTrunk(OwnBase):
    """The model without its head."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.words, config.width)
        self.pieces = nn.ModuleList(Piece(config) for _ in range(config.depth))
        self.last = Norm(config.width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.table(input_ids)
        for piece in self.pieces:
            x = piece(x, mask.to(x.device))
        return BaseModelOutput(last_hidden_state=self.last(x))


class OwnForCausalLM(OwnBase):
    """The model with a head of its own."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.trunk = OwnTrunk(config)
        self.speak = nn.Linear(config.width, config.words, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.table

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(
            logits=self.speak(self.trunk(input_ids).last_hidden_state)
        )


AutoConfig.register(OwnConfig.model_type, OwnConfig, exist_ok=True)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM, exist_ok=True)


def own_model(**changes: Any) -> OwnForCausalLM:
    """Make the model, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OwnForCausalLM(OwnConfig(**changes))
    return model.eval().requires_grad_(False)


@hookimpl
def register_architectures() -> list[Architecture]:
    """Return nothing: what there is to say is traced."""
    return []
