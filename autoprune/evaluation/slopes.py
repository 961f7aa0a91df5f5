"""What every variant would change, to first order, from one backward pass.

At a compressed model the gradient ``g`` of the KL to the dense model is far from zero.
``<g, W_variant - W_now>`` then prices every variant of a layer at once. Gradients of
``log q(y)`` with labels ``y`` that the model itself draws give what grows with the
square of a change: half their mean square is the diagonal of the KL's second-order term
(the Gauss-Newton matrix is the Fisher matrix of the model at which it is taken).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from autoprune.evaluation.teacher import Teacher
from autoprune.models.statistics import exact_products
from autoprune.models.task import output_layer
from autoprune.models.weights import find_weight, parameter_of, view_of_layer
from autoprune.policy import Layer

GROUP = 2048
"""Tokens that pass at a time: what a backward pass has to hold grows with them."""


@dataclass(frozen=True, eq=False)
class LayerSlopes:
    """What the variants of one layer would change, window by window.

    Attributes:
        kl: Change of each window's mean KL, to first order.
        score: Change of each window's log-likelihood of drawn labels, to first order,
            over the square root of its positions; no rows where none were drawn. Half
            its mean square estimates the second-order change of the KL.
        positions: Mean number of scored positions of a window.
    """

    kl: Float[Tensor, "windows variants"]
    score: Float[Tensor, "draws variants"]
    positions: float = 1.0


def measure_slopes(
    model: nn.Module,
    teacher: Teacher,
    variants: Mapping[Layer, Sequence[Float[Tensor, "out in"]]],
    windows: Sequence[int],
    *,
    draws: int = 0,
    seed: int = 0,
) -> dict[Layer, LayerSlopes]:
    """Price variants by the gradient at a model as it stands.

    Args:
        model: The model, with a policy's variants on it; left as it was.
        teacher: The dense model on a split.
        variants: For each layer the weights to price.
        windows: Indices of the windows of the split that the gradient is taken on.
        draws: How often labels are drawn for every window.
        seed: Of the labels.

    Returns:
        Slopes of every layer's variants, in their order.
    """
    generator = torch.Generator().manual_seed(seed)
    pricing = _Pricing(model, variants)
    # What is priced by its parameter's gradient has one figure for all that pass.
    whole = all(pricing.module_of(layer) for layer in variants)
    group = max(1, GROUP // teacher.windows.ids.shape[1]) if whole else 1
    with pricing.listening(), torch.enable_grad():
        for at in range(0, len(windows), group):
            part = list(windows[at : at + group])
            batch = teacher.batch_of(part)
            features = teacher.task.features(model, batch)
            counts = batch.scored.sum(1)
            pricing.pass_windows(counts)
            pull, of_head = teacher.pull(
                model, features, part, head=bool(pricing.of_head)
            )
            # The pull is that of the mean; each window's own is as many times larger.
            pricing.backward(features, pull * len(part), keep=draws > 0)
            if of_head is not None:
                pricing.add_of_head(of_head)
            sizes = counts.tolist()
            chances = [torch.rand(draws, n, generator=generator) for n in sizes]
            for draw, chance in enumerate(torch.cat(chances, 1)):
                push = _push(teacher, model, features, chance)
                pricing.backward(features, push, keep=draw < draws - 1, score=True)
            pricing.sort_draws(len(part), draws)
    return pricing.result()


def _push(
    teacher: Teacher,
    model: nn.Module,
    features: Float[Tensor, "positions hidden"],
    chance: Float[Tensor, " positions"],
) -> Float[Tensor, "positions hidden"]:
    """Give the gradient of the log-likelihood of labels that the model draws itself.

    Args:
        teacher: The dense model.
        model: The model.
        features: What its head reads.
        chance: Where in the model's distribution each label lies, from 0 to 1: one
            number a position, so that how windows pass together changes no label.
    """
    leaf = features.detach().requires_grad_()
    with exact_products(features):
        for rows, logits in teacher.task.head(model).in_chunks(leaf):
            log_q = logits.log_softmax(-1)
            below = log_q.detach().exp().cumsum(-1)
            at = chance[rows, None] * below[:, -1:]
            drawn = torch.searchsorted(below, at).clamp_(max=below.shape[1] - 1)
            log_q.gather(1, drawn).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


class _Pricing:
    """Takes the products of gradients and changes of weight while they pass by.

    Linear layers are priced window by window, from what they read and the gradient of
    what they gave. Others (embeddings, experts, transposed weights) are priced by
    their parameter's gradient, one figure for all windows that pass together; so where
    there are such, windows pass one by one.

    Attributes:
        counts: Scored positions of each window that is passing.
        of_head: Layers whose parameter is the head's, as a tied embedding's is.
    """

    def __init__(
        self, model: nn.Module, variants: Mapping[Layer, Sequence[Tensor]]
    ) -> None:
        self.counts = torch.ones(1)
        self._seen: list[Tensor] = []
        self._model = model
        self._variants = variants
        named = model.named_modules()
        self._linear = {name: m for name, m in named if isinstance(m, nn.Linear)}
        self._score = False
        self._kl: dict[Layer, list[Tensor]] = {layer: [] for layer in variants}
        self._draws: dict[Layer, list[Tensor]] = {layer: [] for layer in variants}
        head = output_layer(model).weight
        self.of_head = [la for la in variants if self._parameter(la) is head]

    def pass_windows(self, counts: Tensor) -> None:
        """Take note of the scored positions of the windows that pass next."""
        self.counts = counts
        self._seen.append(counts)

    def backward(
        self, features: Tensor, gradient: Tensor, *, keep: bool, score: bool = False
    ) -> None:
        """Send a gradient back through the model, and price what it passes."""
        self._score = score
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
        positions = float(torch.cat(self._seen).float().mean()) if self._seen else 1.0
        for layer, variants in self._variants.items():
            none = torch.empty(0, len(variants))
            kl, draws = self._kl[layer], self._draws[layer]
            score = torch.stack(draws) if draws else none
            slopes = torch.stack(kl) if kl else none
            found[layer] = LayerSlopes(slopes, score, positions)
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
        if self._score:
            rows = rows / self.counts.sqrt()[:, None]
        self._rows(layer).extend(rows)

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
