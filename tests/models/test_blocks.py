"""A model run block by block gives what it gives as a whole."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import CONFIGS, tiny
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from autoprune.errors import ModelError
from autoprune.models.blocks import BlockRunner
from autoprune.models.layers import inventory

WINDOWS, LENGTH, BATCH = 5, 12, 2


def runner(model: nn.Module, ids: Tensor) -> BlockRunner:
    found = inventory(model, register_architectures())
    return BlockRunner(model, found, ids, batch=BATCH)


@pytest.fixture
def ids(rng: torch.Generator) -> Tensor:
    return torch.randint(3, 60, (WINDOWS, LENGTH), generator=rng)


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks)
        for module in model.modules()
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_one_by_one_are_the_whole_model(kind: str, ids: Tensor) -> None:
    model = tiny(kind)
    parts = [model(part, output_hidden_states=True) for part in ids.split(BATCH)]
    entering, between, last = zip(*(part.hidden_states for part in parts), strict=True)
    blocks = runner(model, ids)
    hidden = blocks.start()
    assert len(hidden) == len(entering) == 3
    assert all(map(torch.equal, hidden, entering))
    hidden = blocks.run(0, hidden)
    assert all(map(torch.equal, hidden, between))
    assert all(map(torch.equal, blocks.finish(blocks.run(1, hidden)), last))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_shown_is_what_layers_read(kind: str, ids: Tensor) -> None:
    model = tiny(kind)
    found = inventory(model, register_architectures())
    layers = [la for la in found.layers if la.block == 1 and "[" not in la.name]
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    handles = [
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda module, args, name=layer.name: seen[name].append(args[0])
        )
        for layer in layers
    ]
    for part in ids.split(BATCH):
        model(part)
    for handle in handles:
        handle.remove()

    shown: dict[str, list[Tensor]] = {}
    blocks = runner(model, ids)
    before = blocks.run(0, blocks.start())
    after = blocks.collect(
        1, before, lambda name, x: shown.setdefault(name, []).append(x.clone())
    )
    assert all(map(torch.equal, after, blocks.run(1, before)))
    for layer in layers:  # of q, k and v all, though only one of them is watched
        expected = [x.reshape(-1, layer.shape[1]) for x in seen[layer.name]]
        assert len(expected) == 3
        assert all(map(torch.equal, shown[str(layer.input)], expected))
    dense = {name for name in shown if "[" not in name}
    assert dense == {layer.input for layer in layers}


def test_only_the_inputs_asked_for_are_shown(
    tiny_model: LlamaForCausalLM, ids: Tensor
) -> None:
    blocks = runner(tiny_model, ids)
    wanted = "model.layers.0.mlp.down_proj"
    shown: list[tuple[str, Any]] = []
    blocks.collect(
        0,
        blocks.start(),
        lambda name, x: shown.append((name, x.shape)),
        inputs={wanted},
    )
    assert shown == [(wanted, (24, 128)), (wanted, (24, 128)), (wanted, (12, 128))]


def test_nothing_is_left_on_the_model(
    tiny_model: LlamaForCausalLM, ids: Tensor
) -> None:
    blocks = runner(tiny_model, ids)
    hidden = blocks.start()

    def fail(name: str, x: Tensor) -> None:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="model.layers.0.self_attn.q_proj"):
        blocks.collect(0, hidden, fail)
    blocks.finish(hidden)
    assert hooks_of(tiny_model) == 0
    assert not any("forward" in vars(module) for module in tiny_model.modules())


def test_an_own_forward_of_a_block_is_kept(
    tiny_model: LlamaForCausalLM, ids: Tensor
) -> None:
    block: Any = tiny_model.model.layers[0]
    own = block.forward = block.forward  # as libraries that move weights do
    blocks = runner(tiny_model, ids)
    blocks.finish(blocks.start())
    assert vars(block)["forward"] is own


def test_no_block_runs_at_the_start(tiny_model: LlamaForCausalLM, ids: Tensor) -> None:
    blocks = runner(tiny_model, ids)
    blocks.start()
    ran: list[int] = []
    for module in tiny_model.model.layers:
        module.register_forward_hook(lambda *_: ran.append(1))
    assert len(blocks.start()) == 3
    assert ran == []


def test_weights_written_between_runs_count(
    tiny_model: LlamaForCausalLM, ids: Tensor
) -> None:
    blocks = runner(tiny_model, ids)
    hidden = blocks.start()
    before = blocks.run(0, hidden)
    tiny_model.model.layers[0].mlp.down_proj.weight.zero_()
    after = blocks.run(0, hidden)
    part = tiny_model(ids[:BATCH], output_hidden_states=True).hidden_states[1]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(after[0], part)


def test_hidden_states_carry_no_gradient(
    tiny_model: LlamaForCausalLM, ids: Tensor
) -> None:
    tiny_model.requires_grad_(True)
    blocks = runner(tiny_model, ids)
    hidden = blocks.run(0, blocks.start())
    assert not any(part.requires_grad for part in hidden)


@pytest.mark.parametrize("windows", [1, 3, WINDOWS])
def test_any_windows_pass_a_block_with_gradients(
    tiny_model: LlamaForCausalLM, ids: Tensor, windows: int
) -> None:
    blocks = runner(tiny_model, ids)
    hidden = torch.cat(blocks.start())[-windows:]
    with torch.no_grad():
        expected = torch.cat(blocks.run(0, blocks.start()))[-windows:]
    weight = tiny_model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    after = blocks.forward(0, hidden)
    assert torch.allclose(after, expected, atol=1e-5)
    after.square().mean().backward()
    assert weight.grad is not None and weight.grad.any()


@dataclass
class Output:
    """What a model's body gives."""

    last_hidden_state: Tensor


