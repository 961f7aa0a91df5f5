"""Handwritten digits that a package ships, and a small ResNet trained on them here.

1,797 grey images of 8 x 8 pixels: the test set of "Optical Recognition of Handwritten
Digits" (Alpaydin and Kaynak 1998, UCI), as scikit-learn carries it.
"""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from autoprune.errors import TextError
from autoprune.hookspecs import hookimpl
from autoprune.models.checkpoints import Checkpoint
from autoprune.models.task import Batch, Task
from autoprune.models.text import TextSource
from autoprune.plugins import load_plugins

WHITE = 16
"""Largest number of a pixel of the digits."""

TRAINING = 1_200
"""Images before this one are for training. They are ordered by writer, so that those
behind it are by other hands for the most part."""

PREPROCESSOR = {
    "do_resize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
    "size": {"height": 32, "width": 32},
}
"""Digits four times as high and wide, from -1 to 1; else a stem would leave 2 x 2."""

SMALL = {
    "num_channels": 1,
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64],
    "depths": [2, 2, 2],
    "layer_type": "basic",
    "num_labels": 10,
}
"""A ResNet of 176 thousand weights."""

BATCH = 64


class DigitImages(TextSource):
    """Digits: ``digits``, or a part of them, ``digits:train`` and ``digits:test``.

    A model that was trained on one part is compressed and judged on the other.
    """

    name = "digits"

    def documents(self, argument: str) -> list[str]:
        """Give the images, in the package's order."""
        parts = {
            "": slice(None),
            "train": slice(TRAINING),
            "test": slice(TRAINING, None),
        }
        if argument not in parts:
            raise TextError(
                f"there are no digits {argument!r}. Name 'digits', 'digits:train' or "
                "'digits:test'."
            )
        try:
            data = importlib.import_module("sklearn.datasets").load_digits()
        except ImportError as error:
            raise TextError(
                "the images 'digits' need scikit-learn, which is not installed: "
                "pip install 'autoprune[vision]'"
            ) from error
        images = data.images.astype(int).tolist()
        pairs = zip(data.target.tolist(), images, strict=True)
        documents = [image_document(label, rows, WHITE) for label, rows in pairs]
        return documents[parts[argument]]


def image_document(label: int, rows: Iterable[Iterable[int]], white: int) -> str:
    r"""Write a grey image in the plain format P2, with its class in a comment.

    Example:
        >>> image_document(3, [[0, 15]], 15)
        'P2 # class: 3\n2 1 15\n0 15'
    """
    lines = [" ".join(map(str, row)) for row in rows]
    width = len(lines[0].split())
    return "\n".join([f"P2 # class: {label}", f"{width} {len(lines)} {white}", *lines])


def train_resnet(
    folder: str | Path,
    *,
    part: str = "train",
    images: int = TRAINING,
    epochs: int = 8,
    seed: int = 0,
    **settings: Any,
) -> float:
    """Train a small ResNet on digits, and write it as a checkpoint; some seconds.

    Adam with weight decay, a cosine from 0.003 to 0, images shifted by up to 2 pixels
    of 32.

    Args:
        folder: Where the checkpoint is written.
        part: Of the digits; see ``DigitImages``.
        images: How many of them, at most.
        epochs: How often each image is seen; 0 leaves random weights.
        seed: Of weights, order and shifts; the same seed gives the same model.
        **settings: Of ``ResNetConfig``, in the place of those of ``SMALL``.

    Returns:
        Mean loss of the last epoch, in nats; NaN without one.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    text = json.dumps(PREPROCESSOR, indent=2, sort_keys=True)
    (place / "preprocessor_config.json").write_text(f"{text}\n", encoding="utf-8")
    plugins = load_plugins()
    task: Task = plugins.get("tasks", "image-classification")
    reader = task.load_tokenizer(Checkpoint(str(place), place, ""))
    sources, wanted = plugins.objects["text_sources"], {"statistics": images}
    named = f"digits:{part}" if part else "digits"
    splits = task.load_splits(
        named, sources, reader, length=0, windows=wanted, seed=seed
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global one
        torch.manual_seed(seed)
        model = ResNetForImageClassification(ResNetConfig(**{**SMALL, **settings}))
        generator = torch.Generator().manual_seed(seed)
        batch = task.batch(splits["statistics"].ids, reader)
        loss = _train(model, batch, epochs, generator)
    model.train(False).requires_grad_(False)
    model.save_pretrained(place)
    return loss


def _train(
    model: nn.Module, batch: Batch, epochs: int, generator: torch.Generator
) -> float:
    pixels, labels = batch.inputs["pixel_values"], batch.labels
    steps = epochs * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    losses: list[Tensor] = [torch.tensor(float("nan"))]
    model.train()
    for _ in range(epochs):
        losses = []
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            moved = torch.roll(pixels[chosen], shift, (2, 3))
            loss = functional.cross_entropy(model(moved).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    return float(torch.stack(losses).mean())


@hookimpl
def register_text_sources() -> list[TextSource]:
    """Register it."""
    return [DigitImages()]
