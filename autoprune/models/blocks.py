"""A model run block by block, so that only one block's activations are ever held."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.inputs import OnInput, fitted, watching
from autoprune.models.layers import Inventory
from autoprune.policy import Layer

Hidden = Sequence[Float[Tensor, "_ ..."]]
"""Hidden states of all windows, batch by batch: ``[windows, length, hidden]`` where
windows are tokens, ``[windows, channels, height, width]`` where they are images."""


class _Entered(Exception):
    """Leaves a forward pass as soon as the block of interest is reached."""


@dataclass(frozen=True, eq=False)
class _Call:
    """How a model calls a block, but for the hidden states.

    Attributes:
        named: True if the hidden states came by keyword.
        args: Positional arguments after them.
        kwargs: All other arguments: position embeddings, masks.
        extra: How much more than hidden states the block gives, in a tuple; None if it
            gives them bare.
    """

    named: bool
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    extra: int | None = None


class BlockRunner:
    """Runs a model's blocks one at a time, over all windows.

    What a block is given beside hidden states (position embeddings, masks, which differ
    between sliding and full attention) is recorded once per size of batch, in one
    ordinary forward pass.

    Args:
        model: The model, in evaluation mode; a causal decoder or an encoder.
        inventory: Its blocks and layers.
        ids: Windows: of tokens, or of what the feed of the inventory reads.
        batch: Windows that pass a block at a time.
    """

    def __init__(  # noqa: D107 described above
        self,
        model: nn.Module,
        inventory: Inventory,
        ids: Int[Tensor, "windows length"],
        *,
        batch: int = 8,
    ) -> None:
        self._inventory = inventory
        self._model = model
        # The body of a model, without its head: what blocks need, and no more.
        self._body: nn.Module = getattr(model, "base_model", model)
        self._blocks = [model.get_submodule(path) for path in inventory.blocks]
        self._ids = ids.to(next(model.parameters()).device)
        self._batches = torch.split(self._ids, batch)
        self._calls: dict[int, list[_Call]] = {}

    @torch.no_grad()
    def start(self) -> list[Float[Tensor, "_ ..."]]:
        """Give the hidden states that enter block 0, without running any block.

        Raises:
            ModelError: If what block 0 is given beside them differs between batches of
                one shape: such a model cannot be run block by block.
        """
        hidden = []
        for ids in self._batches:
            entered, call = self._enter(ids)
            if not _same(call, self._recorded(len(ids))[0]):
                raise ModelError(
                    f"cannot run {type(self._model).__name__} block by block: what "
                    f"{self._inventory.blocks[0]!r} is given beside hidden states "
                    "depends on the tokens"
                )
            hidden.append(entered)
        return hidden

    @torch.no_grad()
    def run(self, block: int, hidden: Hidden) -> list[Float[Tensor, "_ ..."]]:
        """Give the hidden states after a block; ``hidden`` enters it."""
        return [self.forward(block, entering) for entering in hidden]

    def forward(
        self, block: int, hidden: Float[Tensor, "windows ..."]
    ) -> Float[Tensor, "windows ..."]:
        """Run any windows through a block, with gradients where they are enabled.

        Args:
            block: Index of the block.
            hidden: What enters it; no more windows than there are tokens for.
        """
        call = self._recorded(len(hidden))[block]
        if call.named:
            output = self._blocks[block](hidden_states=hidden, **call.kwargs)
        else:
            output = self._blocks[block](hidden, *call.args, **call.kwargs)
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after

    def collect(
        self,
        block: int,
        hidden: Hidden,
        on_input: OnInput,
        *,
        inputs: Collection[str] | None = None,
    ) -> list[Float[Tensor, "_ ..."]]:
        """Run a block and show what its layers read.

        Args:
            block: Index of the block.
            hidden: What enters it.
            on_input: Called once per input and batch with the activations of all
                tokens; for an expert with those of the tokens routed to it, and not at
                all where there are none. It must not change them.
            inputs: Names of the inputs to show; all by default.

        Returns:
            The hidden states after the block, the same as ``run`` gives.

        Raises:
            ModelError: If experts do not work as those of transformers.
        """
        first: dict[str, Layer] = {}
        for layer in self._inventory.layers:
            wanted = layer.input is not None and layer.block == block
            if wanted and (inputs is None or layer.input in inputs):
                first.setdefault(str(layer.input), layer)
        with watching(self._model, first, on_input):
            return self.run(block, hidden)

    @torch.no_grad()
    def finish(self, hidden: Hidden) -> list[Float[Tensor, "_ ..."]]:
        """Give the model's last hidden states, as its head reads them.

        They may be narrower than those between blocks, as in the OPT-350m.

        Args:
            hidden: What leaves the last block.

        Raises:
            ModelError: If the model's body gives no ``last_hidden_state``.
        """
        finished = []
        for ids, leaving in zip(self._batches, hidden, strict=True):
            calls = self._recorded(len(ids))
            answers = {
                block: partial(_answer, _in_form(leaving, call))
                for block, call in zip(self._blocks, calls, strict=True)
            }
            with answering(answers):
                output = self._run_body(ids)
            if getattr(output, "last_hidden_state", None) is None:
                raise ModelError(
                    f"{type(self._body).__name__} gives no last_hidden_state but a "
                    f"{type(output).__name__}; its final norm cannot be found"
                )
            finished.append(output.last_hidden_state)
        return finished

    def _run_body(self, ids: Int[Tensor, "_ length"]) -> Any:
        if feed := self._inventory.feed:
            return self._body(**fitted(self._model, feed(ids)))
        options = {}
        if "use_cache" in inspect.signature(self._body.forward).parameters:
            options["use_cache"] = False  # keys and values would pile up
        return self._body(ids, **options)

    def _enter(self, ids: Int[Tensor, "_ length"]) -> tuple[Tensor, _Call]:
        """Give the hidden states and the call that enter block 0."""
        entered: list[tuple[Tensor, _Call]] = []

        def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
            entered.append(_split(module, args, kwargs))
            raise _Entered

        handle = self._blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._run_body(ids)
        except _Entered:
            pass
        finally:
            handle.remove()
        return entered[0]

    @torch.no_grad()
    def _recorded(self, windows: int) -> list[_Call]:
        """Give the call of every block for a batch of so many windows."""
        if windows not in self._calls:
            calls: dict[int, _Call] = {}

            def record(
                index: int, module: nn.Module, args: Any, kwargs: Any, output: Any
            ) -> None:
                extra = len(output) - 1 if isinstance(output, tuple) else None
                calls[index] = replace(_split(module, args, kwargs)[1], extra=extra)

            handles = [
                block.register_forward_hook(partial(record, i), with_kwargs=True)
                for i, block in enumerate(self._blocks)
            ]
            # What a block is given does not depend on what the one before it computed,
            # so only the first of each kind is run, to see in which form it answers.
            kinds = [type(block) for block in self._blocks]
            first = [kinds.index(kind) for kind in kinds]
            skipped = {
                block: partial(_pass_on, block, calls, first[index])
                for index, block in enumerate(self._blocks)
                if first[index] < index
            }
            try:
                with answering(skipped):
                    self._run_body(self._ids[:windows])
            finally:
                for handle in handles:
                    handle.remove()
            every = [calls[index] for index in range(len(self._blocks))]
            self._calls[windows] = every
        return self._calls[windows]


def _split(module: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, _Call]:
    """Part a block's arguments into the hidden states and the others."""
    if args and isinstance(args[0], Tensor):
        return args[0], _Call(False, args[1:], kwargs)
    if not args and isinstance(kwargs.get("hidden_states"), Tensor):
        rest = {
            name: value for name, value in kwargs.items() if name != "hidden_states"
        }
        return kwargs["hidden_states"], _Call(True, (), rest)
    raise ModelError(
        f"cannot run a {type(module).__name__} by itself: expected hidden states as "
        f"its first argument, found {len(args)} positional ones and {sorted(kwargs)}"
    )