class Block(nn.Module):
    """Gives hidden states with something else, and takes what the model hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, extra: Any = None) -> Any:
        return hidden_states + self.linear(hidden_states), extra


class Model(nn.Module):
    """A model that no description fits."""

    def __init__(self, call: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(4)
        self.call = call
        self.output: Callable[[Tensor], Any] = Output

    def forward(self, ids: Tensor) -> Any:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = self.call(layer, hidden, ids)[0]
        return self.output(self.norm(hidden))


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, hidden, ids: layer(hidden),
        lambda layer, hidden, ids: layer(hidden_states=hidden, extra=ids.shape),
        lambda layer, hidden, ids: layer(hidden, {"mask": torch.ones(ids.shape[1])}),
    ],
    ids=["positional", "named", "mask"],
)
def test_an_unknown_model_with_tuples(call: Any, ids: Tensor) -> None:
    model = Model(call)
    blocks = runner(model, ids)
    hidden = blocks.start()
    for index in range(2):
        hidden = blocks.run(index, hidden)
    last = torch.cat(blocks.finish(hidden))
    assert torch.equal(last, model(ids).last_hidden_state)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, hidden, ids: layer(hidden, ids),
        lambda layer, hidden, ids: layer(hidden, [{"sum": int(ids.sum())}]),
    ],
    ids=["tensor", "number"],
)
def test_arguments_that_depend_on_tokens_are_refused(call: Any, ids: Tensor) -> None:
    with pytest.raises(
        ModelError, match=r"cannot run Model block by block: .* 'layers.0'"
    ):
        runner(Model(call), ids).start()


def test_a_block_without_hidden_states_is_refused(ids: Tensor) -> None:
    class Other(Block):
        def forward(self, x: Tensor) -> Any:
            return (self.linear(x),)

    model = Model(lambda layer, hidden, ids: layer(x=hidden))
    model.layers = nn.ModuleList([Other()])
    with pytest.raises(ModelError, match=r"run a Other by itself: .*\['x'\]"):
        runner(model, ids).start()


def test_a_body_without_last_hidden_state_is_refused(ids: Tensor) -> None:
    model = Model(lambda layer, hidden, ids: layer(hidden))
    model.output = lambda hidden: SimpleNamespace(logits=hidden)
    blocks = runner(model, ids)
    with pytest.raises(ModelError, match=r"Model gives no last_hidden_state but a S"):
        blocks.finish(blocks.start())
