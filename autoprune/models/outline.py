"""A model without its weights: enough to know its layers, whatever its size."""

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from autoprune.errors import ModelError
from autoprune.models.checkpoints import DEMO, resolve
from autoprune.models.loading import first_line, quiet


def outline(
    source: str, auto_class: str = "AutoModelForCausalLM", *, cache: Path | None = None
) -> PreTrainedModel:
    """Build a model on no device at all, from its configuration alone.

    Args:
        source: A folder with a ``config.json``, that file, a GGUF file, ``demo``, or
            the id of a model on the hub, of which only the configuration is fetched.
        auto_class: Name of the class of transformers.
        cache: Where converted models are kept; the user's by default.

    Raises:
        ModelError: If there is no such model, or its class is not known.
    """
    path = Path(source).expanduser()
    named = source == DEMO or path.suffix == ".gguf"
    place = str(resolve(source, cache=cache).folder) if named else str(path)
    if not named and not path.exists():
        place = source  # the id of a model on the hub, or a mistake
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            model = getattr(transformers, auto_class).from_config(config)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"cannot make out the model {source!r}: {first_line(error)}. Name a folder "
            "with a config.json, a GGUF file, a hub id, or 'demo'"
        ) from error
    made: PreTrainedModel = model
    return made
