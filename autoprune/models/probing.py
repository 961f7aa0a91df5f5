"""One block of a model, run again and again with answers of its layers replaced."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.block_call import SEED, call_of, hidden_of
from autoprune.models.loading import first_line
from autoprune.models.weights import MATRICES, view_of_layer


@dataclass(frozen=True, eq=False)
class Seen:
    """What happened in one run of a block.

    Attributes:
        read: What each layer read, by path, in the order in which they ran first.
        gave: What each layer gave.
        times: How often each layer ran.
        source: For each layer, the first one that read the very same tensor.
        after: The hidden states that the block gave.
    """

    read: Mapping[str, Float[Tensor, "tokens in"]]
    gave: Mapping[str, Float[Tensor, "*tokens out"]]
    times: Mapping[str, int]
    source: Mapping[str, str]
    after: Tensor


class BlockProbe:
    """Runs a block on a few tokens, as its model would.

    Args:
        model: The model, in evaluation mode; it is not changed.
        path: Path of the block.

    Attributes:
        block: The block itself.
        first: What happens if nothing is replaced.
        ran: Paths of the layers that run exactly once, in their order.
        idle: Paths of all other layers.

    Raises:
        ModelError: If the model does not run on tokens alone, or the block does not
            give the same when it is run by itself again.
    """

    def __init__(self, model: nn.Module, path: str) -> None:  # noqa: D107 see above
        self.block = model.get_submodule(path)
        self._layers = {
            name: module
            for name, module in self.block.named_modules()
            if isinstance(module, MATRICES)
        }
        self._generator = torch.Generator().manual_seed(SEED)
        self._call = call_of(model, path)
        self.first = self.run()
        times = self.first.times
        self.ran = tuple(name for name in self.first.read if times[name] == 1)
        self.idle = tuple(name for name in self._layers if name not in self.ran)
        if not torch.equal(self.run().after, self.first.after):
            raise ModelError(
                f"{path!r} gives something else, or NaN, when it is run again. Put the "
                "model in evaluation mode"
            )

    @torch.no_grad()
    def run(
        self,
        answers: Mapping[str, Tensor] | None = None,
        *,
        hidden: Tensor | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Seen:
        """Run the block.

        Args:
            answers: What some layers give instead of what they compute.
            hidden: What enters the block instead of the model's hidden states.
            weights: Parameters that stand in for the block's own, by path.

        Raises:
            ModelError: If the block cannot be run so.
        """
        seen: list[tuple[str, Tensor, Tensor, Tensor]] = []
        handles = [
            module.register_forward_hook(
                partial(_watch, seen, name, answers or {}), with_kwargs=True
            )
            for name, module in self._layers.items()
        ]
        args, kwargs = self._call.fresh(hidden)
        try:
            output = torch.func.functional_call(
                self.block, dict(weights or {}), args, kwargs
            )
        except Exception as error:  # a foreign block refuses as it may
            raise ModelError(
                f"a {type(self.block).__name__} cannot be run by itself: "
                f"{first_line(error)}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return _seen(seen, hidden_of(output))

    def frozen(
        self,
        answers: Mapping[str, Tensor] | None = None,
        *,
        hidden: Tensor | None = None,
    ) -> Seen:
        """Run the block while all other layers answer as in the first run.

        What changes then has not passed through any of them.
        """
        held = {name: self.first.gave[name] for name in self.ran}
        return self.run({**held, **(answers or {})}, hidden=hidden)

    def altered(
        self,
        layer: str,
        *,
        rows: Bool[Tensor, " out"] | None = None,
        tokens: int | None = None,
    ) -> Float[Tensor, "*tokens out"]:
        """Give what a layer gave, with noise of the same size in some of it.

        Args:
            layer: Its path.
            rows: Which of its rows; all by default.
            tokens: In how many of the first tokens; in all by default.
        """
        gave = self.first.gave[layer]
        noisy = self._noise(gave).view(-1, gave.shape[-1])
        lines = gave.reshape(noisy.shape)
        if rows is not None:
            noisy = torch.where(rows.to(lines.device), noisy, lines)
        if tokens is not None:
            noisy = torch.cat([noisy[:tokens], lines[tokens:]])
        return noisy.view(gave.shape)

    def altered_hidden(self) -> Float[Tensor, "*tokens hidden"]:
        """Give other hidden states of the same size to enter the block."""
        return self._noise(self._call.hidden)

    def zeroed(
        self, layer: str, lines: Bool[Tensor, " lines"], *, axis: str
    ) -> dict[str, Tensor]:
        """Give a layer's parameters without some rows or columns.

        Args:
            layer: Its path.
            lines: True for those that are zeros.
            axis: ``rows``, whose biases go too, or ``columns``.
        """
        module: Any = self._layers[layer]
        weight = module.weight.detach().clone()
        view, lines = view_of_layer(self.block, layer, weight), lines.to(weight.device)
        assert view is not None, layer
        found = {f"{layer}.weight": weight}
        if axis == "columns":
            view[:, lines] = 0
            return found
        view[lines] = 0
        if module.bias is not None:
            found[f"{layer}.bias"] = module.bias.detach().masked_fill(lines, 0)
        return found

    def rows(self, layer: str) -> int:
        """Count the rows of a layer."""
        return self.first.gave[layer].shape[-1]

    def _noise(self, like: Tensor) -> Tensor:
        size = like.float().square().mean().sqrt()
        noise = torch.randn(like.shape, generator=self._generator).to(size.device)
        return (noise * (size if size > 0 else 1.0)).to(like.dtype)


def _watch(
    seen: list[tuple[str, Tensor, Tensor, Tensor]],
    name: str,
    answers: Mapping[str, Tensor],
    module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> Tensor | None:
    if not isinstance(output, Tensor):  # a router that only looks like a layer
        return None
    read = args[0] if args else next(iter(kwargs.values()))
    gives = answers.get(name, output)
    # The tensor itself is kept too: no other one can take its place in memory then.
    flat = read.reshape(-1, read.shape[-1]).clone()
    seen.append((name, read, flat, gives.clone()))
    return gives.clone() if name in answers else None


def _seen(seen: list[tuple[str, Tensor, Tensor, Tensor]], after: Tensor) -> Seen:
    source: dict[str, str] = {}
    times: dict[str, int] = {}
    for name, live, read, _ in seen:
        times[name] = times.get(name, 0) + 1
        alike = (
            first
            for first, other, before, _ in seen
            if other.data_ptr() == live.data_ptr() and torch.equal(before, read)
        )
        source.setdefault(name, next(alike, name))
    read_by = {name: read for name, _, read, _ in seen}
    return Seen(read_by, {n: g for n, _, _, g in seen}, times, source, after)
