"""Convolutional networks: how a ``Conv2d`` is a matrix, and where ResNets have them.

A convolution multiplies its weight, seen as ``[out, in * height * width]``, with the
patches that it slides over. So it is one more matrix, whose tokens are patches, and
every method that prunes or quantizes matrices does it to convolutions as well. Filters
that went as a whole can be taken out of the module itself.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from autoprune.hookspecs import hookimpl
from autoprune.models.architecture import StreamRule
from autoprune.models.kinds import LayerKind, NarrowingKind
from autoprune.models.layers import Architecture, SiteRule, StructureRule


class Convolution(NarrowingKind):
    """``nn.Conv2d``: one row a filter, one column a place of a kernel.

    The kernel of one input channel is so many columns side by side.
    """

    name = "convolution"
    modules = (nn.Conv2d,)

    def matrix(
        self, module: nn.Module, tensor: Shaped[Tensor, "out in height width"]
    ) -> Shaped[Tensor, "out columns"]:
        """View filters as rows."""
        return tensor.view(len(tensor), -1)

    def rows(
        self, module: nn.Module, inputs: Float[Tensor, "windows in height width"]
    ) -> Float[Tensor, "patches columns"]:
        """Give the patches that the filters meet, with the zeros around an image."""
        assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
        patches = functional.unfold(
            inputs,
            module.kernel_size,
            dilation=module.dilation,
            padding=module.padding,
            stride=module.stride,
        )
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])

    def columns(self, module: nn.Module) -> int:
        """Count the places of a kernel."""
        assert isinstance(module, nn.Conv2d)
        return prod(module.kernel_size)

    def refuses(self, module: nn.Module) -> str | None:
        """Say why a convolution is no matrix, or None."""
        assert isinstance(module, nn.Conv2d)
        if module.groups > 1:
            kind = "depthwise" if module.groups == module.in_channels else "grouped"
            return (
                f"it is a {kind} convolution: its {module.groups} groups read "
                "different channels, so that its filters are no rows of one matrix"
            )
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return (
                f"it pads with {module.padding_mode!r} by {module.padding!r}: only "
                "zeros are known here, by a number"
            )
        if not module.weight.is_contiguous():
            return "its weight is not stored filter by filter (channels last)"
        return None

    def narrow(
        self,
        model: nn.Module,
        name: str,
        *,
        rows: Int[Tensor, " rows"] | None = None,
        channels: Int[Tensor, " channels"] | None = None,
    ) -> None:
        """Keep some filters, with their part of the batch norm, and some channels.

        A norm makes a constant of a filter of zeros. It goes with the filter, so that
        this is exact only where whoever reads the channel goes as well.
        """
        module = model.get_submodule(name)
        assert isinstance(module, nn.Conv2d)
        if channels is not None:
            module.in_channels = len(channels)
            _keep(module.weight, channels, 1)
        if rows is not None:
            norms = _norms_behind(model, name)
            for part in (module, *norms):
                for tensor in (*part.parameters(), *part.buffers()):
                    _keep(tensor, rows, 0)
            module.out_channels = len(rows)
            for norm in norms:
                norm.num_features = len(rows)

    def added_to(self, model: nn.Module, name: str) -> tuple[str, ...]:
        """Name a ResNet's shortcut, which is added to the last layer of its block."""
        block, _, place = name.rpartition(".layer.")
        owner: Any = model.get_submodule(block)
        alone = isinstance(getattr(owner, "shortcut", nn.Identity()), nn.Identity)
        if alone or place != f"{len(owner.layer) - 1}.convolution":
            return ()
        return (f"{block}.shortcut.convolution",)


def _keep(tensor: Tensor, lines: Int[Tensor, " kept"], axis: int) -> None:
    """Keep some lines of a tensor, if it has any: a counter has none."""
    if tensor.dim():
        tensor.data = tensor.data.index_select(axis, lines.to(tensor.device))


