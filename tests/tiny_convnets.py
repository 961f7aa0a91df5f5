"""Tiny random ResNets of both kinds, whose norms have seen something; and images."""

import json
from pathlib import Path
from typing import Any

import torch
from autoprune_plugins.conv_digits import image_document
from autoprune_plugins.conv_images import HEAD, PixelReader
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from autoprune.config import TextConfig
from autoprune.evaluation.workbench import Workbench
from autoprune.plugins import Plugins
from autoprune.policy import Action, Policy

SMALL: dict[str, Any] = {
    "num_channels": 1,
    "embedding_size": 4,
    "hidden_sizes": [4, 8, 8],
    "depths": [2, 2, 1],
    "num_labels": 10,
}
PREPROCESSOR = {"image_mean": [0.5], "image_std": [0.25], "size": 16}


def tiny_resnet(
    layer_type: str = "basic", **settings: Any
) -> ResNetForImageClassification:
    """Make a model whose batch norms scale and shift, the same at every call."""
    wide = {"hidden_sizes": [16, 32, 32]} if layer_type == "bottleneck" else {}
    config = ResNetConfig(**{**SMALL, **wide, "layer_type": layer_type, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNetForImageClassification(config).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.requires_grad_(False)


def pixels(count: int = 3, side: int = 16) -> Tensor:
    """Make images as a model reads them."""
    return torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(0))


def windows(count: int = 6, side: int = 8, classes: int = 10) -> Tensor:
    """Make images as windows, of all classes in turn."""
    generator = torch.Generator().manual_seed(0)
    head = torch.tensor([0, 1, side, side]).repeat(count, 1)
    head[:, 0] = torch.arange(count) % classes
    drawn = torch.randint(0, 256, (count, side * side), generator=generator)
    found = torch.cat([head, drawn], 1)
    assert found.shape[1] == HEAD + side * side
    return found


def write_resnet(folder: Path, model: ResNetForImageClassification) -> Path:
    """Write a model as a checkpoint."""
    model.save_pretrained(folder)
    text = json.dumps(PREPROCESSOR)
    (folder / "preprocessor_config.json").write_text(text)
    return folder


def write_images(file: Path, count: int) -> str:
    """Write images of all classes in turn, one a line, and name them as a source."""
    ids = windows(count)
    rows = ids[:, HEAD:].view(count, 8, 8).tolist()
    documents = [
        image_document(label, image, 255)
        for label, image in zip(ids[:, 0].tolist(), rows, strict=True)
    ]
    file.write_text("".join(f"{json.dumps({'text': one})}\n" for one in documents))
    return f"file:{file}"


def reader() -> PixelReader:
    """Give what reads the images of the tiny checkpoints."""
    return PixelReader((0.5,), (0.25,), (16, 16), PREPROCESSOR)


def policy_on(bench: Workbench, kind: str, text: str) -> Policy:
    """Put an action on all sites of a kind; what they leave stays dense."""
    names = {group.name for group in bench.inventory.groups if group.kind == kind}
    action, sites = Action.parse(text), bench.inventory.sites_for(names)
    return Policy({s.name: action if s.name in names else Action() for s in sites})


def bench_of(
    folder: Path, plugins: Plugins, cache: Path, *, target: str = "packed"
) -> Workbench:
    """Open a checkpoint with a few random images."""
    few = {"statistics": 24, "fitness": 8, "choice": 8, "report": 8}
    source = write_images(folder / "images.jsonl", 48)
    return Workbench.open(
        plugins,
        model=str(folder),
        task="image-classification",
        text=TextConfig.model_validate({"source": source, **few}),
        target=target,
        seed=0,
        cache=cache,
    )
