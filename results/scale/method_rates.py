"""How fast methods are, and random models to measure on; see ``rates.py``."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autoprune.compression.actions import Actions
from autoprune.compression.apply import StitchedModel
from autoprune.compression.bank import VariantBank
from autoprune.compression.derived import derived_from
from autoprune.compression.examples import example_action, example_layer
from autoprune.compression.method import Source
from autoprune.compression.store import VariantStore
from autoprune.compression.structured import StructuredMethod
from autoprune.compression.variant import Variant
from autoprune.errors import AutoPruneError
from autoprune.models.gradients import GRADIENTS, TaskLoss
from autoprune.models.layers import inventory
from autoprune.models.statistics import Gathering, InputStatistics
from autoprune.models.text import TokenWindows
from autoprune.plugins import Plugins
from autoprune.policy import Action, Layer, Step

LENGTH = 512
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}

SIDES = (384, 768, 1536)
"""Of the square layers on which methods are measured."""

SLOW_S = 1.0
"""A method that takes longer on one side is not measured on the next, larger one."""

SETTINGS = 3


def cpu(work: Callable[[], Any], times: int = 1) -> float:
    """Give the least CPU time of some calls."""
    found = []
    for _ in range(times):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def llama(shape: dict[str, int], blocks: int, vocabulary: int) -> Any:
    """Make a random Llama in bfloat16."""
    config = LlamaConfig(
        **shape,
        vocab_size=vocabulary,
        num_hidden_layers=blocks,
        num_key_value_heads=max(1, shape["num_attention_heads"] // 4),
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=LENGTH,
    )
    if shape["num_attention_heads"] % config.num_key_value_heads:
        config.num_key_value_heads = shape["num_attention_heads"] // 3
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def tokens(windows: int, vocabulary: int, length: int = LENGTH) -> TokenWindows:
    """Draw windows at random."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (windows, length), generator=generator)
    return TokenWindows(ids, "fitness", "random", f"{windows}x{length}")


def methods(plugins: Plugins) -> dict[str, list[dict[str, Any]]]:
    """Measure every method: seconds of a call with one setting, and with three."""
    found = {}
    for name, method in sorted(plugins.objects["methods"].items()):
        measure = _alone if _stands_alone(method) else _in_a_block
        try:
            found[name] = list(measure(plugins, name))
        except (AutoPruneError, RuntimeError, ValueError) as error:
            sys.stderr.write(f"{name} is left out: {error}\n")
            continue
        sys.stderr.write(f"{name}: {found[name]}\n")
    return found


def derived(plugins: Plugins) -> dict[str, str]:
    """Tell for which actions a part of a variant is made again instead of stored."""
    known = plugins.objects["methods"]
    found = {}
    for _, method in sorted(known.items()):
        if not _stands_alone(method):
            continue
        actions = Actions(known)
        try:
            action = example_action(method, known)
            layer, statistics = _example(actions, action, method, 128)
            weight = torch.randn(layer.shape).bfloat16()
            variant = _stepped(actions, action.steps, layer, weight, statistics)
        except (AutoPruneError, RuntimeError, ValueError):
            continue
        if (left := derived_from(variant, weight)) is not None:
            found[" + ".join(step.method for step in action.steps)] = left.name
    return found


def square(layer: Layer, side: int) -> Layer:
    """Give a layer another side, and no structure."""
    return replace(layer, shape=(side, side), cut=None, hidden=None)


def _stands_alone(method: Any) -> bool:
    """Tell whether a method looks at a layer and its inputs, and no more."""
    return not isinstance(method, StructuredMethod) and not method.needs & GRADIENTS


def _example(
    actions: Actions, action: Action, method: Any, side: int
) -> tuple[Layer, InputStatistics]:
    """Make a layer, and what is known of random inputs of it."""
    gathering = Gathering(actions.needs(action) - GRADIENTS, side)
    gathering.add(torch.randn(2 * side, side).bfloat16())
    return square(example_layer(method), side), gathering.result()


def _stepped(
    actions: Actions,
    steps: Sequence[Step],
    layer: Layer,
    weight: torch.Tensor,
    statistics: InputStatistics,
) -> Variant:
    """Do steps one after the other."""
    variant = Variant.dense(weight)
    for step in steps:
        source, settings = Source(layer, variant, weight), [actions.settings(step)]
        made = actions.method(step).compress([source], statistics, settings)
        variant = made[0][0]
    return variant


def _alone(plugins: Plugins, name: str) -> Iterator[dict[str, Any]]:
    """Measure the last step of a method's example on square layers."""
    known = plugins.objects["methods"]
    actions, action = Actions(known), example_action(known[name], known)
    *before, last = action.steps
    for side in SIDES:
        layer, statistics = _example(actions, action, known[name], side)
        weight = torch.randn(side, side).bfloat16()
        variant = _stepped(actions, before, layer, weight, statistics)
        source, one = Source(layer, variant, weight), [actions.settings(last)]
        call = partial(actions.method(last).compress, [source], statistics)
        once, many = cpu(partial(call, one)), cpu(partial(call, one * SETTINGS))
        row = {"side": side, "one_s": once, "settings": SETTINGS}
        yield {**row, "many_s": max(once, many)}
        if once > SLOW_S:
            return


def _in_a_block(plugins: Plugins, name: str) -> Iterator[dict[str, Any]]:
    """Measure a method that looks at whole sites or gradients, in two blocks."""
    known, task = plugins.objects["methods"], plugins.get("tasks", "causal-lm")
    model = llama(SMALL, 2, 256)
    found = inventory(model, list(plugins.objects["architectures"].values()))
    action, kinds = example_action(known[name], known), known[name].kinds
    groups = [group for group in found.groups if group.kind in kinds]
    inside = [layer for group in groups for layer in group.layers]
    layers = dict.fromkeys(inside if kinds else found.layers)
    with tempfile.TemporaryDirectory() as folder:
        bank = VariantBank(
            StitchedModel(model, found.layers),
            found,
            Actions(known),
            VariantStore(Path(folder), 10**11),
            tokens(4, 256, 128),
            "random",
            loss=TaskLoss(task, None),
        )
        wanted = [(layer, action) for layer in layers if layer.block is not None]
        spent = cpu(partial(bank.make, wanted))
    side = sum(layer.numel for layer, _ in wanted) ** 0.5
    yield {"side": side, "one_s": spent, "settings": 1, "many_s": spent}
