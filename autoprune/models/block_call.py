"""How a model calls one of its blocks, caught while it runs on a few tokens."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from autoprune.errors import ModelError
from autoprune.models.loading import first_line

TOKENS = 8
"""Enough for an activation that cuts off to let something pass."""

SEED = 0


class _Left(Exception):  # noqa: N818 - ends a forward pass, no error
    """Leaves a forward pass as soon as the block has run."""


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What a model gives a block.

    Attributes:
        args: Positional arguments; hidden states are the first, if there are any.
        kwargs: All others.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states."""
        found: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def fresh(
        self, hidden: Tensor | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copy the arguments, which a block may change in place.

        Args:
            hidden: Takes the place of the hidden states.
        """
        args, kwargs = _fresh(self.args), _fresh(dict(self.kwargs))
        if hidden is not None and args:
            args = (hidden, *args[1:])
        elif hidden is not None:
            kwargs["hidden_states"] = hidden
        return args, kwargs


def call_of(model: nn.Module, path: str) -> BlockCall:
    """Catch how a model calls a block.

    Args:
        model: The model, in evaluation mode; it runs on a few random tokens.
        path: Path of the block.

    Raises:
        ModelError: If it does not run on tokens alone, hands over no hidden states, or
            reads more than hidden states of what the block gives.
    """
    block, calls = model.get_submodule(path), list[BlockCall]()
    outputs: list[Any] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(BlockCall(_fresh(args), _fresh(kwargs)))

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _Left

    entering = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with _hooked(block, leave), suppress(_Left):
            _run_body(model)
    finally:
        entering.remove()
    if calls:
        args, kwargs = calls[0].args, calls[0].kwargs
        if isinstance(args[0] if args else kwargs.get("hidden_states"), Tensor):
            if any(isinstance(one, Tensor) for one in _extras(outputs[0])):
                _check_extras(model, block)
            return calls[0]
    raise ModelError(
        f"{type(model).__name__} does not hand hidden states to a "
        f"{type(block).__name__} as its first argument"
    )


def hidden_of(output: Any) -> Tensor:
    """Give the hidden states of what a block gave, or the first tensor of a model's.

    Raises:
        ModelError: If it is none.
    """
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ModelError(f"expected hidden states, found a {type(output).__name__}")
    return output


def _check_extras(model: nn.Module, block: nn.Module) -> None:
    """Make sure that nobody reads what a block gives beside hidden states.

    Attentions of old families are given to people who ask for them; anything else
    would tie the block to others.
    """

    def blur(_: nn.Module, args: Any, output: Any) -> Any:
        zeros = (o * 0 if isinstance(o, Tensor) else o for o in _extras(output))
        return (output[0], *zeros)

    before = hidden_of(_run_body(model))
    with _hooked(block, blur):
        after = hidden_of(_run_body(model))
    if not torch.equal(before, after):
        raise ModelError(
            f"more than hidden states goes on from a {type(block).__name__} to others"
        )


def _extras(output: Any) -> tuple[Any, ...]:
    return tuple(output[1:]) if isinstance(output, tuple) else ()


@contextmanager
def _hooked(block: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _run_body(model: Any) -> Any:
    """Run a model's body on a few tokens, the same at every call."""
    try:
        words = model.get_input_embeddings().weight.shape[0]
    except Exception as error:  # there are several ways to have none
        raise ModelError(
            f"{type(model).__name__} does not tell its token embedding: "
            f"{first_line(error)}"
        ) from error
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(words, (1, TOKENS), generator=generator)
    body: nn.Module = getattr(model, "base_model", model)
    options = {}
    if "use_cache" in inspect.signature(body.forward).parameters:
        options["use_cache"] = False
    try:
        with torch.no_grad():
            return body(ids.to(next(model.parameters()).device), **options)
    except _Left:
        raise
    except Exception as error:  # a foreign model refuses as it may
        raise ModelError(
            f"{type(body).__name__} does not run on tokens alone: {first_line(error)}"
        ) from error


def _fresh(value: Any) -> Any:
    """Copy tensors; leave out keys and values of earlier tokens, which pile up."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Cache):
        return None
    if type(value) in (tuple, list):
        return type(value)(map(_fresh, value))
    if type(value) is dict:
        return {name: _fresh(one) for name, one in value.items()}
    return value
