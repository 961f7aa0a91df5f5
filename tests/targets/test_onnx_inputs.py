"""What a graph is given: tokens, or images whose size stays open if it can."""

import pytest
from tiny_convnets import tiny_resnet
from tiny_models import tiny
from transformers import ASTConfig, ASTModel, ViTConfig, ViTForImageClassification

from autoprune.errors import ExportError
from autoprune.targets.onnx_inputs import input_of


def test_tokens_are_words_of_the_model() -> None:
    given = input_of(tiny("llama"))
    assert (given.name, given.open) == ("input_ids", {0: "batch", 1: "length"})
    assert given.fixed == {"use_cache": False}
    for ids in (given.example, *given.checks):
        assert 0 <= int(ids.min()) <= int(ids.max()) < 64


def test_images_have_the_channels_of_the_model_and_any_size() -> None:
    given = input_of(tiny_resnet())
    assert given.name == "pixel_values"
    assert given.open == {0: "batch", 2: "height", 3: "width"}
    shapes = [one.shape for one in (given.example, *given.checks)]
    assert {shape[1] for shape in shapes} == {1}
    assert len({shape[0] for shape in shapes}) == 3
    assert len({shape[2:] for shape in shapes}) == 3


@pytest.mark.parametrize("size", [16, (16, 24)])
def test_a_model_of_one_size_is_given_no_other(size: int | tuple[int, int]) -> None:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = ViTConfig(**small, image_size=size, patch_size=8, intermediate_size=8)
    given = input_of(ViTForImageClassification(config))
    assert given.open == {0: "batch"}
    sides = (size, size) if isinstance(size, int) else size
    assert {one.shape[1:] for one in (given.example, *given.checks)} == {(3, *sides)}


def test_a_model_of_sounds_is_refused() -> None:
    config = ASTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    with pytest.raises(ExportError, match="ASTModel reads 'input_values'. Export it"):
        input_of(ASTModel(config))
