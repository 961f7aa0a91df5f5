"""Two small models, their data and how they are trained: what the arms share.

A run is told by a seed: it decides the initial weights and, with the number of a step,
the batch of that step. So arms of one seed begin with the same weights and see the same
batches in the same order.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from autoprune_plugins.text_sources import BuiltinText
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from autoprune.training.masks import FrozenMasks

STEPS = 240
"""Of every arm, all its trainings together."""

WARMUP, LOWEST = 10, 0.1
"""Steps in which the learning rate rises; the share of it at the end, and after."""

WINDOW, WINDOWS = 64, 4
"""Bytes of a window; windows of a step."""

IMAGES = 32
"""Images of a step."""

TESTED_WINDOWS, TESTED_IMAGES = 256, 512
"""The last of the text, and images, that accuracy is measured on."""

Batch = tuple[Tensor, Tensor]
State = dict[str, Tensor]
Held = Callable[[torch.optim.Optimizer], AbstractContextManager[Any]]

Result = dict[str, float]
"""``accuracy`` in [0, 1] and CPU ``seconds``; where weights are pruned halfway perhaps
``half``, accuracy before that, and ``bare``, after it and before any training."""


@dataclass(frozen=True)
class Scene:
    """A model with its data.

    Attributes:
        make: Gives a new model; the caller has seeded torch.
        logits: Gives logits and labels of a batch, position by position.
        training: All that batches are drawn from.
        test: What accuracy is measured on.
        batch: Examples of a step.
        rate: The largest learning rate.
        prunable: Tells by name and parameter what may be pruned.
        ones: Shape of an input of ones, and what gives the output for it.
    """

    make: Callable[[], nn.Module]
    logits: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
    training: Batch
    test: Batch
    batch: int
    rate: float
    prunable: Callable[[str, nn.Parameter], bool]
    ones: tuple[tuple[int, ...], Callable[[nn.Module, Tensor], Tensor]]

    def model(self, seed: int) -> nn.Module:
        """Make the model of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()

    def names(self, model: nn.Module) -> list[str]:
        """Name what may be pruned."""
        return [n for n, p in model.named_parameters() if self.prunable(n, p)]

    def drawn(self, seed: int, step: int, count: int) -> Batch:
        """Draw the examples of a step."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(self.training[0]), (count,), generator=generator)
        return self.training[0][rows], self.training[1][rows]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Give the share of test positions that the model gets right."""
        model.eval()
        logits, labels = self.logits(model, self.test)
        return float((logits.argmax(-1) == labels).double().mean())


def course(length: int) -> Callable[[int], float]:
    """Give the learning rate, over its largest, of each step: down to its lowest."""

    def rate(step: int) -> float:
        if step >= length:
            return LOWEST
        left = 1 - max(0, step - WARMUP) / (length - WARMUP)
        return min(1.0, (step + 1) / WARMUP) * (LOWEST + (1 - LOWEST) * left)

    return rate


@dataclass
class Run:
    """A model of one seed in training; its time is counted.

    Attributes:
        scene: The model and its data.
        seed: Of weights and batches.
        model: The model.
        seconds: CPU seconds of training until now.
    """

    scene: Scene
    seed: int
    model: nn.Module = field(init=False)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.model = self.scene.model(self.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1.0, weight_decay=0.01, fused=True
        )

    def train(
        self, rate: Callable[[int], float], start: int, stop: int, *held: Held
    ) -> None:
        """Train from one step to another, in the holds that are given."""
        began = time.process_time()
        self.model.train()
        with ExitStack() as stack:
            for hold in held:
                stack.enter_context(hold(self.optimizer))
            for step in range(start, stop):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.scene.rate * rate(step)
                batch = self.scene.drawn(self.seed, step, self.scene.batch)
                self.optimizer.zero_grad()
                self.loss(batch).backward()
                self.optimizer.step()
        self.seconds += time.process_time() - began

    def loss(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """Give the mean loss of a batch, its logits over a temperature."""
        logits, labels = self.scene.logits(self.model, batch)
        return functional.cross_entropy(logits / temperature, labels)

    def state(self) -> State:
        """Copy weights, buffers and momentum."""
        momentum = {
            f"{key} of {name}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        found = {**self.model.state_dict(), **momentum}
        return {name: tensor.clone() for name, tensor in found.items()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Put back what ``state`` gave; without momentum if it had none."""
        own = self.model.state_dict().keys()
        self.model.load_state_dict({name: state[name] for name in own})
        self.optimizer.state.clear()
        named = dict(self.model.named_parameters())
        for key in state.keys() - own:
            kind, name = key.split(" of ")
            self.optimizer.state[named[name]][kind] = state[key].clone()

    def train_from(
        self,
        state: State,
        kept: Mapping[str, Tensor],
        *,
        start: int,
        stop: int,
        rate: Callable[[int], float],
    ) -> tuple[State, float]:
        """Train as ``tickets`` wants it; pruned weights are exactly zero at the end."""
        self.load(state)
        masks = FrozenMasks.of_parameters(self.model, kept)
        self.train(rate, start, stop, masks.held)
        masks.check()
        return self.state(), self.scene.accuracy(self.model)


@cache
def scenes() -> dict[str, Scene]:
    """Give the small models by name, with their data."""
    return {"transformer": _transformer(), "resnet": _resnet()}


def _transformer() -> Scene:
    """A Llama of two blocks that foretells the next byte of AutoPrune's own text."""
    text = "\n\n".join(BuiltinText().documents("")).encode()
    ids = torch.tensor(list(text))
    windows = ids.unfold(0, WINDOW + 1, 1)
    tested = ids[len(ids) - TESTED_WINDOWS * (WINDOW + 1) :].view(
        TESTED_WINDOWS, WINDOW + 1
    )
    training = windows[: len(ids) - tested.numel() - WINDOW]

    def make() -> nn.Module:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=WINDOW,
                initializer_range=0.1,  # 0.02 is for wide ones: blocks would do little
            )
        )

    def logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        given = model(batch[0], use_cache=False).logits
        return given.flatten(0, 1), batch[1].flatten()

    return Scene(
        make=make,
        logits=logits,
        training=(training[:, :-1], training[:, 1:]),
        test=(tested[:, :-1], tested[:, 1:]),
        batch=WINDOWS,
        rate=3e-3,
        prunable=lambda name, p: ".layers." in name and p.dim() == 2,
        ones=((1, 2, 64), lambda model, ones: model(inputs_embeds=ones).logits),
    )


def _resnet() -> Scene:
    """A ResNet of three basic blocks that reads digits of scikit-learn, enlarged."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = (images.float().view(-1, 1, 8, 8) - images.mean()) / images.std()
    images = functional.interpolate(images.float(), scale_factor=2)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, training = order[:TESTED_IMAGES], order[TESTED_IMAGES:]

    def make() -> nn.Module:
        return ResNetForImageClassification(
            ResNetConfig(
                num_channels=1,
                embedding_size=16,
                hidden_sizes=[16, 32, 64],
                depths=[1, 1, 1],
                layer_type="basic",
                num_labels=10,
            )
        )

    def logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return model(batch[0]).logits, batch[1]

    return Scene(
        make=make,
        logits=logits,
        training=(images[training], labels[training]),
        test=(images[test], labels[test]),
        batch=IMAGES,
        rate=1e-2,
        prunable=lambda name, p: p.dim() == 4,
        ones=((1, 1, 16, 16), lambda model, ones: model(ones).logits),
    )
