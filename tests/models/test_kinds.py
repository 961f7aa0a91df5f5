"""A class of modules says how its weight is a matrix; plugins bring classes."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autoprune.errors import PluginError
from autoprune.models.inputs import watching
from autoprune.models.kinds import (
    LayerKind,
    columns_of,
    kind_of,
    layer_classes,
    learn,
    rows_of,
)
from autoprune.models.weights import is_parameter, read_weight, write_weight
from autoprune.policy import Layer


class Folded(nn.Module):
    """A linear map whose weight is kept as halves of its columns, one below the other.

    It reads the two halves of its input as two rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).view(3, 2, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(-2) @ self.weight.flatten(1).T


class FoldedKind(LayerKind):
    name = "folded"
    modules = (Folded,)

    def matrix(self, module: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.view(len(tensor), -1)

    def rows(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return inputs.reshape(-1, 4)

    def columns(self, module: nn.Module) -> int:
        return 2


@pytest.fixture
def model() -> nn.Module:
    learn([FoldedKind()])
    return nn.Sequential(Folded())


LAYER = Layer("0", (3, 4), "float32", 0, "0", "0")


def test_known_classes_and_those_that_derive_from_them() -> None:
    class Mine(nn.Linear):
        pass

    assert kind_of(Mine(2, 2)) is kind_of(nn.Linear(2, 2)) is not None
    assert kind_of(nn.ReLU()) is None
    assert {nn.Linear, Conv1D} <= set(layer_classes())
    assert nn.Embedding not in layer_classes()


def test_a_module_of_no_kind_reads_rows() -> None:
    assert rows_of(nn.ReLU(), torch.zeros(2, 3, 4)).shape == (6, 4)
    assert columns_of(nn.ReLU()) == 1


def test_a_layer_of_a_new_kind_is_read_and_written_in_place(model: nn.Module) -> None:
    parameter = model.get_parameter("0.weight")
    assert read_weight(model, LAYER).tolist()[1] == [4.0, 5.0, 6.0, 7.0]
    assert not is_parameter(model, LAYER)
    write_weight(model, LAYER, torch.ones(3, 4))
    assert parameter.tolist() == torch.ones(3, 2, 2).tolist()


def test_what_it_reads_is_shown_as_rows(model: nn.Module) -> None:
    seen = []
    with watching(model, {"0": LAYER}, lambda name, rows: seen.append(rows)):
        given = torch.arange(16.0).view(2, 2, 2, 2)
        out = model(given)
    (rows,) = seen
    assert rows.shape == (4, 4)
    torch.testing.assert_close(rows @ read_weight(model, LAYER).T, out.view(4, 3))


def test_a_class_has_one_kind(model: nn.Module) -> None:
    class Another(FoldedKind):
        name = "another"

    learn([FoldedKind()])  # again, as when plugins are loaded twice
    match = "layer kinds 'folded' and 'another' both claim Folded"
    with pytest.raises(PluginError, match=match):
        learn([Another()])
