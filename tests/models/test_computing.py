"""Models compute in another type than they are stored in, and come back bit by bit."""

import pytest
import torch
from tiny_convnets import pixels, tiny_resnet
from tiny_models import tiny
from torch import nn

from autoprune.models.computing import compute_in, computing_in


def pointers(model: nn.Module) -> dict[str, int]:
    return {name: one.data_ptr() for name, one in model.state_dict().items()}


@pytest.mark.parametrize("copy", [False, True])
def test_a_model_computes_in_float32_for_a_while(copy: bool) -> None:
    model = tiny("llama").to(torch.bfloat16)
    before = pointers(model)
    kept = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(KeyError), computing_in(model, torch.float32, copy=copy):
        assert {one.dtype for one in model.parameters()} == {torch.float32}
        assert model.lm_head.weight.dtype == torch.float32
        raise KeyError
    assert pointers(model) == before
    assert all(one.equal(kept[name]) for name, one in model.state_dict().items())


def test_a_copy_may_be_written_to() -> None:
    model = tiny("llama")  # float32 as it is
    kept = {name: one.clone() for name, one in model.state_dict().items()}
    with computing_in(model, torch.float32, copy=True):
        for parameter in model.parameters():
            parameter.data.zero_()
    assert all(one.equal(kept[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_batch_norms_are_of_one_type(stored: torch.dtype) -> None:
    model = tiny_resnet().to(stored)
    expected = model.float()(pixels()).logits
    model = model.to(stored)
    with computing_in(model, torch.float32):
        found = model(pixels()).logits
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert {one.dtype for one in model.parameters()} == {stored}


def test_buffers_keep_the_precision_that_they_have() -> None:
    model = tiny("llama")
    compute_in(model, torch.bfloat16)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    floats = [one for one in model.buffers() if one.is_floating_point()]
    assert floats and {one.dtype for one in floats} == {torch.float32}
