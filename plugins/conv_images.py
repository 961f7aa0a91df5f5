"""Image classification: images as windows, read with a checkpoint's own preprocessor.

A document is an image in one of the plain formats of Netpbm, P2 (grey) or P3 (colour),
which are text; its class stands in a comment, ``# class: 7``. So a text source can be a
source of images, and an image is what splits are dealt: none sees another's.

A window is the class, channels, height and width of an image, and then its pixels from
0 to 255, channel by channel.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from autoprune.errors import ModelError, TextError
from autoprune.hookspecs import hookimpl
from autoprune.models.checkpoints import Checkpoint
from autoprune.models.layers import Feed
from autoprune.models.splits import deal_alike
from autoprune.models.task import Batch, Task
from autoprune.models.text import SPLITS, TextSource, TokenWindows, read_documents

PREPROCESSOR = "preprocessor_config.json"
"""Where checkpoints of transformers say how images are read."""

HEAD = 4
"""Numbers of a window before its pixels: class, channels, height, width."""

WHITE = 255

_FORMATS = {"P2": 1, "P3": 3}


@dataclass(frozen=True)
class PixelReader:
    """How pixels become what a model reads; stands for its tokenizer.

    Attributes:
        mean: Of each channel, in [0, 1]; subtracted.
        std: Of each channel; divided by, after that.
        size: Height and width that images are brought to, bilinearly; None to leave
            them as they are.
        record: The preprocessor's file, as it was read.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    record: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "PixelReader":
        """Read a checkpoint's ``preprocessor_config.json``.

        Raises:
            ModelError: If it is missing, or does not say how pixels are scaled.
        """
        file = folder / PREPROCESSOR
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            mean, std = record["image_mean"], record["image_std"]
            size = _size(record) if record.get("do_resize", True) else None
            return cls(tuple(map(float, mean)), tuple(map(float, std)), size, record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{file} does not say how images are read: {type(error).__name__}: "
                f"{error}. Expected image_mean, image_std and size. Copy the file that "
                "belongs to the model."
            ) from error

    def __call__(
        self, pixels: Int[Tensor, "windows channels height width"]
    ) -> Float[Tensor, "windows channels _ _"]:
        """Scale and resize pixels from 0 to 255."""
        shape = (1, -1, 1, 1)
        mean, std = torch.tensor(self.mean).view(shape), torch.tensor(self.std)
        scaled = (pixels.float() / WHITE - mean) / std.view(shape)
        if self.size is None or self.size == tuple(pixels.shape[2:]):
            return scaled
        return functional.interpolate(
            scaled, self.size, mode="bilinear", align_corners=False, antialias=True
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file as it was read, beside an export."""
        text = json.dumps(dict(self.record), indent=2, sort_keys=True)
        (Path(folder) / PREPROCESSOR).write_text(f"{text}\n", encoding="utf-8")


class ImageClassification(Task):
    """Image classification: name the one class of an image.

    Windows are images, so ``text: {window: ...}`` has no say. A window has one scored
    position; its loss is the cross-entropy, and ``kl`` is per image.
    """

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"

    def load_tokenizer(self, checkpoint: Checkpoint) -> PixelReader:
        """Load the checkpoint's preprocessor.

        Raises:
            ModelError: If it has none.
        """
        return PixelReader.load(checkpoint.folder)

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
        """Read images and deal them to the splits, each to one.

        Raises:
            TextError: If a document is no image, images differ in size, or a split gets
                none.
        """
        documents = read_documents(text, sources)
        images = [
            read_image(document, f"{text}, image {number}")
            for number, document in enumerate(documents, start=1)
        ]
        for number, image in enumerate(images, start=1):
            if image[1:HEAD] != images[0][1:HEAD]:
                raise TextError(
                    f"{text}, image {number} has (channels, height, width) "
                    f"{image[1:HEAD]}, the first {images[0][1:HEAD]}. Bring all to one "
                    "size."
                )
        every = torch.tensor(images, dtype=torch.int64)
        dealt = deal_alike(len(images), windows, seed)
        splits = {}
        for split in SPLITS:
            if want := windows.get(split, 0):
                if not dealt[split]:
                    raise TextError(
                        f"the images {text!r} are too few: split {split!r} gets none "
                        f"of {len(images)}. Ask for fewer, or name more images."
                    )
                chosen = sorted(dealt[split][:want])
                splits[split] = TokenWindows.of(every[chosen], split, text)
        return splits

    def feed(self, tokenizer: Any) -> Feed:
        """Give what makes pixel values of windows."""
        return partial(self._inputs, tokenizer)

    def first_positions(
        self, ids: Int[Tensor, "windows length"], count: int
    ) -> Int[Tensor, "windows length"]:
        """Leave images whole."""
        return ids

    def batch(self, ids: Int[Tensor, "windows length"], tokenizer: Any) -> Batch:
        """Score the one answer to each image."""
        scored = torch.ones(len(ids), 1, dtype=torch.bool)
        return Batch(self._inputs(tokenizer, ids), scored, ids[:, 0])

    @staticmethod
    def _inputs(
        reader: PixelReader, ids: Int[Tensor, "windows length"]
    ) -> dict[str, Any]:
        shape = tuple(ids[0, 1:HEAD].tolist())
        return {"pixel_values": reader(ids[:, HEAD:].view(-1, *shape))}


def read_image(document: str, where: str = "the image") -> list[int]:
    r"""Read an image in a plain format of Netpbm as a window.

    Args:
        document: The file's text.
        where: Names it in errors.

    Raises:
        TextError: If it is no such image, or names no class.

    Example:
        >>> read_image("P2 # class: 3\n2 1 15\n0 15")
        [3, 1, 1, 2, 0, 255]
    """
    lines = [line.partition("#") for line in document.splitlines()]
    words = " ".join(line[0] for line in lines).split()
    classes = [_class(line[2]) for line in lines if "class:" in line[2]]
    try:
        channels = _FORMATS[words[0]]
        width, height, white, *pixels = map(int, words[1:])
    except (KeyError, IndexError, ValueError) as error:
        raise TextError(
            f"{where} is no plain Netpbm image: expected P2 or P3, width, height, the "
            f"number that is white, and pixels, found {document[:40]!r}"
        ) from error
    if len(classes) != 1 or classes[0] is None:
        raise TextError(
            f"{where} names {len(classes)} classes. Name its one by its number, in a "
            "comment '# class: 7'."
        )
    if min(width, height, white) < 1:
        raise TextError(
            f"{where} has width {width}, height {height} and {white} as its white. "
            "Each is at least 1."
        )
    count = prod((channels, height, width))
    if len(pixels) != count or not all(0 <= one <= white for one in pixels):
        raise TextError(
            f"{where} has {len(pixels)} numbers, expected {channels} x {height} x "
            f"{width} from 0 to {white}"
        )
    planes = [one for start in range(channels) for one in pixels[start::channels]]
    scaled = [round(one * WHITE / white) for one in planes]
    return [classes[0], channels, height, width, *scaled]


def _class(comment: str) -> int | None:
    words = comment.partition("class:")[2].split()
    return int(words[0]) if words and words[0].isdecimal() else None


def _size(record: Mapping[str, Any]) -> tuple[int, int]:
    size = record["size"]
    if isinstance(size, int):
        return size, size
    side = size.get("shortest_edge")
    return (int(side),) * 2 if side else (int(size["height"]), int(size["width"]))


@hookimpl
def register_tasks() -> list[Task]:
    """Register it."""
    return [ImageClassification()]
