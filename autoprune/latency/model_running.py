"""Builds the whole models that are recorded, with random weights, and their passes.

They are transformers' own models; a compressed matrix is multiplied by the very product
that the kernel's points are taken of. Keys and values lie in a cache of fixed size, as
a captured graph needs it: a decode step attends to all of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.errors import ProfileError
from autoprune.latency.kernels import KERNELS, Kernel
from autoprune.latency.running import dtype_of, halved, product
from autoprune.latency.shape import DENSE
from autoprune.latency.timing import Call
from autoprune.latency.whole_models import (
    ATTENTION,
    MLP,
    TWO_OF_FOUR,
    UNSTRUCTURED,
    Step,
    Variation,
)

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

Tune = Callable[[Kernel, int, int, int], int]
"""Gives the algorithm for a kernel's product of ``n``, ``k`` and ``m``."""

PREFERRED = {"int8": "cpu.int8.x86"}
"""Where a format has several kernels on a CPU, the one that models are built with."""


class KernelLinear(nn.Module):
    """A linear layer that multiplies by a kernel of ours.

    Args:
        kernel: The kernel.
        weight: The weight as it is.
    """

    def __init__(self, kernel: Kernel, weight: Float[Tensor, "n k"]) -> None:
        super().__init__()
        self.kernel, self.sizes = kernel, tuple(weight.shape)
        self.product = product(kernel, weight)
        self._dtype = dtype_of(kernel)

    def forward(self, x: Float[Tensor, "*tokens k"]) -> Float[Tensor, "*tokens n"]:
        """Multiply activations with the weight."""
        found = self.product(x.reshape(-1, x.shape[-1]).to(self._dtype))
        return found.view(*x.shape[:-1], -1).to(x.dtype)


def config_of(variation: Variation) -> "LlamaConfig":
    """Describe a variation to transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=variation.vocabulary,
        hidden_size=variation.hidden,
        intermediate_size=variation.width,
        num_hidden_layers=variation.blocks,
        num_attention_heads=variation.heads,
        num_key_value_heads=variation.kv_heads,
        head_dim=variation.head_dim,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


def build_model(
    variation: Variation, device: str, generator: torch.Generator
) -> "LlamaForCausalLM":
    """Build a model with random weights.

    Args:
        variation: What to build.
        device: ``cuda`` or ``cpu``.
        generator: Where chance comes from, on that device.

    Raises:
        ProfileError: If a format has no kernel here.
    """
    from transformers import LlamaForCausalLM
    from transformers.initialization import no_init_weights

    with _in_type(getattr(torch, variation.dtype)), torch.device(device):
        with no_init_weights():
            model = LlamaForCausalLM(config_of(variation))
    model.train(False).requires_grad_(False)
    model.lm_head.register_forward_pre_hook(_packed_rows)
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=generator)
        for layer in model.model.layers:
            _compress(layer.self_attn, ATTENTION, variation.attention, variation)
            _compress(layer.mlp, MLP, variation.mlp, variation)
    return model


def _packed_rows(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Give the head the last positions side by side.

    Cut out of a prompt they lie apart, and torch would rather copy the whole weight
    than these few rows: in bfloat16 on a CPU that took longer than all blocks.
    """
    return (inputs[0].clone(memory_format=torch.contiguous_format),)


def _compress(
    parent: nn.Module, names: tuple[str, ...], form: str, variation: Variation
) -> None:
    """Put zeros into a part's matrices, or replace them by those of another format."""
    for name in names:
        linear: Any = getattr(parent, name)
        if variation.zeros == UNSTRUCTURED:
            middle = linear.weight.abs().float().median()
            linear.weight.masked_fill_(linear.weight.abs() < middle, 0.0)
        elif variation.zeros == TWO_OF_FOUR:
            linear.weight.copy_(halved(linear.weight))
        if form != DENSE:
            kernel = kernel_for(form, linear.weight.device.type, variation.dtype)
            weight = linear.weight.float()
            weight = halved(weight) if kernel.sparse else weight
            setattr(parent, name, KernelLinear(kernel, weight))


def kernel_for(form: str, device: str, dtype: str) -> Kernel:
    """Choose the kernel of a format.

    Raises:
        ProfileError: If there is none on that device in that type.
    """
    found = [
        kernel
        for kernel in KERNELS.values()
        if (kernel.format, kernel.device, kernel.dtype) == (form, device, dtype)
    ]
    if not found:
        raise ProfileError(f"no kernel multiplies {form} on {device} in {dtype}")
    preferred = [kernel for kernel in found if kernel.name == PREFERRED.get(form)]
    return (preferred or found)[0]


def tune(model: nn.Module, tokens: int, algorithm: Tune) -> None:
    """Let products that have a choice of algorithm run the best for so many tokens."""
    for module in model.modules():
        if isinstance(module, KernelLinear) and hasattr(module.product, "algorithm"):
            n, k = module.sizes
            module.product.algorithm = algorithm(module.kernel, n, k, tokens)


def pass_of(model: "LlamaForCausalLM", step: Step, generator: torch.Generator) -> Call:
    """Make a pass ready to be run again and again.

    Args:
        model: The model.
        step: A prefill of prompts, or the decode of one token for each sequence.
        generator: Where the tokens come from.
    """
    device = generator.device
    length = step.context if step.op == "model_prefill" else 1
    tokens = torch.randint(
        0,
        model.config.vocab_size,
        (step.batch, length),
        generator=generator,
        device=device,
    )
    cache = _full_cache(model, step.context, length, generator)

    def run() -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(
                tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            return found

    return run


def _full_cache(
    model: "LlamaForCausalLM", size: int, new: int, generator: torch.Generator
) -> Any:
    """Make a cache of random keys and values, of which a pass writes the last again.

    transformers' own cache would move on, and after a few passes write past its end.

    Args:
        model: The model.
        size: Tokens in the cache.
        new: How many of them a pass writes.
        generator: Where chance comes from.
    """
    from transformers.cache_utils import Cache, StaticLayer

    places = torch.arange(size - new, size, device=generator.device)

    class Pinned(StaticLayer):  # type: ignore[no-untyped-call]
        """Keys and values of one layer."""

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            fresh = not self.is_initialized
            if fresh:
                self.lazy_initialization(key_states, value_states)
            assert self.keys is not None and self.values is not None
            if fresh:
                self.keys.normal_(generator=generator)
                self.values.normal_(generator=generator)
            self.keys.index_copy_(2, places, key_states)
            self.values.index_copy_(2, places, value_states)
            return self.keys, self.values

        def get_seq_length(self) -> int:
            return size - new

    count = model.config.num_hidden_layers
    return Cache(layers=[Pinned(max_cache_len=size) for _ in range(count)])


@contextmanager
def _in_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
