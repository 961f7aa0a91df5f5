"""Gradients of the model's own loss by the weights of its layers.

They come from whole-model passes, a window at a time, and are added up while they pass:
one float32 tensor a layer and kind, and no parameter keeps a gradient of its own.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from autoprune.models.computing import computing_in
from autoprune.models.statistics import exact_products
from autoprune.models.task import Task
from autoprune.models.weights import parameter_of, read_weight, view_of_layer
from autoprune.policy import Layer

SUMS = frozenset({"gradient", "gradient_square"})
"""What is added up while gradients of the loss pass by."""

GRADIENTS = SUMS | {"hessian_gradient", "synaptic_flow"}
"""What a method may need of a layer's gradients, beside ``STATISTICS``."""

TEMPERATURE = 200.0
"""What GraSP divides logits by (arXiv:2002.07376, the authors' code)."""

STEP = 1e-6
"""Length of the step of a Hessian's product, over that of all weights.

Of SmolLM2-135M the product is then 0.1 % off a double backward pass; with steps ten
times as long, where gradients bend, it is 10 % off, with shorter ones, which float32
rounds away, 0.3 % (measured).
"""

Hear = Callable[[Layer, Float[Tensor, "out in"]], None]
"""Is given a layer and its gradient; not to be kept."""


@dataclass(frozen=True, eq=False)
class LayerGradients:
    """What is known of the gradients by one layer's weight, in float32.

    Attributes:
        windows: Number of windows; the loss of each is the mean over its positions.
        mean: Mean over the windows; None if not gathered.
        square_sum: Sum over the windows of the squares; None if not gathered.
        hessian_gradient: The Hessian times the gradient, ``H g``, over all layers of
            the blocks, of the loss with logits over ``TEMPERATURE``; None if not.
        flow: Gradient of SynFlow's ``R`` by the weights' sizes; None if not gathered.
    """

    windows: int
    mean: Float[Tensor, "out in"] | None = None
    square_sum: Float[Tensor, "out in"] | None = None
    hessian_gradient: Float[Tensor, "out in"] | None = None
    flow: Float[Tensor, "out in"] | None = None


@dataclass(frozen=True, eq=False)
class TaskLoss:
    """The loss that a model has on its task: mean negative log-likelihood, in nats.

    Attributes:
        task: What the model is for.
        tokenizer: Its tokenizer.
    """

    task: Task
    tokenizer: Any

    def backward(
        self,
        model: nn.Module,
        ids: Int[Tensor, "windows length"],
        *,
        temperature: float = 1.0,
    ) -> None:
        """Send back the gradient of the mean loss over all scored positions.

        Args:
            model: The model as it stands; parameters that require it get gradients.
            ids: Some windows.
            temperature: What logits are divided by.
        """
        with torch.enable_grad():
            batch = self.task.batch(ids, self.tokenizer)
            features = self.task.features(model, batch)
            leaf = features.detach().requires_grad_()
            head, count = self.task.head(model), len(batch.labels)
            with exact_products(features):
                # Chunk by chunk: no more than one chunk's logits exist at a time.
                for rows, logits in head.in_chunks(leaf):
                    loss = functional.cross_entropy(
                        logits / temperature, batch.labels[rows], reduction="sum"
                    )
                    (loss / count).backward()
            assert leaf.grad is not None
            features.backward(leaf.grad)


@contextmanager
def listening(
    model: nn.Module, layers: Collection[Layer], hear: Hear
) -> Iterator[None]:
    """Hand every layer's gradient on as soon as a backward pass has it, for a while.

    Other parameters need no gradient meanwhile, and none is kept.
    """
    by_parameter: dict[nn.Parameter, list[Layer]] = {}
    for layer in layers:
        parameter = model.get_parameter(parameter_of(layer.name))
        by_parameter.setdefault(parameter, []).append(layer)
    with ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(parameter in by_parameter)
        for parameter, own in by_parameter.items():
            handle = parameter.register_post_accumulate_grad_hook(
                partial(_hand_on, model, own, hear)
            )
            undo.callback(handle.remove)
        yield


