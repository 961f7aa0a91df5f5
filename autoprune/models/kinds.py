"""Kinds of modules that hold a layer: how a weight is a matrix, and what its rows meet.

Whatever a module computes, a layer is ``[out, in]`` and reads ``[tokens, in]``, so that
every method that knows matrices knows it. Linear modules and GPT-2's ``Conv1D`` are
known here; others come from plugins, with the hook ``register_layer_kinds``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autoprune.errors import PluginError


class LayerKind(ABC):
    """How modules of some classes hold a layer. An object has no state.

    Attributes:
        name: Unique, lower case.
        modules: The classes, whose ``weight`` is the layer; theirs count as well that
            derive from them.
        whole: True if the parameter is the matrix as it stands.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[type[nn.Module], ...]]
    whole: ClassVar[bool] = False

    @abstractmethod
    def matrix(
        self, module: nn.Module, tensor: Shaped[Tensor, "..."]
    ) -> Shaped[Tensor, "out in"]:
        """View the weight, its gradient or its mask as a matrix.

        Never a copy: what is written to the matrix has to reach the tensor.

        Args:
            module: The module.
            tensor: Of the shape of its weight.
        """

    def rows(
        self, module: nn.Module, inputs: Float[Tensor, "..."]
    ) -> Float[Tensor, "tokens in"]:
        """Line up all that the matrix is multiplied with.

        Args:
            module: The module.
            inputs: Its first argument.
        """
        return inputs.reshape(-1, inputs.shape[-1])

    def columns(self, module: nn.Module) -> int:
        """Count the columns of one input channel, which stand side by side."""
        return 1

    def refuses(self, module: nn.Module) -> str | None:
        """Say why a module of these classes is no layer after all, or None."""
        return None


class NarrowingKind(LayerKind):
    """A kind whose modules can be made narrower where they stand, each by itself.

    So a model gets widths that no setting of its class has a name for.
    """

    @abstractmethod
    def narrow(
        self,
        model: nn.Module,
        name: str,
        *,
        rows: Int[Tensor, " rows"] | None = None,
        channels: Int[Tensor, " channels"] | None = None,
    ) -> None:
        """Keep only some rows and input channels of a layer, as they are named.

        A norm that stands behind the layer, with numbers of its own for each row, keeps
        the same ones.

        Args:
            model: The model; changed. Its tensors may be without memory.
            name: Path of the layer's module.
            rows: Indices of the rows that stay; None for all.
            channels: Indices of the input channels that stay; None for all.
        """

    def added_to(self, model: nn.Module, name: str) -> tuple[str, ...]:
        """Name the layers whose outputs are added to those of a layer, row by row.

        Rows of them go together, whatever they hold: nobody can read one alone.
        """
        return ()


class LinearKind(LayerKind):
    """``nn.Linear`` and embeddings, stored as they are."""

    name = "linear"
    modules = (nn.Linear, nn.Embedding)
    whole = True

    def matrix(
        self, module: nn.Module, tensor: Shaped[Tensor, "..."]
    ) -> Shaped[Tensor, "out in"]:
        """Give the tensor itself."""
        return tensor


class TransposedKind(LayerKind):
    """GPT-2's ``Conv1D``, a linear map stored as ``[in, out]``."""

    name = "transposed"
    modules = (Conv1D,)

    def matrix(
        self, module: nn.Module, tensor: Shaped[Tensor, "..."]
    ) -> Shaped[Tensor, "out in"]:
        """Transpose the tensor."""
        return tensor.t()


# Of the process, as classes are: an exporter that loads a model, or a test that makes
# one, has to see the same matrices without being handed a list of kinds.
_KNOWN: dict[type[nn.Module], LayerKind] = {}


def learn(kinds: Iterable[LayerKind]) -> None:
    """Know these kinds from now on; of plugins, when they are loaded.

    Raises:
        PluginError: If a class is of another kind already.
    """
    for kind in kinds:
        for cls in kind.modules:
            known = _KNOWN.setdefault(cls, kind)
            if known.name != kind.name:
                raise PluginError(
                    f"the layer kinds {known.name!r} and {kind.name!r} both claim "
                    f"{cls.__name__}. Leave one of their plugins out."
                )


learn([LinearKind(), TransposedKind()])


def kind_of(module: nn.Module) -> LayerKind | None:
    """Find the kind of a module, by its class or the nearest that it derives from."""
    return next((_KNOWN[cls] for cls in type(module).__mro__ if cls in _KNOWN), None)


def layer_classes() -> tuple[type[nn.Module], ...]:
    """Name all classes whose modules are layers, in the order they became known."""
    return tuple(cls for cls in _KNOWN if cls is not nn.Embedding)


def columns_of(module: nn.Module) -> int:
    """Count the columns of one input channel; see ``LayerKind.columns``."""
    kind = kind_of(module)
    return kind.columns(module) if kind else 1


def rows_of(
    module: nn.Module, inputs: Float[Tensor, "..."]
) -> Float[Tensor, "tokens in"]:
    """Line up all that a module's matrix is multiplied with; see ``LayerKind.rows``."""
    kind = kind_of(module)
    return kind.rows(module, inputs) if kind else inputs.reshape(-1, inputs.shape[-1])
