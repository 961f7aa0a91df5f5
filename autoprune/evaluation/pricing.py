"""Prices variants while gradients pass: products of gradients and changes of weight."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.models.biases import added_bias, bias_of
from autoprune.models.task import output_layer
from autoprune.models.weights import find_weight, parameter_of, view_of_layer
from autoprune.policy import Layer


@dataclass(frozen=True, eq=False)
class LayerSlopes:
    """What the variants of one layer would change, window by window.

    Attributes:
        kl: Change of each window's mean KL, to first order.
        score: Change of each window's log-likelihood of drawn labels, to first order,
            over the square root of its positions; no rows where none were drawn. Half
            its mean square estimates the second-order change of the KL.
        crossed: What that half mean square would be if gradients had nothing to do with
            what was read: all pairs of sampled positions, ``(g_t · dW x_s)²``. Biased,
            and far less noisy than a few draws. Empty where it was not asked for.
        apart: What that half mean square would be if what a change does to one number
            of the output had nothing to do with what it does to the others: half the
            mean over positions of the sum of ``(g_to (dW x_t)_o)²``. Biased, and less
            noisy by far. Where outputs are not heard, the half mean square itself.
            Empty where it was not asked for.
    """

    kl: Float[Tensor, "windows variants"]
    score: Float[Tensor, "draws variants"]
    crossed: Float[Tensor, " _"] = field(default_factory=lambda: torch.empty(0))
    apart: Float[Tensor, " _"] = field(default_factory=lambda: torch.empty(0))


class Pricing:
    """Takes the products of gradients and changes of weight while they pass by.

    Linear layers are priced window by window, from what they read and the gradient of
    what they gave. Others (embeddings, experts, transposed weights) are priced by
    their parameter's gradient, one figure for all windows that pass together; so where
    there are such, windows pass one by one. Biases that variants bring are priced in
    linear layers; elsewhere (GPT-2's transposed weights) only the weight has a price.

    Args:
        model: The model, with a policy's variants on it.
        variants: For each layer the weights to price.
        sampled: Positions of every pass of drawn labels whose pairs make ``crossed``.
        apart: Also make ``apart`` from drawn labels.

    Attributes:
        counts: Scored positions of each window that is passing.
        of_head: Layers whose parameter is the head's, as a tied embedding's is.
    """

    def __init__(
        self,
        model: nn.Module,
        variants: Mapping[Layer, Sequence[Tensor]],
        *,
        sampled: int = 0,
        apart: bool = False,
    ) -> None:
        self.counts = torch.ones(1)
        self._sampled, self._wants_apart = sampled, apart
        self._crossed: dict[Layer, list[Tensor]] = {layer: [] for layer in variants}
        self._apart: dict[Layer, list[Tensor]] = {layer: [] for layer in variants}
        self._positions = 0
        self._model = model
        self._variants = variants
        named = model.named_modules()
        self._linear = {name: m for name, m in named if isinstance(m, nn.Linear)}
        self._score = False
        self._kl: dict[Layer, list[Tensor]] = {layer: [] for layer in variants}
        self._draws: dict[Layer, list[Tensor]] = {layer: [] for layer in variants}
        head = output_layer(model).weight
        self.of_head = [la for la in variants if self._parameter(la) is head]

    def backward(
        self, features: Tensor, gradient: Tensor, *, keep: bool, score: bool = False
    ) -> None:
        """Send a gradient back through the model, and price what it passes."""
        self._score = score
        if score:
            self._positions += int(self.counts.sum())
        features.backward(gradient.to(features.dtype), retain_graph=keep)

    def sort_draws(self, windows: int, draws: int) -> None:
        """Bring the rows of the windows passed last together, however they passed."""
        count = windows * draws
        for rows in self._draws.values():
            tail = rows[len(rows) - count :]
            rows[len(rows) - count :] = [
                tail[draw * windows + window]
                for window in range(windows)
                for draw in range(draws)
            ]

    def add_of_head(self, gradient: Tensor) -> None:
        """Add the gradient of the mean KL by the head to the windows passed last."""
        for layer in self.of_head:
            change = self._changes(layer).float() @ gradient.flatten()
            for row in self._kl[layer][-len(self.counts) :]:
                row += change

    def result(self) -> dict[Layer, LayerSlopes]:
        """Give all rows so far."""
        found = {}
        for layer, variants in self._variants.items():
            none = torch.empty(0, len(variants))
            kl, draws = self._kl[layer], self._draws[layer]
            score = torch.stack(draws) if draws else none
            slopes = torch.stack(kl) if kl else none
            crossed, apart = self._crossed[layer], self._apart[layer]
            found[layer] = LayerSlopes(slopes, score)
            if crossed:
                pairs = torch.stack(crossed).mean(0)
                found[layer] = replace(found[layer], crossed=pairs)
            if apart:
                each = torch.stack(apart).sum(0) / self._positions
                found[layer] = replace(found[layer], apart=each)
            elif self._wants_apart and draws:
                whole = score.square().mean(0) / 2
                found[layer] = replace(found[layer], apart=whole)
        return found

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to every layer, for a while."""
        by_parameter: dict[nn.Parameter, list[Layer]] = {}
        with ExitStack() as undo:
            for layer in self._variants:
                module = self.module_of(layer)
                if module is None:
                    by_parameter.setdefault(self._parameter(layer), []).append(layer)
                    continue
                handle = module.register_forward_hook(partial(self._hear, layer))
                undo.callback(handle.remove)
            for parameter, layers in by_parameter.items():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_()
                handle = parameter.register_post_accumulate_grad_hook(
                    partial(self._price_parameter, layers)
                )
                undo.callback(handle.remove)
            yield

    def module_of(self, layer: Layer) -> nn.Linear | None:
        """Give the linear module whose weight is the layer's as it stands, if one."""
        if layer in self.of_head:
            return None
        return self._linear.get(layer.name)

    def _parameter(self, layer: Layer) -> nn.Parameter:
        return self._model.get_parameter(parameter_of(layer.name))

    def _hear(
        self, layer: Layer, module: nn.Module, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        if not output.requires_grad:  # no layer before it is priced: a graph begins
            output.requires_grad_()
        output.register_hook(partial(self._price, layer, inputs[0].detach()))

    def _price(self, layer: Layer, read: Tensor, gradient: Tensor) -> None:
        """Price a linear layer: ``gradient`` is that of what it gave."""
        windows = len(self.counts)
        read = read.reshape(windows, -1, read.shape[-1])
        gradient = gradient.reshape(windows, -1, gradient.shape[-1])
        weight = torch.bmm(gradient.transpose(1, 2), read)  # of each window by itself
        rows = (self._changes(layer) @ weight.flatten(1).T).T.float()
        biases = self._bias_changes(layer)
        if biases is not None:
            rows += gradient.float().sum(1) @ biases.T
        if self._score:
            rows = rows / self.counts.sqrt()[:, None]
            if self._sampled:
                self._cross(layer, read.flatten(0, 1), gradient.flatten(0, 1))
            if self._wants_apart:
                self._take_apart(layer, read.flatten(0, 1), gradient.flatten(0, 1))
        self._rows(layer).extend(rows)

    def _cross(
        self,
        layer: Layer,
        read: Float[Tensor, "positions in"],
        gradient: Float[Tensor, "positions out"],
    ) -> None:
        """Square what every sampled gradient makes of every sampled input's change."""
        stride = -(-len(read) // self._sampled)
        read, gradient = read[stride // 2 :: stride], gradient[stride // 2 :: stride]
        changes = self._changes(layer).unflatten(1, (-1, read.shape[1]))
        moved = changes @ read.T.to(changes.dtype)
        biases = self._bias_changes(layer)
        if biases is not None:
            moved = moved + biases.to(moved.dtype)[:, :, None]
        found = (gradient.to(moved.dtype) @ moved).float()
        self._crossed[layer].append(found.square().mean((1, 2)) / 2)

    def _take_apart(
        self,
        layer: Layer,
        read: Float[Tensor, "positions in"],
        gradient: Float[Tensor, "positions out"],
    ) -> None:
        """Square what every number of a gradient makes of that output's own change."""
        changes = self._changes(layer).unflatten(1, (-1, read.shape[1]))
        biases, found = self._bias_changes(layer), []
        for number, change in enumerate(changes):  # one by one: outputs are large
            moved = (read.to(change.dtype) @ change.T).float()
            if biases is not None:
                moved += biases[number]
            found.append(moved.mul_(gradient).square_().sum() / 2)
        self._apart[layer].append(torch.stack(found))

    def _price_parameter(
        self, layers: Sequence[Layer], parameter: nn.Parameter
    ) -> None:
        assert parameter.grad is not None
        windows = len(self.counts)
        # A sum over windows: of the KL their mean is wanted; scores are independent.
        share = 1 / windows
        if self._score:
            share = float(1 / (self.counts.float().mean() * windows).sqrt())
        for layer in layers:
            gradient = view_of_layer(self._model, layer.name, parameter.grad)
            assert gradient is not None
            row = self._changes(layer).float() @ gradient.float().flatten()
            self._rows(layer).extend(row * share for _ in range(windows))
        parameter.grad = None

    def _rows(self, layer: Layer) -> list[Tensor]:
        return self._draws[layer] if self._score else self._kl[layer]

    def _changes(self, layer: Layer) -> Float[Tensor, "variants weights"]:
        """Give what every variant would change on the layer as it stands."""
        now = find_weight(self._model, layer.name)
        assert now is not None
        given = self._variants[layer]
        return torch.stack([(one.to(now.dtype) - now).flatten() for one in given])

    def _bias_changes(self, layer: Layer) -> Float[Tensor, "variants out"] | None:
        """Give what every variant would change on a linear layer's bias, if any."""
        now = added_bias(self._linear[layer.name])
        given = [bias_of(one) for one in self._variants[layer]]
        if now is None and not any(bias is not None for bias in given):
            return None
        none = torch.zeros(layer.shape[0])
        before = none if now is None else now.float()
        return torch.stack([(none if b is None else b.float()) - before for b in given])
