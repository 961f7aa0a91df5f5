"""Shows what layers read while a model runs, without changing what it gives."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from autoprune.errors import ModelError
from autoprune.models.kinds import rows_of
from autoprune.models.weights import expert_of
from autoprune.policy import Layer

OnInput = Callable[[str, Tensor], None]
"""Called with ``Layer.input`` and the activations ``[tokens, in]`` of a batch."""


@contextmanager
def watching(
    model: nn.Module, layers: Mapping[str, Layer], on_input: OnInput
) -> Iterator[None]:
    """Show what layers read, for a while.

    Args:
        model: The model.
        layers: For each input, one of the layers that read it.
        on_input: Called with every batch of activations.

    Raises:
        ModelError: In the forward pass, if experts do not work as those of
            transformers.
    """
    experts: dict[str, list[tuple[str, str, int]]] = {}
    handles = []
    for name, layer in layers.items():
        if expert := expert_of(layer.name):
            path, parameter, index = expert
            experts.setdefault(path, []).append((name, parameter, index))
            continue
        hook = partial(_show, on_input, name)
        module = model.get_submodule(layer.name)
        handles.append(module.register_forward_pre_hook(hook))
    for path, wanted in experts.items():
        hook = partial(_show_experts, on_input, wanted)
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fitted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Give inputs as a model computes: those that are no whole numbers in its type."""
    dtype = next(model.parameters()).dtype
    return {
        name: one.to(dtype)
        if isinstance(one, Tensor) and one.is_floating_point()
        else one
        for name, one in inputs.items()
    }


def _show(on_input: OnInput, name: str, module: nn.Module, args: Any) -> None:
    on_input(name, rows_of(module, args[0]))


def _show_experts(
    on_input: OnInput,
    wanted: Sequence[tuple[str, str, int]],
    module: Any,
    args: Any,
    kwargs: Any,
) -> None:
    """Show what each expert reads, before transformers computes them all at once."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if len(given) < 3 or not hasattr(module, "_apply_gate"):
        raise ModelError(
            f"cannot tell what each expert of a {type(module).__name__} reads: "
            "expected hidden states, chosen experts and their weights as arguments, "
            f"and the gate of transformers' experts; found {sorted(given)}"
        )
    hidden, chosen = list(given.values())[:2]
    for name, parameter, index in wanted:
        routed = hidden[(chosen == index).any(-1)]
        if routed.shape[0]:
            down = parameter == "down_proj"
            on_input(name, _activation(module, index, routed) if down else routed)


def _activation(
    experts: Any, index: int, routed: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, "tokens in"]:
    """Compute what an expert's down projection reads."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    weight = getattr(experts, name)[index]
    bias = getattr(experts, f"{name}_bias")[index] if experts.has_bias else None
    out = functional.linear(
        routed, weight.t() if experts.is_transposed else weight, bias
    )
    activation: Tensor = (
        experts._apply_gate(out) if experts.has_gate else experts.act_fn(out)
    )
    return activation