def _norms_behind(model: nn.Module, name: str) -> list[nn.BatchNorm2d]:
    """Find the batch norm that comes next after a convolution, if one does."""
    module = model.get_submodule(name)
    beside = pairwise(model.get_submodule(name.rpartition(".")[0]).children())
    behind = [after for one, after in beside if one is module]
    return [norm for norm in behind if isinstance(norm, nn.BatchNorm2d)]


_BLOCKS = "resnet.encoder.stages.*.layers.*"
_SHORTCUT = SiteRule("shortcut", ("shortcut.convolution",), optional=True)


def residual_streams(model: nn.Module) -> tuple[StreamRule, ...]:
    """Find the stages of a ResNet whose channels can go from all blocks.

    The last stage is read by the classifier, and one that begins with an identity is
    written to by the stem; neither is a layer, so that these are not offered. A
    convolution on a shortcut reads the stage before and writes to its own; it is part
    of one stream, of that before if there is one. What it then writes to a channel that
    is gone, nobody reads.
    """
    stages: Any = model.get_submodule("resnet.encoder.stages")
    streams: list[StreamRule] = []
    read: set[str] = set()
    for index, (stage, following) in enumerate(pairwise(stages)):
        path = f"resnet.encoder.stages.{index}.layers"
        ahead = f"resnet.encoder.stages.{index + 1}.layers.0"
        first, last = stage.layers[0], len(stage.layers[0].layer) - 1
        if isinstance(first.shortcut, nn.Identity):
            continue
        if isinstance(following.layers[0].shortcut, nn.Identity):
            continue
        blocks = range(len(stage.layers))
        makers = [f"{path}.{block}.layer.{last}.convolution" for block in blocks]
        shortcut = f"{path}.0.shortcut.convolution"
        makers += [] if shortcut in read else [shortcut]
        takers = [f"{path}.{block}.layer.0.convolution" for block in blocks[1:]]
        takers += [f"{ahead}.layer.0.convolution", f"{ahead}.shortcut.convolution"]
        read.update(takers)
        name = f"stages.{index}.stream"
        streams.append(StreamRule(name, tuple(makers), tuple(takers)))
    return tuple(streams)


RESNET = Architecture(
    "resnet",
    ("resnet",),
    _BLOCKS,
    (
        SiteRule("conv1", ("layer.0.convolution",)),
        SiteRule("conv2", ("layer.1.convolution",)),
        _SHORTCUT,
    ),
    structures=(
        StructureRule(
            "filters",
            "channels",
            ("layer.0.convolution",),
            ("layer.1.convolution",),
            norms=("layer.0.normalization",),
        ),
    ),
    streams=residual_streams,
    settings=(("layer_type", "basic"),),
)
"""ResNet of basic blocks (18, 34)."""

RESNET_BOTTLENECK = Architecture(
    "resnet_bottleneck",
    ("resnet",),
    _BLOCKS,
    (
        SiteRule("conv1", ("layer.0.convolution",)),
        SiteRule("conv2", ("layer.1.convolution",)),
        SiteRule("conv3", ("layer.2.convolution",)),
        _SHORTCUT,
    ),
    structures=(
        StructureRule(
            "filters",
            "channels",
            ("layer.1.convolution",),
            ("layer.2.convolution",),
            norms=("layer.1.normalization",),
        ),
    ),
    streams=residual_streams,
    settings=(("layer_type", "bottleneck"),),
)
"""ResNet of bottleneck blocks (50, 101, 152).

Filters of the 3x3 convolution go with the columns of the last one. Those of the first
could go with columns of the 3x3 one, but a layer is part of one structure.
"""


@hookimpl
def register_layer_kinds() -> Sequence[LayerKind]:
    """Return the kind."""
    return [Convolution()]


@hookimpl
def register_architectures() -> Sequence[Architecture]:
    """Return the descriptions of ResNets."""
    return [RESNET, RESNET_BOTTLENECK]
