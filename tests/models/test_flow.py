"""Synaptic flow, worked by hand on a net of two layers."""

from typing import Any

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from autoprune_plugins.tasks import CausalLM
from tiny_models import tiny
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from autoprune.errors import ModelError
from autoprune.models.flow import network_of_sizes, synaptic_flows
from autoprune.models.gradients import TaskLoss
from autoprune.models.layers import inventory, read_weight
from autoprune.policy import Layer

LOSS = TaskLoss(CausalLM(), None)
IDS = torch.tensor([[1, 0, 1]])
FIRST = [[1.0, -2.0], [0.0, 3.0]]
SECOND = [[-1.0, 1.0], [2.0, 0.0]]
HEAD = [[1.0, 0.0], [0.0, -1.0], [1.0, 1.0]]


class Net(nn.Module):
    """An embedding, two layers, and a head; with norms in between if asked."""

    config: Any = None

    def __init__(self, *, norms: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, 2)
        self.first = linear(FIRST)
        self.second = linear(SECOND)
        self.head = linear(HEAD)
        self.between = LlamaRMSNorm(2) if norms else nn.Identity()
        self.last = LlamaRMSNorm(2) if norms else nn.Identity()
        self.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.between(self.first(self.embed(input_ids)))
        logits: Tensor = self.head(self.last(self.second(hidden)))
        return logits


def linear(rows: list[list[float]]) -> nn.Linear:
    weight = torch.tensor(rows)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


def layer(name: str, rows: int = 2, columns: int = 2) -> Layer:
    return Layer(name, (rows, columns), "float32", 0, name, name)


def flows_of(model: nn.Module, layers: list[Layer]) -> list[Tensor]:
    with network_of_sizes(model):
        found = synaptic_flows(model, LOSS, IDS, layers)
    return [found[layer] for layer in layers]


def test_two_layers_by_hand() -> None:
    # Ones become (3, 3), then (6, 6); the head's columns have sizes 2 and 2.
    net = Net()
    first, second = flows_of(net, [layer("first"), layer("second")])
    assert second.tolist() == [[6, 6], [6, 6]]
    assert first.tolist() == [[6, 6], [2, 2]]
    for weight, flow in ((FIRST, first), (SECOND, second)):
        assert float((torch.tensor(weight).abs() * flow).sum()) == 24  # that is R
    assert net.first.weight.tolist() == FIRST
    assert net.embed.weight.dtype == torch.float32


def test_norms_conserve_what_flows() -> None:
    net = Net(norms=True)
    first, second = flows_of(net, [layer("first"), layer("second")])
    flow = [
        float((torch.tensor(weight).abs() * own).sum())
        for weight, own in ((FIRST, first), (SECOND, second))
    ]
    # The last norm makes (6, 6) / 6 of what comes, and the head 2 of each.
    assert flow == pytest.approx([4.0, 4.0], rel=1e-4)


def test_signs_and_data_make_no_difference() -> None:
    net, other = Net(), Net()
    other.first.weight.neg_()
    other.embed.weight.add_(3.0)
    layers = [layer("first"), layer("second")]
    for one, same in zip(flows_of(net, layers), flows_of(other, layers), strict=True):
        assert torch.equal(one, same)


def test_weights_may_be_removed_in_the_network_of_sizes() -> None:
    net = Net()
    with network_of_sizes(net):
        net.second.weight[1] = 0.0
        found = synaptic_flows(net, LOSS, IDS, [layer("first")])
    assert found[layer("first")].tolist() == [[2, 2], [2, 2]]
    assert net.second.weight.tolist() == SECOND


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral", "gemma2"])
def test_every_layer_of_a_model_gets_a_flow(kind: str) -> None:
    model = tiny(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = inventory(model, register_architectures())
    layers = [one for one in found.layers if one.block is not None]
    for one, flow in zip(layers, flows_of(model, layers), strict=True):
        assert flow.shape == one.shape and flow.dtype == torch.float32
        assert torch.isfinite(flow).all() and (flow >= 0).all() and flow.any()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in model.parameters())


def test_queries_and_keys_are_scored_by_what_they_give() -> None:
    model = tiny("llama")
    found = inventory(model, register_architectures())
    query, key, value = found.layers[1:4]
    assert [one.role for one in (query, key, value)] == ["q_proj", "k_proj", "v_proj"]
    of_query, of_key, of_value = flows_of(model, [query, key, value])
    assert torch.equal(of_query[0], of_key[0])  # what both read
    assert torch.equal(of_query, of_query[:1].expand(query.shape))
    ratio = of_value / of_query[:1]  # what is read, times what follows on each row
    torch.testing.assert_close(ratio, ratio[:, :1].expand(value.shape))
    assert not torch.allclose(ratio[0], ratio[1])
    assert read_weight(model, query).min() < 0


def test_a_model_without_an_embedding_is_refused() -> None:
    net = Net()
    net.get_input_embeddings = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"Net has no input embedding \(found None\)"):
        flows_of(net, [layer("first")])
