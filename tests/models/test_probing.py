"""Runs of one block: what is seen, held and replaced."""

from typing import Any

import pytest
import torch
from tiny_own import OwnForCausalLM, own_model
from torch import Tensor, nn

from autoprune.errors import ModelError
from autoprune.models.probing import BlockProbe


@pytest.fixture
def model() -> OwnForCausalLM:
    return own_model()


@pytest.fixture
def probe(model: OwnForCausalLM) -> BlockProbe:
    return BlockProbe(model, "trunk.pieces.0")


def test_layers_are_seen_in_order(probe: BlockProbe) -> None:
    order = ("ask", "key", "tell", "mix", "door", "wide", "back")
    assert (probe.ran, probe.idle) == (order, ())
    first = probe.first
    assert [first.read[name].shape[1] for name in order] == [32] * 6 + [48]
    assert [probe.rows(name) for name in order] == [32, 16, 16, 32, 48, 48, 32]
    assert first.source["tell"] == first.source["key"] == first.source["ask"] == "ask"
    assert first.source["wide"] == "door"
    assert (first.source["mix"], first.source["back"]) == ("mix", "back")


def test_equal_tensors_are_not_the_same(model: OwnForCausalLM) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            # Two norms that have not been trained give equal tensors too.
            return self.one(x.clone()) + self.two(x.clone())

    model.trunk.pieces[0] = Twice()
    first = BlockProbe(model, "trunk.pieces.0").first
    assert torch.equal(first.read["one"], first.read["two"])
    assert first.source == {"one": "one", "two": "two"}


def test_answers_take_the_place_of_what_layers_give(probe: BlockProbe) -> None:
    zero = torch.zeros_like(probe.first.gave["back"])
    seen = probe.run({"back": zero, "mix": probe.first.gave["mix"] * 0})
    entered = probe._call.hidden
    assert torch.equal(seen.after, entered)
    assert torch.equal(probe.first.after, probe.run().after)


def test_frozen_layers_pass_nothing_on(probe: BlockProbe) -> None:
    noise = probe.altered("key")
    assert not torch.equal(probe.run({"key": noise}).after, probe.first.after)
    seen = probe.frozen({"key": noise})
    assert torch.equal(seen.after, probe.first.after)
    assert not torch.equal(seen.read["mix"], probe.first.read["mix"])
    hidden = probe.altered_hidden()
    assert not torch.equal(probe.frozen(hidden=hidden).after, probe.first.after)


def test_noise_lies_where_it_is_wanted(probe: BlockProbe) -> None:
    gave = probe.first.gave["key"]
    rows = torch.arange(16) < 3
    changed = (probe.altered("key", rows=rows) != gave)[0]
    assert changed.all(0).tolist() == rows.tolist()
    assert changed.any(0).tolist() == rows.tolist()
    changed = (probe.altered("key", tokens=2) != gave)[0]
    assert changed.all(1).tolist() == [True] * 2 + [False] * 6
    ratio = probe.altered("key").square().mean() / gave.square().mean()
    assert 0.5 < ratio < 2


def test_zeros_stand_in_for_weights(probe: BlockProbe, model: OwnForCausalLM) -> None:
    lines = torch.arange(16) >= 12
    found = probe.zeroed("key", lines, axis="rows")
    assert found.keys() == {"key.weight", "key.bias"}
    assert (found["key.weight"][12:] == 0).all()
    assert (found["key.bias"][12:] == 0).all()
    own = model.trunk.pieces[0].key
    assert torch.equal(found["key.weight"][:12], own.weight[:12])
    assert (own.weight != 0).all()
    found = probe.zeroed("mix", torch.arange(32) < 8, axis="columns")
    assert found.keys() == {"mix.weight"}
    assert (found["mix.weight"][:, :8] == 0).all()
    assert (found["mix.weight"][:, 8:] != 0).all()
    assert not torch.equal(probe.run(weights=found).after, probe.first.after)


def test_layers_that_run_twice_or_never_are_idle(model: OwnForCausalLM) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice = nn.Linear(32, 32), nn.Linear(32, 32)
            self.never = nn.Linear(32, 32)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.twice(self.twice(self.once(x)))

    model.trunk.pieces[0] = Odd()
    probe = BlockProbe(model, "trunk.pieces.0")
    assert (probe.ran, probe.idle) == (("once",), ("twice", "never"))


def test_what_gives_no_tensor_is_no_layer(model: OwnForCausalLM) -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.route, self.one = Router(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.one(self.route(x)[0])

    model.trunk.pieces[0] = Routed()
    probe = BlockProbe(model, "trunk.pieces.0")
    assert (probe.ran, probe.idle) == (("one",), ("route",))


def test_changes_in_place_do_no_harm(model: OwnForCausalLM) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 8), nn.Linear(8, 32)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x += self.down(self.up(x).relu_())
            return x

    model.trunk.pieces[0] = InPlace()
    probe = BlockProbe(model, "trunk.pieces.0")
    assert (probe.first.gave["up"] < 0).any()
    assert (probe.first.read["down"] >= 0).all()


def test_a_block_that_cannot_run_alone_is_named(model: OwnForCausalLM) -> None:
    probe = BlockProbe(model, "trunk.pieces.0")
    with pytest.raises(ModelError, match="a Piece cannot be run by itself: RuntimeErr"):
        probe.run(hidden=torch.zeros(1, 8, 31))
