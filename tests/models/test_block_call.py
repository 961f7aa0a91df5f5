"""How a model calls a block: what is caught of it, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from autoprune.errors import ModelError
from autoprune.models.block_call import TOKENS, call_of, hidden_of


class Block(nn.Module):
    """Gives hidden states with something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, *rest: Any, **others: Any) -> Any:
        return hidden_states + self.linear(hidden_states), self.linear(hidden_states)


class Host(nn.Module):
    """Two blocks, called as a test wants."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.call = call

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.call(self.layers, self.table(ids)),)


def plain(layers: Any, hidden: Tensor) -> Tensor:
    return layers[1](layers[0](hidden)[0])[0]


def test_hidden_states_come_first_or_by_name() -> None:
    first = call_of(Host(plain), "layers.0")
    assert first.hidden.shape == (1, TOKENS, 4)
    assert (len(first.args), first.kwargs) == (1, {})
    mask = torch.ones(2)
    named = call_of(
        Host(lambda layers, h: layers[0](hidden_states=h, mask=(mask, 3))[0]),
        "layers.0",
    )
    assert named.args == ()
    other = torch.zeros(1, TOKENS, 4)
    args, kwargs = named.fresh(other)
    assert (args, kwargs["hidden_states"] is other) == ((), True)
    assert torch.equal(kwargs["mask"][0], mask)
    assert kwargs["mask"][0] is not mask
    assert kwargs["mask"][1] == 3
    assert first.fresh(other)[0] == (other,)


def test_the_call_is_the_models_own() -> None:
    host = Host(plain)
    call = call_of(host, "layers.1")
    ids = []
    host.table.register_forward_pre_hook(lambda _, args: ids.append(args[0]))
    again = call_of(host, "layers.1")
    assert torch.equal(call.hidden, again.hidden)
    assert torch.equal(call.hidden, host.layers[0](host.table(ids[0]))[0])


def test_keys_and_values_of_earlier_tokens_are_left_out() -> None:
    cache = DynamicCache()
    host = Host(lambda layers, h: layers[0](h, cache, past=[cache])[0])
    args, kwargs = call_of(host, "layers.0").fresh()
    assert args[1] is None
    assert kwargs["past"] == [None]


def test_extras_that_nobody_reads_do_not_matter() -> None:
    host = Host(plain)
    assert isinstance(host.layers[0](torch.ones(1, 4))[1], Tensor)
    assert call_of(host, "layers.0").hidden.shape == (1, TOKENS, 4)


def test_extras_that_go_on_to_others_are_refused() -> None:
    def passing(layers: Any, hidden: Tensor) -> Tensor:
        hidden, extra = layers[0](hidden)
        return layers[1](hidden)[0] + extra

    with pytest.raises(ModelError, match="more than hidden states goes on from a Bl"):
        call_of(Host(passing), "layers.0")


@pytest.mark.parametrize(
    "call",
    [
        lambda layers, h: layers[0](SimpleNamespace(x=h).x.tolist())[0],
        lambda layers, h: h,
    ],
    ids=["a list", "never"],
)
def test_a_block_without_hidden_states_is_refused(call: Any) -> None:
    host = Host(call)
    host.layers[0].forward = lambda *args: (torch.ones(1), None)
    with pytest.raises(ModelError, match="Host does not hand hidden states to a Block"):
        call_of(host, "layers.0")


def test_hidden_states_are_the_first_of_an_output() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    for output in (one, (one, two), [one], {"last_hidden_state": one, "x": two}):
        assert hidden_of(output) is one
    with pytest.raises(ModelError, match="hidden states, found a NoneType"):
        hidden_of((None, one))
