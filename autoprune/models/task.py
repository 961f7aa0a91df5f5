"""What a model is for: its batches, its outputs and the head that reads them.

Every task here ends in a linear head over classes (the words of a vocabulary, labels):
the vectors that the head reads are its outputs, and their divergence is that of the
distributions that the head makes of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.checkpoints import Checkpoint, load_tokenizer
from autoprune.models.inputs import fitted
from autoprune.models.layers import Feed
from autoprune.models.statistics import exact_products
from autoprune.models.text import TextSource, TokenWindows, load_splits

CHUNK = 64
"""Positions whose logits exist at a time: 12 MB at 49 k words stay near the cache."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some windows, ready for a model.

    Attributes:
        inputs: Keyword arguments of the model; its tensors have a row a window.
        scored: Positions whose outputs count.
        labels: The right class at each scored position, window by window.
    """

    inputs: dict[str, Any]
    scored: Bool[Tensor, "windows length"]
    labels: Int[Tensor, " positions"]

    def at_scored(self, values: Float[Tensor, "..."]) -> Float[Tensor, "positions _"]:
        """Take what a model gives at the scored positions.

        Args:
            values: A vector a position; a model that answers once a window, as
                classifiers do, gives one a window.
        """
        each = values if values.dim() > 2 else values[:, None]
        return each[self.scored.to(each.device)]


@dataclass(frozen=True, eq=False)
class Head:
    """The linear map from a model's last vectors to logits.

    Attributes:
        weight: One row a class, float32.
        bias: Float32, or None.
        scale: Factor of the logits.
        softcap: Bound that the logits are squashed to by tanh; None for none.
    """

    weight: Float[Tensor, "classes hidden"]
    bias: Float[Tensor, " classes"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(
        self, features: Float[Tensor, "positions hidden"]
    ) -> Float[Tensor, "positions classes"]:
        """Give the logits of some positions, in float32."""
        logits = features.float() @ self.weight.T
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def in_chunks(
        self, features: Float[Tensor, "positions hidden"]
    ) -> Iterator[tuple[slice, Float[Tensor, "rows classes"]]]:
        """Give the logits of all positions, some at a time, each with its rows."""
        for start in range(0, len(features), CHUNK):
            rows = slice(start, start + CHUNK)
            with exact_products(features):
                logits = self.logits(features[rows])
            yield rows, logits

    def losses(
        self,
        features: Float[Tensor, "positions hidden"],
        labels: Int[Tensor, " positions"],
    ) -> Float[Tensor, " positions"]:
        """Give the negative log-likelihood of each label, in nats.

        Raises:
            ModelError: If a label is none of the classes.
        """
        classes, largest = len(self.weight), int(labels.max()) if len(labels) else 0
        if largest >= classes:
            raise ModelError(
                f"a label is class {largest}, but the model tells {classes} apart, "
                "from 0. Take data with its own classes, or the model of that data."
            )
        return torch.cat(
            [
                logits.logsumexp(-1) - logits.gather(1, labels[rows, None])[:, 0]
                for rows, logits in self.in_chunks(features)
            ]
        )


class _HeadReached(Exception):  # noqa: N818 - ends a forward pass, no error
    """Carries the head's input out of a forward pass."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class Task(ABC):
    """What the model is for.

    A task has no state. ``load_tokenizer`` and ``load_splits`` are called once, and
    make windows of raw data; ``batch`` is called once a window; ``features`` for each
    policy on each batch; ``head`` when a dense model is cached or its head was
    compressed. Windows of another kind than tokens, such as images, are numbers as
    well, and whatever reads them takes the place of the tokenizer.

    Attributes:
        name: Unique, lower case.
        auto_class: The class of transformers that loads the model.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]

    def load_tokenizer(self, checkpoint: Checkpoint) -> Any:
        """Load what a checkpoint's windows are made and read with.

        Returns:
            A tokenizer, or what stands for one; its ``save_pretrained(folder)`` writes
            it beside an export.

        Raises:
            ModelError: If the checkpoint has none.
        """
        return load_tokenizer(checkpoint)

    def load_splits(
        self,
        text: str,
        sources: Mapping[str, TextSource],
        tokenizer: Any,
        *,
        length: int,
        windows: Mapping[str, int],
        seed: int,
    ) -> dict[str, TokenWindows]:
        """Make the windows of four splits that share no document.

        See ``autoprune.models.text.load_splits``, which text is left to.
        """
        return load_splits(
            text, sources, tokenizer, length=length, windows=windows, seed=seed
        )

    def feed(self, tokenizer: Any) -> Feed | None:
        """Give what makes the input of a model's body of windows.

        None where a body reads windows as they are, as it does tokens.
        """
        return None

    def first_positions(
        self, ids: Int[Tensor, "windows length"], count: int
    ) -> Int[Tensor, "windows short"]:
        """Shorten windows; they stay whole where a part of one is none."""
        return ids[:, :count]

    @abstractmethod
    def batch(self, ids: Int[Tensor, "windows length"], tokenizer: Any) -> Batch:
        """Make a batch of windows; deterministic.

        Raises:
            ModelError: If the tokenizer lacks what the task needs.
        """

    def features(
        self, model: nn.Module, batch: Batch
    ) -> Float[Tensor, "positions hidden"]:
        """Give the vectors that the head reads at the scored positions.

        The head itself is not computed: its input is caught on the way.
        """
        head = output_layer(model)

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _HeadReached(inputs[0])

        handle = head.register_forward_pre_hook(stop)
        try:
            model(**fitted(model, batch.inputs))
        except _HeadReached as reached:
            return batch.at_scored(reached.features)
        finally:
            handle.remove()
        raise ModelError(
            f"{type(model).__name__} gave outputs without calling its output layer, so "
            f"task {self.name!r} cannot read its features"
        )

    def head(self, model: nn.Module) -> Head:
        """Give the head as it stands on the model now, in float32."""
        layer = output_layer(model)
        config: Any = model.config
        bias = getattr(layer, "bias", None)
        return Head(
            layer.weight.detach().float(),
            None if bias is None else bias.detach().float(),
            _logit_scale(config),
            getattr(config, "final_logit_softcapping", None),
        )


def output_layer(model: nn.Module) -> nn.Linear:
    """Find the layer that makes logits.

    Classifiers do not name it: there it is the only linear one outside of the body.

    Raises:
        ModelError: If the model has none.
    """
    get: Callable[[], nn.Module | None] | None
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if get else None
    if layer is None:
        body = set(getattr(model, "base_model", model).modules())
        outside = (one for one in model.modules() if one not in body)
        linear = [one for one in outside if isinstance(one, nn.Linear)]
        layer = linear[0] if len(linear) == 1 else None
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear output layer (found {layer!r}). "
            "Load it with a class that has a head, such as AutoModelForCausalLM"
        )
    return layer


def _logit_scale(config: Any) -> float:
    """Read the factor of the logits: Cohere multiplies by it, Granite divides."""
    if getattr(config, "logit_scale", None) is not None:
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        return 1 / float(config.logits_scaling)
    return 1.0
