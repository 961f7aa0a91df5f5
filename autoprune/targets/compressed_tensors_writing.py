"""Writes a model in compressed-tensors, layer by layer, and its configuration."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from autoprune.exporting.cutting import Cutter
from autoprune.exporting.digests import digest
from autoprune.exporting.exporter import Digests, ExportJob
from autoprune.exporting.piecewise import Pieces
from autoprune.exporting.weight_files import write_weight_files
from autoprune.targets.compressed_tensors_codes import (
    cut_codes,
    library_scheme,
    packed,
    read_back,
)
from autoprune.targets.compressed_tensors_layout import Layout, on_disk

METADATA = {"format": "pt"}
"""What the header of a weight file carries."""

MIXED = "mixed-precision"
"""Format of a model whose config groups have formats of their own."""


def write_model(
    folder: Path,
    model: Any,
    job: ExportJob,
    *,
    cutter: Cutter,
    layout: Layout,
    limit: int,
) -> Digests:
    """Write weights and configuration.

    Args:
        folder: Where.
        model: The dense model, mapped from its file.
        job: What is exported.
        cutter: How the model can be cut.
        layout: What is written of it.
        limit: Most bytes of tensors in one file.

    Returns:
        What transformers has to give back, by the names of the weights.

    Raises:
        ExportError: If codes do not survive, or the layers of a structure do not keep
            the same units.
    """
    # An order of columns is no matter here: zeros are written where they are.
    plain = {layer: replace(s, permuted=False) for layer, s in job.storages.items()}
    pieces = Pieces.of(model, replace(job, storages=plain), cutter)
    coded: Digests = {}
    write_weight_files(
        folder,
        layout.parts,
        _tensors(pieces, job, layout=layout, digests=coded),
        metadata=METADATA,
        limit=limit,
    )
    config = layout.small.config
    config.architectures = [type(layout.small).__name__]
    config.dtype = model.dtype  # a checkpoint's own may be wrong
    config.save_pretrained(folder)
    if layout.coded:
        settings = quantization_config(layout)
        ModelCompressor(quantization_config=settings).update_config(str(folder))
    return {**pieces.digests, **coded}


def quantization_config(layout: Layout) -> QuantizationConfig:
    """Describe a model: a config group for each scheme, with the names of its layers.

    Args:
        layout: What is written.
    """
    groups = {
        f"group_{index}": library_scheme(scheme, names)
        for index, (scheme, names) in enumerate(layout.targets().items())
    }
    formats = sorted({scheme.format for scheme in layout.targets()})
    return QuantizationConfig(
        config_groups=groups,
        format=formats[0] if len(formats) == 1 else MIXED,
        quantization_status="compressed",
        ignore=layout.ignored(),
    )


def _tensors(
    pieces: Pieces, job: ExportJob, *, layout: Layout, digests: Digests
) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor under its name in the file; fills ``digests``."""
    for name, tensor in pieces:
        coded = layout.coded.get(name)
        if coded is None:
            yield from on_disk(layout.small, name, tensor).items()
            continue
        layer, variant = coded.layer, job.variant(coded.layer)
        if layer in pieces.units:
            variant = cut_codes(variant, layer, pieces.units[layer])
        digests[name] = digest(read_back(variant, coded.scheme))
        for key, part in packed(variant, coded.scheme, layer.name).items():
            yield f"{coded.stem}.{key}", part
