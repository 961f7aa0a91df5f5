"""Loads a GGUF file as a model of transformers: by its own reader, or by ours.

transformers reads the architectures that it has a class for. What was cut to widths of
its own in every block it cannot; that is read here, into the dense model's class, with
zeros where units were left out: they compute the same.
"""

from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel

from autoprune.errors import ExportError, ModelError
from autoprune.exporting.shrinking import Units
from autoprune.models.loading import first_line, load_strictly, quiet

MODEL_FILE = "model.gguf"
"""What the file is called."""

AUTO_CLASS = "AutoModelForCausalLM"

_AGAIN = "Copy the folder again, or export the model again"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the dense model is in the file.

    Attributes:
        name: Its name there.
        heads: Rows of a head, if rows that are rotated together stand side by side; 0
            if rows are in their own order.
        site: The structure whose units were cut; empty if none were.
        axis: Along which they were.
        unit: Rows or columns of one unit.
        units: How many units the dense model has.
    """

    name: str
    heads: int = 0
    site: str = ""
    axis: int = 0
    unit: int = 1
    units: int = 0


def bitmap(units: Units, count: int) -> str:
    """Write the units that stay as hexadecimal digits, the first unit highest.

    Example:
        >>> bitmap(torch.tensor([0, 3, 4]), 6)
        '98'
    """
    kept = np.zeros(count, np.uint8)
    kept[units.numpy()] = 1
    return np.packbits(kept).tobytes().hex()


def units_of(text: str, count: int) -> Units:
    """Read what ``bitmap`` has written.

    Example:
        >>> units_of("98", 6)
        tensor([0, 3, 4])
    """
    kept = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count)
    return torch.from_numpy(kept.nonzero()[0])


def load_plainly(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load with transformers' own reader, and the configuration beside the file.

    The configuration is given because a GGUF file leaves parts of it out, such as how
    rotary frequencies are scaled.

    Raises:
        ExportError: If a file is missing or damaged, or a tensor has no place.
    """
    config = _config(folder)
    reader = _opened(folder)
    try:
        with redirect_stderr(StringIO()):  # a progress bar that no setting turns off
            model: Any = load_strictly(
                folder,
                AUTO_CLASS,
                dtype=dtype,
                config=config,
                gguf_file=MODEL_FILE,
                # Where a kernel for packed weights is installed they would stay packed.
                quantization_config=GgufConfig(dequantize=True),
            )
    except ModelError as error:
        raise ExportError(f"cannot load the export {folder}: {error}") from error
    # transformers leaves out in silence what it has no place for, as biases.
    wanted = len(model.state_dict()) - bool(config.tie_word_embeddings)
    found = sum(tensor.name != "rope_freqs.weight" for tensor in reader.tensors)
    if found != wanted:
        raise ExportError(
            f"{folder / MODEL_FILE} has {found} tensors, config.json asks for "
            f"{wanted}. {_AGAIN}"
        )
    model.hf_quantizer = None  # else transformers refuses to save it again
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model  # type: ignore[no-any-return]


def load_whole(folder: Path, dtype: torch.dtype, marker: Mapping[str, Any]) -> Any:
    """Load into the dense model's shapes, zeros where something was left out.

    Args:
        folder: The export.
        dtype: Of all weights.
        marker: With ``tensors``, a ``Place`` for each tensor in the file by its name in
            memory; ``sites``, bitmaps of the units that stay; ``left_out``, the names
            of all other tensors.

    Raises:
        ExportError: If a file is missing or damaged, or does not fit the others.
    """
    config = _config(folder)
    with torch.device("meta"):
        factory: Any = AutoModelForCausalLM
        outline = factory.from_config(config, dtype=dtype)
    tied = set(getattr(outline, "all_tied_weights_keys", None) or ())
    shapes = {n: t.shape for n, t in outline.state_dict().items() if n not in tied}
    stored = {tensor.name: tensor for tensor in _opened(folder).tensors}
    state = {}
    try:
        places = {name: Place(**given) for name, given in marker["tensors"].items()}
        for name, shape in shapes.items():
            if name in places:
                plain = _values(stored[places[name].name]).to(dtype)
                state[name] = _widened(plain, places[name], marker["sites"], shape)
            else:
                assert name in marker["left_out"], f"{name} is missing"
                state[name] = torch.zeros(shape, dtype=dtype)
        assert places.keys() <= shapes.keys(), "it has tensors without a place"
    except Exception as error:  # whatever foreign bytes and a person's hand may cause
        raise ExportError(
            f"the parts of {folder} do not fit each other ({first_line(error)}). "
            f"{_AGAIN}"
        ) from error
    with quiet():
        model = type(outline).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype
        )
    model.eval().requires_grad_(False)
    return model


def _widened(
    plain: Tensor, place: Place, sites: Mapping[str, str], shape: torch.Size
) -> Tensor:
    """Undo the pairing of rows, and put zeros where units were left out."""
    if place.heads:
        half = place.heads // 2
        rest = plain.shape[1:]
        plain = plain.view(-1, half, 2, *rest).transpose(1, 2).reshape(-1, *rest)
    if place.site:
        units = units_of(sites[place.site], place.units)
        lines = (units[:, None] * place.unit + torch.arange(place.unit)).flatten()
        full = torch.zeros(shape, dtype=plain.dtype)
        plain = full.index_copy(place.axis, lines, plain)
    assert plain.shape == shape, f"{place.name} becomes {tuple(plain.shape)}"
    return plain


def _values(tensor: Any) -> Tensor:
    """Read a tensor of a GGUF file as float32, as torch counts its axes."""
    found = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(found, np.float32)).view(
        *(int(size) for size in reversed(tensor.shape))
    )


def _opened(folder: Path) -> GGUFReader:
    file = folder / MODEL_FILE
    try:
        return GGUFReader(file)
    except Exception as error:  # the reader has no error of its own
        raise ExportError(
            f"cannot read {file}: {first_line(error)}. {_AGAIN}"
        ) from error


def _config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a foreign reader on foreign bytes raises anything
        raise ExportError(
            f"cannot read {folder / 'config.json'}: {first_line(error)}. {_AGAIN}"
        ) from error
