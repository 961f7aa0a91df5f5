"""What experts read: the tokens routed to each, and the activations in its middle."""

from collections import defaultdict

import pytest
import torch
from autoprune_plugins.architectures import register_architectures
from tiny_models import tiny
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from autoprune.errors import ModelError
from autoprune.models.inputs import watching
from autoprune.models.layers import inventory, read_weight
from autoprune.policy import Layer

PATH = "model.layers.1.mlp.experts"


def layers_of(model: PreTrainedModel) -> dict[str, Layer]:
    found = inventory(model, register_architectures())
    return {la.name: la for la in found.layers if la.name.startswith(PATH)}


def shown(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Collect what every expert of block 1 reads in one batch."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    with watching(model, layers_of(model), lambda n, x: inputs[n].append(x.clone())):
        model(ids)
    assert {len(parts) for parts in inputs.values()} == {1}
    return {name: parts[0] for name, parts in inputs.items()}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_inputs_give_the_experts_true_outputs(kind: str, rng: torch.Generator) -> None:
    model = tiny(kind)
    ids = torch.randint(3, 60, (2, 12), generator=rng)
    passed: list[tuple[Tensor, ...]] = []
    experts = model.get_submodule(PATH)
    handle = experts.register_forward_hook(
        lambda module, args, kwargs, output: passed.append(
            (*args, *kwargs.values(), output)
        ),
        with_kwargs=True,
    )
    logits = model(ids).logits
    handle.remove()
    inputs, layers = shown(model, ids), layers_of(model)
    ((hidden, chosen, weights, output),) = passed
    total = torch.zeros_like(output)
    for expert in range(4):
        tokens, position = torch.where(chosen == expert)
        name = f"{PATH}.gate_up_proj[{expert}]"
        assert torch.equal(inputs[name], hidden[tokens])
        name = f"{PATH}.down_proj[{expert}]"
        out = functional.linear(inputs[name], read_weight(model, layers[name]))
        if kind == "gpt_oss":
            out = out + experts.get_parameter("down_proj_bias")[expert]
        total.index_add_(0, tokens, out * weights[tokens, position, None])
    torch.testing.assert_close(total.view_as(output), output, rtol=1e-5, atol=1e-5)
    with watching(model, layers, lambda name, x: None):
        assert torch.equal(model(ids).logits, logits)


def test_an_expert_without_tokens_is_not_shown() -> None:
    model = tiny("mixtral")
    inputs = shown(model, torch.tensor([[5]]))  # one token goes to 2 of 4 experts
    assert len(inputs) == 4
    assert {x.shape for x in inputs.values()} == {(1, 32), (1, 48)}


def test_foreign_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mixtral")
    model.set_experts_implementation("eager")  # which needs no such attribute itself
    layers = layers_of(model)
    monkeypatch.delattr(type(model.get_submodule(PATH)), "_apply_gate")
    with pytest.raises(ModelError, match="MixtralExperts reads: .*'hidden_states'"):
        with watching(model, layers, lambda name, x: None):
            model(torch.tensor([[5]]))