def _hand_on(
    model: nn.Module, layers: Sequence[Layer], hear: Hear, parameter: nn.Parameter
) -> None:
    assert parameter.grad is not None
    for layer in layers:
        gradient = view_of_layer(model, layer.name, parameter.grad)
        assert gradient is not None, layer.name
        hear(layer, gradient)
    parameter.grad = None


@dataclass(eq=False)
class _Sums:
    """Sums of the gradients of one layer, as they pass by."""

    total: Tensor | None
    squares: Tensor | None

    @classmethod
    def of(cls, layer: Layer, needs: Collection[str]) -> "_Sums":
        def empty(name: str) -> Tensor | None:
            return torch.zeros(layer.shape) if name in needs else None

        return cls(empty("gradient"), empty("gradient_square"))

    def add(self, gradient: Float[Tensor, "out in"]) -> None:
        """Add the gradient of one window's loss, in any float type."""
        full = gradient.float()
        if self.total is not None:
            self.total += full
        if self.squares is not None:
            self.squares.addcmul_(full, full)


def loss_gradients(
    model: nn.Module,
    loss: TaskLoss,
    ids: Int[Tensor, "windows length"],
    needs: Mapping[Layer, Collection[str]],
) -> dict[Layer, LayerGradients]:
    """Gather the gradients of the loss: their mean, or the sum of their squares.

    One window passes at a time, whatever is asked for, so that the same bits come out.

    Args:
        model: The model as it stands; left as it was.
        loss: Its loss.
        ids: The windows.
        needs: For each layer, names out of ``SUMS``; others are passed over.
    """
    sums = {layer: _Sums.of(layer, own) for layer, own in needs.items()}
    with listening(model, sums, lambda layer, gradient: sums[layer].add(gradient)):
        for window in ids.split(1):
            loss.backward(model, window)
    count = len(ids)
    return {
        layer: LayerGradients(
            count, None if own.total is None else own.total / count, own.squares
        )
        for layer, own in sums.items()
    }


def hessian_gradients(
    model: nn.Module,
    loss: TaskLoss,
    ids: Int[Tensor, "windows length"],
    layers: Collection[Layer],
    along: Collection[Layer],
    *,
    temperature: float = TEMPERATURE,
) -> dict[Layer, Float[Tensor, "out in"]]:
    """Multiply the Hessian of the loss with its gradient.

    By central differences: ``H g = (g(w + e g) - g(w - e g)) / 2e``. That takes three
    times the passes of a gradient, and no graph of a graph. All is in float32: the
    differences would drown in the rounding of bfloat16.

    Args:
        model: The model as it stands; left as it was.
        loss: Its loss.
        ids: The windows.
        layers: Whose part of the product is wanted.
        along: The layers that the Hessian and the gradient are taken over.
        temperature: What logits are divided by.
    """
    found = {layer: torch.zeros(layer.shape) for layer in layers}
    with computing_in(model, torch.float32, copy=True), torch.no_grad():
        gradient = {layer: torch.zeros(layer.shape) for layer in along}

        def gather(sums: dict[Layer, Tensor], factor: float) -> None:
            def hear(layer: Layer, passing: Tensor) -> None:
                sums[layer].add_(passing, alpha=factor / len(ids))

            with listening(model, sums, hear):
                for window in ids.split(1):
                    loss.backward(model, window, temperature=temperature)

        def move(by: float) -> None:
            for layer, own in gradient.items():
                read_weight(model, layer).add_(own, alpha=by)

        gather(gradient, 1.0)
        slope = _length(gradient.values())
        if slope == 0:
            return found
        step = STEP * _length(read_weight(model, layer) for layer in along) / slope
        move(step)
        gather(found, 0.5 / step)
        move(-2 * step)
        gather(found, -0.5 / step)
    return found


def _length(parts: Iterator[Tensor] | Collection[Tensor]) -> float:
    """Give the L2 norm of all numbers together."""
    return math.sqrt(sum(float(part.norm()) ** 2 for part in parts))
