"""The head's input is caught, and the head makes the model's own logits of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from autoprune_plugins.tasks import CausalLM, MaskedLM
from tiny_models import CONFIGS, tiny
from torch import Tensor, nn
from transformers import AutoModel, LlamaForCausalLM

from autoprune.errors import ModelError
from autoprune.models.task import Head, output_layer

MASK = SimpleNamespace(mask_token_id=3)


def windows(rng: torch.Generator) -> Tensor:
    return torch.randint(4, 60, (3, 12), generator=rng)


@pytest.mark.parametrize("kind", CONFIGS)
def test_head_and_features_are_the_models_logits(
    kind: str, rng: torch.Generator
) -> None:
    model = tiny(kind)
    task = MaskedLM() if kind == "bert" else CausalLM()
    batch = task.batch(windows(rng), MASK)
    features = task.features(model, batch)
    logits = task.head(model).logits(features)
    expected = model(**batch.inputs).logits[batch.scored]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma3_text", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 8.0}),
    ],
)
def test_what_is_done_to_logits_is_done_here(
    kind: str, settings: dict[str, Any], rng: torch.Generator
) -> None:
    model, task = tiny(kind), CausalLM()
    batch = task.batch(windows(rng), None)
    plain = model(**batch.inputs).logits[batch.scored]
    for name, value in settings.items():
        setattr(model.config.get_text_config(), name, value)
        if hasattr(model.config, name):
            setattr(model.config, name, value)
    expected = model(**batch.inputs).logits[batch.scored]
    assert not torch.allclose(expected, plain)
    logits = task.head(model).logits(task.features(model, batch))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_cohere_scale_is_read(rng: torch.Generator) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    small = CONFIGS["llama"] | {"logit_scale": 0.25}
    small.pop("head_dim")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CohereForCausalLM(CohereConfig(**small)).eval()
    task = CausalLM()
    batch = task.batch(windows(rng), None)
    with torch.no_grad():
        expected = model(**batch.inputs).logits[batch.scored]
        head = task.head(model)
        assert head.scale == 0.25
        logits = head.logits(task.features(model, batch))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_logits_worked_by_hand() -> None:
    features = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    head = Head(weight, torch.tensor([0.0, 1.0, -1.0]), scale=2.0)
    assert head.logits(features).tolist() == [[2.0, 6.0, 4.0]]
    capped = Head(weight, softcap=1.5).logits(features)
    expected = 1.5 * torch.tanh(torch.tensor([[1.0, 2.0, 3.0]]) / 1.5)
    torch.testing.assert_close(capped, expected)


def test_nothing_is_left_on_the_model(
    tiny_model: LlamaForCausalLM, rng: torch.Generator
) -> None:
    task = CausalLM()
    task.features(tiny_model, task.batch(windows(rng), None))
    assert not tiny_model.lm_head._forward_pre_hooks


def test_the_head_itself_is_not_computed(
    tiny_model: LlamaForCausalLM, rng: torch.Generator
) -> None:
    reached = []
    tiny_model.lm_head.register_forward_hook(lambda *args: reached.append(1))
    task = CausalLM()
    features = task.features(tiny_model, task.batch(windows(rng), None))
    assert features.shape == (3 * 11, 64)
    assert not reached


def test_a_model_without_a_head_is_refused() -> None:
    body = AutoModel.from_config(tiny("llama").config)
    with pytest.raises(ModelError, match="LlamaModel has no linear .*found None.*Auto"):
        output_layer(body)
    with pytest.raises(ModelError, match=r"Sequential has no linear .*found None"):
        output_layer(nn.Sequential())


class Aside(LlamaForCausalLM):
    """A model that computes its logits beside its output layer."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return self.model(input_ids).last_hidden_state @ self.lm_head.weight.T


def test_a_model_that_goes_around_its_head_is_refused(
    tiny_model: LlamaForCausalLM, rng: torch.Generator
) -> None:
    model, task = Aside(tiny_model.config).eval(), CausalLM()
    batch = task.batch(windows(rng), None)
    message = "Aside gave outputs without calling .* 'causal-lm' cannot read"
    with pytest.raises(ModelError, match=message):
        task.features(model, batch)
    assert not model.lm_head._forward_pre_hooks