def _same(one: Any, other: Any) -> bool:
    """Compare arguments; objects that cannot be compared count as the same."""
    if isinstance(one, _Call):
        return _same((one.args, one.kwargs), (other.args, other.kwargs))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    plain = isinstance(one, bool | int | float | str)
    return type(one) is type(other) and (not plain or bool(one == other))


@contextmanager
def answering(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let blocks answer in another way for a while."""
    # Only an attribute of the instance spares the blocks' own work and still lets the
    # model do what it does before and after them.
    before = {block: vars(block).get("forward") for block in forwards}
    for block, forward in forwards.items():
        vars(block)["forward"] = forward
    try:
        yield
    finally:
        for block, own in before.items():
            del vars(block)["forward"]
            if own is not None:
                vars(block)["forward"] = own


def _pass_on(
    block: nn.Module, calls: Mapping[int, _Call], alike: int, *args: Any, **kwargs: Any
) -> Any:
    """Give what enters a block, in the form in which block ``alike`` answers."""
    return _in_form(_split(block, args, kwargs)[0], calls[alike])


def _in_form(hidden: Tensor, call: _Call) -> Any:
    return hidden if call.extra is None else (hidden, *[None] * call.extra)


def _answer(answer: Any, *args: Any, **kwargs: Any) -> Any:
    return answer
